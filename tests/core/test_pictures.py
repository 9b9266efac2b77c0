from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core.manifest import open_manifest
from imgbatch.core.pictures import load_pictures
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError

SPEC = PreprocessSpec(resize_size=36, crop_size=32)


def test_a_sample_is_spread_over_the_rows(photo_manifest, photos):
    found = load_pictures(open_manifest(str(photo_manifest)), SPEC, Config(), limit=4)
    assert found.image_ids == [str(photos[index]) for index in (0, 40, 79, 119)]
    assert found.targets == [["red"], ["green"], ["green"], ["blue"]]
    assert found.images_NHWC.shape == (4, 32, 32, 3)


def test_chosen_images_come_in_the_order_asked_for(photo_manifest, photos):
    manifest = open_manifest(str(photo_manifest))
    wanted = [str(photos[index]) for index in (50, 5, 3)]
    found = load_pictures(manifest, SPEC, Config(), image_ids=wanted)
    assert found.image_ids == [wanted[0], wanted[2]]
    assert {name: error.status.value for name, error in found.failed.items()} == {wanted[1]: "TRUNCATED"}
    with pytest.raises(UsageError, match="no image_id 'stranger' there"):
        load_pictures(manifest, SPEC, Config(), image_ids=[wanted[0], "stranger"])


def test_only_rows_whose_target_is_known(photo_manifest):
    found = load_pictures(open_manifest(str(photo_manifest)), SPEC, Config(), known_targets=["red"])
    assert {tuple(names) for names in found.targets} == {("red",)}
    with pytest.raises(UsageError, match="no row has a target that the model knows"):
        load_pictures(open_manifest(str(photo_manifest)), SPEC, Config(), known_targets=["violet"])


CHOOSE = """
import sys
import pyarrow as pa
from imgbatch.core.manifest import open_manifest
from imgbatch.core.pictures import _choose

rows = _choose(open_manifest(sys.argv[1]), 5, None, sys.argv[2:] or None)
print(*rows["image_id"].to_pylist(), pa.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("known_targets", [[], ["red"]], ids=["any row", "known targets"])
def test_of_a_large_manifest_only_the_rows_chosen_stay_in_memory(tmp_path, known_targets):
    """In a process of its own, whose most bytes in Arrow's memory are those of this alone."""
    row_ids = np.arange(300_000)
    is_red = row_ids % 7 == 3
    columns = {
        "image_id": pa.array(row_ids).cast(pa.string()),
        "uri": pa.DictionaryArray.from_arrays(np.zeros(300_000, np.int32), ["/nowhere/" + "x" * 300]),
        "target": pa.DictionaryArray.from_arrays(is_red.astype(np.int32), ["blue", "red"]),
    }
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table(columns), path)
    command = [sys.executable, "-c", CHOOSE, str(path), *known_targets]
    *chosen, most_bytes = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    candidates = np.flatnonzero(is_red) if known_targets else row_ids
    assert chosen == candidates[np.linspace(0, len(candidates) - 1, 5).round().astype(int)].tolist()
    assert most_bytes < 100e6  # all rows are 190 MB


def test_rows_with_several_targets_are_known_if_all_of_them_are(photos, tmp_path):
    path = tmp_path / "several.parquet"
    targets = pa.array([["red"], ["red", "violet"], None, [], ["blue", "red"]], pa.list_(pa.string()))
    pq.write_table(pa.table({"uri": [str(photo) for photo in photos[:5]], "targets": targets}), path)
    manifest = open_manifest(str(path))
    found = load_pictures(manifest, SPEC, Config(), known_targets=["red", "blue"])
    assert found.targets == [["red"], [], ["blue", "red"]]
    wanted = [str(photos[index]) for index in (4, 1)]
    found = load_pictures(manifest, SPEC, Config(), image_ids=wanted, known_targets=["red", "blue"])
    assert found.image_ids == wanted[:1]


def test_embedded_images(photos, tmp_path):
    path = tmp_path / "embedded.parquet"
    pq.write_table(pa.table({"bytes": [photos[0].read_bytes(), None, photos[1].read_bytes()]}), path)
    found = load_pictures(open_manifest(str(path)), SPEC, Config())
    assert found.image_ids == ["0", "2"]
    assert found.targets == [None, None]
    assert found.failed["1"].status == "EMPTY"


def test_rows_of_the_train_split_are_left_out_if_there_are_enough_others(photos, tmp_path):
    path = tmp_path / "split.parquet"
    columns = {
        "uri": [str(photo) for photo in photos[:5]],
        "split": ["train", "test", "training", None, "val"],
        "target": ["red", "green", "blue", "red", None],
    }
    pq.write_table(pa.table(columns), path)
    manifest = open_manifest(str(path))
    for options, rows, of_train in (
        ({}, [0, 1, 2, 3, 4], [0, 2]),
        ({"min_unseen": 3}, [1, 3, 4], []),
        ({"min_unseen": 4}, [0, 1, 2, 3, 4], [0, 2]),
        ({"min_unseen": 1, "known_targets": ["red", "blue"]}, [3], []),
        ({"min_unseen": 1, "known_targets": ["blue"]}, [2], [2]),
        ({"min_unseen": 1, "image_ids": [str(photos[2])]}, [2], [2]),
    ):
        found = load_pictures(manifest, SPEC, Config(), **options)
        assert found.image_ids == [str(photos[row]) for row in rows]
        assert np.array(rows)[found.of_train_N].tolist() == of_train
