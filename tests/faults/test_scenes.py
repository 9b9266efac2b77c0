"""Tiles of scenes survive what photographs survive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core.model import ModelBundle
from imgbatch.errors import ExitCode
from imgbatch.schema import WINDOW_TYPE
from tests.faults.conftest import Job, assert_exactly_once, outcomes
from tests.faults.drivers import KILLED
from tests.rasters import noise, write_raster

SIDE = 32


def write_scene(path: Path, *, seed: int) -> str:
    """6 x 6 tiles of three 16-bit bands, of which the first row holds no data."""
    samples_CHW = noise(3, 6 * SIDE, 6 * SIDE, seed=seed)
    samples_CHW[:, :SIDE] = 0
    return str(write_raster(path, samples_CHW, tiled=True, blockxsize=64, blockysize=64, nodata=0))


@pytest.fixture
def scenes(tmp_path: Path, tiny_model: ModelBundle) -> Job:
    """72 tiles of two scenes, in units of 16 that end with a scene, then four of a scene cut short and of none."""
    whole = [write_scene(tmp_path / f"scene{seed}.tif", seed=seed) for seed in (0, 1)]
    cut = tmp_path / "cut.tif"
    data = Path(whole[0]).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    places = [(uri, row, column) for uri in whole for row in range(6) for column in range(6)]
    places += [
        (str(cut), 5, 5),
        (str(cut), 5, 4),
        (str(tmp_path / "none.tif"), 1, 1),
        (str(tmp_path / "none.tif"), 1, 2),
    ]
    windows = [{"col_off": SIDE * c, "row_off": SIDE * r, "width": SIDE, "height": SIDE} for _, r, c in places]
    table = pa.table(
        {
            "uri": [uri for uri, _, _ in places],
            "window": pa.array(windows, WINDOW_TYPE),
            "image_id": [f"{Path(uri).name}#{row},{column}" for uri, row, column in places],
            "shop": ["north" if row < 3 else "south" for _, row, _ in places],
        }
    )
    pq.write_table(table, tmp_path / "tiles.parquet")
    return Job(tmp_path / "tiles.parquet", tiny_model.path, tmp_path / "out", tmp_path)


def test_a_driver_killed_among_tiles_and_run_again(scenes: Job) -> None:
    undisturbed = replace(scenes, out=scenes.out.with_name("undisturbed"))
    assert undisturbed.run() == ExitCode.DONE
    statuses = np.array([row[2] for row in outcomes(undisturbed)])
    first_rows = np.arange(72) % 36 < 6
    assert (statuses[:72][first_rows] == "EMPTY").all()
    assert (statuses[:72][~first_rows] == "OK").all()
    assert list(statuses[72:]) == ["TRUNCATED", "TRUNCATED", "NOT_FOUND", "NOT_FOUND"]
    for failpoint in ("commit.after=kill@3", "storage.create[unit-00000004.parquet]=kill", "finalize.mid_file=kill"):
        assert scenes.run(failpoint) == KILLED
    assert scenes.run() == ExitCode.DONE
    assert_exactly_once(scenes, undisturbed)


@pytest.mark.soak
def test_a_tile_that_the_decoder_does_not_survive_costs_its_row(scenes: Job) -> None:
    assert scenes.run("decode.row[9]=kill") == ExitCode.DONE
    statuses = {row[0]: row[2] for row in outcomes(scenes)}
    # Units of 16, 16 and 4 tiles for each scene, and one for what is left.
    assert {row for row, status in statuses.items() if status == "DECODER_CRASH"} == {9, 25, 45, 61}
