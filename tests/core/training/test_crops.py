from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.config import Config, load_config
from imgbatch.core.images import decode_image
from imgbatch.core.manifest import open_manifest
from imgbatch.core.training import crops as crops_module
from imgbatch.core.training.crops import create_store, decode_crops
from imgbatch.core.transforms import PreprocessSpec

SPEC = PreprocessSpec(resize_size=12, crop_size=10)


@pytest.fixture
def small_parts(monkeypatch):
    """Four images to a part."""
    monkeypatch.setattr(crops_module, "_PART_BYTES", 4 * SPEC.pixel_bytes)


@pytest.mark.usefixtures("small_parts")
def test_crops_are_what_classification_decodes(colour_images, write_manifest, tmp_path):
    uris = colour_images["red"][:10]
    path = write_manifest(uri=uris)
    rows_N = np.array([0, 1, 2, 4, 5, 7, 8, 9])
    store = create_store(str(tmp_path / "crops"), open_manifest(str(path)), rows_N, SPEC, Config(), identity="x")
    config = load_config(flags={"input.manifest": str(path)})
    assert store.missing_parts() == [0, 1]
    decode_crops(store, config)
    assert store.missing_parts() == []
    assert store.failed_images() == []
    crops = store.open()
    for position, row in enumerate(rows_N):
        expected = decode_image(Path(uris[row]).read_bytes(), SPEC, max_pixels=10**6)
        np.testing.assert_array_equal(crops[position], expected.pixels_HWC)
    assert crops.take([5, 0]).shape == (2, 10, 10, 3)
    np.testing.assert_array_equal(crops.take([5, 0])[0], crops[5])


def test_an_image_that_fails_is_listed_and_the_others_stay(colour_images, write_manifest, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    path = write_manifest(uri=[colour_images["red"][0], str(broken)])
    store = create_store(str(tmp_path), open_manifest(str(path)), np.array([0, 1]), SPEC, Config(), identity="x")
    decode_crops(store, load_config(flags={"input.manifest": str(path)}))
    (failed,) = store.failed_images()
    assert (failed.row_id, failed.uri, failed.status) == (1, str(broken), "NOT_AN_IMAGE")
    assert store.open()[0].any()


def test_embedded_images_are_decoded(colour_images, write_manifest, tmp_path):
    data = Path(colour_images["blue"][0]).read_bytes()
    path = write_manifest(bytes=pa.array([data, None, data], pa.binary()))
    store = create_store(str(tmp_path), open_manifest(str(path)), np.arange(3), SPEC, Config(), identity="x")
    decode_crops(store, load_config(flags={"input.manifest": str(path)}))
    assert [failed.row_id for failed in store.failed_images()] == [1]
    assert store.open()[2].any()


def test_the_same_images_are_decoded_once(colour_images, write_manifest, tmp_path):
    manifest = open_manifest(str(write_manifest(uri=colour_images["red"])))
    store = create_store(str(tmp_path), manifest, np.arange(3), SPEC, Config(), identity="x")
    assert create_store(str(tmp_path), manifest, np.arange(3), SPEC, Config(), identity="x") == store
    other = PreprocessSpec(resize_size=12, crop_size=12)
    for rows_N, spec in ((np.arange(3), other), (np.arange(4), SPEC)):
        different = create_store(str(tmp_path), manifest, rows_N, spec, Config(), identity="x")
        assert different.directory != store.directory


def test_what_failed_for_its_surroundings_is_tried_again(colour_images, write_manifest, tmp_path):
    late, broken = tmp_path / "late.png", tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    path = write_manifest(uri=[colour_images["red"][0], str(late), str(broken)])
    config = load_config(flags={"input.manifest": str(path)})
    store = create_store(str(tmp_path), open_manifest(str(path)), np.arange(3), SPEC, config, identity="x")
    decode_crops(store, config)
    assert [failed.status for failed in store.failed_images()] == ["NOT_FOUND", "NOT_AN_IMAGE"]
    late.write_bytes(Path(colour_images["red"][1]).read_bytes())
    store.forget_what_may_pass()
    decode_crops(store, config)
    assert [failed.status for failed in store.failed_images()] == ["NOT_AN_IMAGE"]
    store.forget_what_may_pass()
    assert store.missing_parts() == []


def test_a_part_that_was_decoded_again_is_copied_again(colour_images, write_manifest, tmp_path, s3_bucket, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    late = tmp_path / "late.png"
    path = write_manifest(uri=[str(late)])
    config = load_config(flags={"input.manifest": str(path)})
    store = create_store(s3_bucket, open_manifest(str(path)), np.arange(1), SPEC, config, identity="x")
    decode_crops(store, config)
    assert not store.open()[0].any()
    late.write_bytes(Path(colour_images["red"][1]).read_bytes())
    store.forget_what_may_pass()
    decode_crops(store, config)
    assert store.open()[0].any()
    store.remove_local_copy()
    assert not list(tmp_path.glob("imgbatch-crops-*"))


def test_other_limits_are_another_store(colour_images, write_manifest, tmp_path):
    manifest = open_manifest(str(write_manifest(uri=colour_images["red"])))
    stores = [
        create_store(str(tmp_path), manifest, np.arange(3), SPEC, load_config(flags=flags), identity="x").directory
        for flags in ({}, {"decode.max_pixels": 10}, {"fetch.max_bytes": 10}, {"geo.max_nodata": 0.1})
    ]
    assert len({*stores}) == 4
