from __future__ import annotations

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


def test_embedded_images(photos, tmp_path):
    path = tmp_path / "embedded.parquet"
    pq.write_table(pa.table({"bytes": [photos[0].read_bytes(), None, photos[1].read_bytes()]}), path)
    found = load_pictures(open_manifest(str(path)), SPEC, Config())
    assert found.image_ids == ["0", "2"]
    assert found.targets == [None, None]
    assert found.failed["1"].status == "EMPTY"
