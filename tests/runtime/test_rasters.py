"""Tiles of rasters through the whole job: every row once, errors as rows, and rerun is resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image

from imgbatch.config import Config, load_config
from imgbatch.core import storage
from imgbatch.core.decoder import Decoder
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.core.raster_request import RasterRequest
from imgbatch.core.row_decoder import RowDecoder
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.verify import verify
from imgbatch.errors import Status, UsageError
from imgbatch.runtime.job import classify
from imgbatch.runtime.train import train
from imgbatch.schema import WINDOW_TYPE
from tests.conftest import changed
from tests.faults.proxy import faulty_server
from tests.rasters import noise, write_raster

EXACT = {"row_id", "image_id", "uri", "window", "bands", "label", "label_index", "width", "height"}
EXACT |= {"status", "error_stage", "error_message", "attempts"}


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """160 x 160 px, three bands of 8 bits."""
    return write_raster(tmp_path / "scene.tif", noise(3, 160, 160, dtype="uint8", high=255), tiled=True)


@pytest.fixture
def tile_config(tmp_path: Path, scene: Path, photos: list[Path], tiny_model) -> Config:
    """25 tiles of a scene, four rows that cannot be read, and three photographs without a window."""
    offsets = [(x, y) for y in range(0, 160, 32) for x in range(0, 160, 32)]
    windows = [{"col_off": x, "row_off": y, "width": 32, "height": 32} for x, y in offsets]
    bad = {"col_off": 150, "row_off": 0, "width": 32, "height": 32}
    (tmp_path / "text.tif").write_text("no raster")
    rows = [(str(scene), window, None) for window in windows]
    rows += [(str(scene), bad, None), (str(tmp_path / "gone.tif"), windows[0], None)]
    rows += [(str(tmp_path / "text.tif"), windows[0], None), (str(scene), windows[0], [1, 2])]
    rows += [(str(photo), None, None) for photo in photos[:3]]
    table = pa.table(
        {
            "uri": [uri for uri, _, _ in rows],
            "window": pa.array([window for _, window, _ in rows], WINDOW_TYPE),
            "bands": pa.array([bands for _, _, bands in rows], pa.list_(pa.int32())),
            "image_id": [f"image {index}" for index in range(len(rows))],
        }
    )
    pq.write_table(table, tmp_path / "tiles.parquet")
    return load_config(
        flags={
            "input.manifest": str(tmp_path / "tiles.parquet"),
            "model.path": tiny_model.path,
            "output.path": str(tmp_path / "out"),
            "classify.engine": "local",
            "classify.unit_rows": 8,
            "errors.max_rate": 1.0,
            "resources.device": "cpu",
        }
    )


def test_every_tile_comes_out_once_and_what_cannot_be_read_says_why(tile_config):
    result = classify(tile_config)
    out = Path(str(tile_config.output.path))
    assert verify(str(out)).ok
    predictions, errors = pq.read_table(out / "predictions"), pq.read_table(out / "errors")
    assert predictions.num_rows == 28
    assert dict(zip(errors["image_id"].to_pylist(), errors["status"].to_pylist(), strict=True)) == {
        "image 25": "BAD_WINDOW",
        "image 26": "NOT_FOUND",
        "image 27": "NOT_AN_IMAGE",
        "image 28": "UNSUPPORTED_FORMAT",
    }
    assert predictions["window"][24].as_py() == {"col_off": 128, "row_off": 128, "width": 32, "height": 32}
    assert (result.num_rows, result.num_errors) == (32, 4)
    assert classify(tile_config).already_finished


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.usefixtures("ray_local")
def test_ray_gives_what_the_loop_gives(tile_config, tmp_path):
    actors = {"resources__decode_actors": 1, "resources__classify_actors": 1, "resources__classify_threads": 1}
    on_ray = changed(tile_config, classify__engine="ray", output__path=str(tmp_path / "on_ray"), **actors)
    result = classify(on_ray)
    assert verify(result.out).ok
    assert classify(tile_config).run_id == result.run_id
    for kind in ("predictions", "errors"):
        ours, loops = (pq.read_table(tmp_path / name / kind).sort_by("row_id") for name in ("on_ray", "out"))
        assert ours.num_rows == {"predictions": 28, "errors": 4}[kind]
        exact = [name for name in ours.column_names if name in EXACT]
        assert ours.select(exact).equals(loops.select(exact))
        if kind == "predictions":
            probs = [np.array(table["probabilities"].to_pylist()) for table in (ours, loops)]
            np.testing.assert_allclose(*probs, atol=1e-5)


def test_how_much_may_be_missing_decides_the_run(tile_config):
    first = classify(tile_config)
    assert classify(changed(tile_config, geo__max_nodata=0.9)).run_id != first.run_id


def test_a_tile_gives_the_label_of_the_same_pixels_as_a_photograph(tile_config, scene, tmp_path):

    with rasterio.open(scene) as opened:
        tile_HWC = opened.read(window=((32, 64), (0, 32))).transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(tile_HWC)).save(tmp_path / "tile.png")
    pq.write_table(pa.table({"uri": [str(tmp_path / "tile.png")]}), tmp_path / "photo.parquet")
    classify(tile_config)
    photo = str(tmp_path / "photo.parquet")
    classify(changed(tile_config, input__manifest=photo, output__path=str(tmp_path / "photo")))
    tiles, whole = (pq.read_table(tmp_path / name / "predictions") for name in ("out", "photo"))
    np.testing.assert_allclose(tiles["probabilities"][5].as_py(), whole["probabilities"][0].as_py(), atol=1e-6)


def test_a_raster_that_never_answers_costs_its_own_row(scene, tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    requests = [RasterRequest(str(scene)), RasterRequest(str(tmp_path / "pipe.tif")), RasterRequest(str(scene))]
    config = load_config(None, ["decode.timeout_s=1"]).decode
    with Decoder(PreprocessSpec(resize_size=32, crop_size=32), config, max_nodata=0.5) as decoder:
        unit = decoder.decode(requests, 3)
    assert [error and error.status for error in unit.errors] == [None, Status.TIMEOUT, None]
    assert unit.widths.tolist() == [160, 0, 160]


def test_a_raster_that_is_not_what_the_manifest_lists_is_an_error_or_counted_or_nothing(scene, s3_bucket):
    uris = [f"{s3_bucket}/{name}.tif" for name in ("same", "changed")]
    for uri in uris:
        storage.replace(uri, scene.read_bytes())
    etags = [storage.file_info(uri).version for uri in uris]
    storage.replace(uris[1], scene.read_bytes() + b"\0")
    window = {"col_off": 0, "row_off": 0, "width": 32, "height": 32}
    columns = {"uri": [*uris, *uris], "etag": [*etags, None, None], "window": pa.array([window] * 4, WINDOW_TYPE)}
    rows = pa.table(columns)
    outcomes = {}
    for mode in ("error", "warn", "ignore"):
        config = load_config(None, [f"input.if_changed={mode}"])
        with RowDecoder(PreprocessSpec(32, 32), config, columns=rows.column_names) as decoder:
            errors = decoder.decode(rows).errors
            outcomes[mode] = [error and error.status for error in errors], decoder.num_changed
    assert outcomes == {
        "error": ([None, Status.CHANGED, None, None], 1),
        "warn": ([None] * 4, 1),
        "ignore": ([None] * 4, 0),
    }


CLASSES = ("field", "water")


@pytest.fixture
def chips(tmp_path: Path) -> Path:
    """Folders of five-band chips, as EuroSAT has them: water is dark in the last band; a manifest of them."""
    for name in CLASSES:
        (tmp_path / "chips" / name).mkdir(parents=True)
        for index in range(16):
            samples = noise(5, 20, 20, high=3000, seed=index)
            samples[4] += 6000 if name == "field" else 0
            write_raster(tmp_path / "chips" / name / f"{name}_{index}.tif", samples)
    options = BuildOptions(targets_from="folder", split_shares={"train": 0.6, "validation": 0.4})
    build_manifest([str(tmp_path / "chips")], str(tmp_path / "chips.parquet"), options)
    return tmp_path / "chips.parquet"


@pytest.fixture
def chip_config(chips: Path, tmp_path: Path) -> Config:
    return load_config(
        None,
        ["geo.bands=[5, 1, 4, 2]", "augment.flip=all", "augment.color_jitter=0.2", "augment.band_dropout=0.1"],
        {
            "input.manifest": str(chips),
            "output.path": str(tmp_path / "model"),
            "classify.engine": "local",
            "resources.device": "cpu",
            "preprocess.resize_size": 16,
            "preprocess.crop_size": 16,
            "train.arch": "simple_cnn",
            "train.epochs": 6,
            "train.batch_size": 8,
            "train.learning_rate": 0.01,
        },
    )


def test_a_model_of_bands_is_trained_on_chips_and_labels_them(chip_config, tmp_path):
    trained = train(chip_config)
    bands = trained.bundle.preprocess.bands
    assert bands is not None
    assert bands.indices == (5, 1, 4, 2)
    assert bands.high[0] > 6000 > 3000 > bands.high[1]
    assert trained.metrics["validation"]["top1"] == 1.0
    labels = changed(chip_config, model__path=str(tmp_path / "model"), output__path=str(tmp_path / "out"))
    result = classify(labels)
    assert verify(str(tmp_path / "out")).ok
    assert result.num_errors == 0
    table = pq.read_table(tmp_path / "out" / "predictions")
    right = sum(a == b for a, b in zip(table["label"].to_pylist(), table["target"].to_pylist(), strict=True))
    assert right >= 31
    assert train(chip_config).already_finished


def test_colour_augmentations_of_rgb_are_refused_for_bands(chip_config):
    with pytest.raises(UsageError, match=r"augment\.rand_augment"):
        train(changed(chip_config, augment__rand_augment=5))


def test_tiles_of_a_scene_in_an_object_store_are_read_by_range(tile_config, scene, s3_bucket, tmp_path):
    uri = f"{s3_bucket}/scenes/scene.tif"
    storage.replace(uri, scene.read_bytes())
    # In a process of its own: GDAL holds this one, and with it the server's threads, while it waits for an answer.
    arguments = ["manifest", "tile", uri, "-o", str(tmp_path / "s3.parquet"), "--size", "32"]
    command = [sys.executable, "-c", "from imgbatch.cli import main; main()", *arguments]
    tiling = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "25 tiles of 1 scenes" in tiling.stdout, tiling.stderr
    table = pq.read_table(tmp_path / "s3.parquet").select(["uri", "image_id", "window"])
    gone = {"uri": f"{s3_bucket}/gone.tif", "image_id": "gone", "window": None}
    manifest = str(tmp_path / "with_gone.parquet")
    pq.write_table(pa.concat_tables([table, pa.Table.from_pylist([gone], schema=table.schema)]), manifest)
    classify(changed(tile_config, input__manifest=manifest))
    classify(changed(tile_config, output__path=str(tmp_path / "local")))
    remote, local = (pq.read_table(tmp_path / name / "predictions") for name in ("out", "local"))
    assert remote["probabilities"].to_pylist() == local["probabilities"].to_pylist()[:25]
    assert pq.read_table(tmp_path / "out" / "errors")["status"].to_pylist() == ["NOT_FOUND"]


def test_tiles_of_a_scene_in_an_object_store_cost_little_more_than_their_blocks(
    tile_config, s3_bucket, s3_server, tmp_path, monkeypatch
):
    """One column of tiles of a scene three blocks wide: what lies beside the blocks or the scene is not asked for."""
    scene = noise(3, 768, 768)
    path = write_raster(tmp_path / "wide.tif", scene, tiled=True, blockxsize=256, blockysize=256, compress="DEFLATE")
    with rasterio.open(path) as opened:
        needed = sum(int(opened.get_tag_item(f"BLOCK_SIZE_1_{row}", "TIFF", bidx=1)) for row in range(3))
    uri = f"{s3_bucket}/wide.tif"
    storage.replace(uri, path.read_bytes())
    corners = [(x, y) for y in range(0, 768, 64) for x in range(256, 512, 64)]
    windows = [{"col_off": x, "row_off": y, "width": 64, "height": 64} for x, y in corners]
    ids = [str(index) for index in range(len(corners))]
    table = pa.table({"uri": [uri] * len(ids), "window": pa.array(windows, WINDOW_TYPE), "image_id": ids})
    pq.write_table(table, tmp_path / "column.parquet")
    with faulty_server(s3_server) as (url, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        settings = {"input__manifest": str(tmp_path / "column.parquet"), "classify__unit_rows": 64}
        result = classify(changed(tile_config, **settings))
    assert result.counts == {"OK": len(ids)}
    reads = [size for method, _, size in server.passed if method == "GET"]
    assert needed <= sum(reads) <= 1.3 * needed
    assert len(reads) <= 8
