from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, load_config
from imgbatch.core.layout import choose_layout, join_scenes
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle
from imgbatch.schema import WINDOW_TYPE


@pytest.mark.parametrize(
    ("scenes", "segments"),
    [
        ([4, 4, 4], [8, 4]),
        ([3, 3, 3, 3], [6, 6]),
        ([20, 3, 5], [20, 8]),
        ([3, 20, 3], [3, 20, 3]),
        ([], []),
    ],
)
def test_small_scenes_share_a_unit_and_large_ones_have_their_own(scenes: list[int], segments: list[int]) -> None:
    assert list(join_scenes(iter(scenes), 8)) == segments


@pytest.fixture
def config() -> Config:
    return load_config(flags={"classify.unit_rows": 4})


def write_tiles(path: Path, uris: list[str], *, windows: bool = True) -> str:
    tiles = [{"col_off": 8 * index, "row_off": 0, "width": 8, "height": 8} for index in range(len(uris))]
    columns = {"uri": uris, "image_id": [str(index) for index in range(len(uris))]}
    table = pa.table(columns)
    if windows:
        table = table.append_column("window", pa.array(tiles, WINDOW_TYPE))
    pq.write_table(table, path, row_group_size=5)
    return str(path)


def test_no_unit_straddles_two_scenes_unless_both_fit(config: Config, tiny_model: ModelBundle, tmp_path: Path) -> None:
    manifest = open_manifest(write_tiles(tmp_path / "m.parquet", ["a"] * 6 + ["b"] * 2 + ["c"] * 2 + ["d"] * 3))
    everything = np.ones(13, dtype=bool)
    layout = choose_layout(config, manifest, everything, tiny_model, tiny_model.preprocess, on_cpus=True)
    assert layout.segments == (6, 4, 3)
    assert [unit.num_rows for unit in layout] == [4, 2, 4, 3]
    some = everything.copy()
    some[[0, 1, 2, 6, 12]] = False
    assert choose_layout(config, manifest, some, tiny_model, tiny_model.preprocess, on_cpus=True).segments == (4, 4)
    few = everything[:7]
    assert choose_layout(config, manifest, few, tiny_model, tiny_model.preprocess, on_cpus=True).segments == (6, 1)


def test_photographs_are_cut_by_number_alone(config: Config, tiny_model: ModelBundle, tmp_path: Path) -> None:
    manifest = open_manifest(write_tiles(tmp_path / "m.parquet", ["a"] * 6 + ["b"] * 3, windows=False))
    layout = choose_layout(config, manifest, np.ones(9, dtype=bool), tiny_model, tiny_model.preprocess, on_cpus=True)
    assert layout.segments == (9,)
