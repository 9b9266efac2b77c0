from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine

from imgbatch.cli import run
from imgbatch.core.mosaic import write_mosaics
from imgbatch.errors import UsageError
from tests.rasters import noise, write_raster

CLASSES = ("field", "water", "town")
TRANSFORM = Affine(10, 0, 500_000, 0, -10, 5_000_000)


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_raster(tmp_path / "scene.tif", noise(1, 600, 40), transform=TRANSFORM)


def tile(left: int, top: int, width: int = 20, height: int = 20) -> dict[str, int]:
    return {"col_off": left, "row_off": top, "width": width, "height": height}


def stored(store_run: Callable[..., Path], scene: Path, probs: dict[tuple[int, int], list[float]], **options) -> str:
    windows = [tile(left, top) for left, top in probs]
    columns = {"window": windows, "uri": [str(scene)] * len(windows)}
    ids = [f"north/a.tif#{left},{top},20,20" for left, top in probs]
    values = np.array(list(probs.values()), np.float32)
    return str(store_run(CLASSES, values, columns=columns, image_ids=ids, **options))


def test_labels_lie_where_their_tiles_do_and_overlaps_are_averaged(tmp_path, scene, store_run):
    probs = {(0, 0): [0.9, 0.1, 0.0], (10, 0): [0.2, 0.8, 0.0], (0, 570): [0.0, 0.1, 0.9]}
    out = stored(store_run, scene, probs)
    tally = write_mosaics(out, str(tmp_path / "maps"))
    assert (tally.files, tally.num_tiles, tally.failed) == ([str(tmp_path / "maps/north/a.labels.tif")], 3, [])
    with rasterio.open(tally.files[0]) as labels:
        assert (labels.shape, labels.dtypes, labels.nodata) == ((600, 40), ("uint8",), 255)
        assert (labels.crs, labels.transform) == ("EPSG:32633", TRANSFORM)
        assert json.loads(labels.tags(1)["class_names"]) == list(CLASSES)
        assert len(set(map(labels.colormap(1).get, range(3)))) == 3
        values = labels.read(1)
    expected = np.full((600, 40), 255, np.uint8)
    expected[:20, :20] = 0  # 0.55 of field to 0.45 where both tiles lie
    expected[:20, 20:30] = 1
    expected[570:590, :20] = 2
    np.testing.assert_array_equal(values, expected)


def test_a_classs_probability_is_the_mean_where_tiles_overlap(tmp_path, scene, store_run):
    out = stored(store_run, scene, {(0, 0): [0.9, 0.1, 0.0], (10, 0): [0.2, 0.8, 0.0]})
    (path,) = write_mosaics(out, str(tmp_path / "maps"), class_name="water").files
    assert path.endswith("a.water.tif")
    with rasterio.open(path) as water:
        values = water.read(1)
        assert np.isnan(water.nodata)
    np.testing.assert_allclose(values[0, [0, 15, 25]], [0.1, 0.45, 0.8])
    assert np.isnan(values[:, 30:]).all()
    assert np.isnan(values[20:]).all()


def test_the_file_is_a_cloud_optimised_geotiff_with_overviews(tmp_path, store_run):
    scene = write_raster(tmp_path / "large.tif", noise(1, 1100, 1100, dtype="uint8", high=255))
    (path,) = write_mosaics(stored(store_run, scene, {(0, 0): [1, 0, 0]}), str(tmp_path / "maps")).files
    with rasterio.open(path) as labels:
        assert labels.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert labels.overviews(1) == [2, 4]
    assert [file.name for file in Path(path).parent.iterdir()] == ["a.labels.tif"]


def test_a_scene_that_is_gone_or_has_shrunk_is_said(tmp_path, scene, store_run):
    out = stored(store_run, scene, {(0, 590): [1, 0, 0]})
    tally = write_mosaics(out, str(tmp_path / "maps"))
    assert tally.failed == [f"{scene}: is 40 x 600 px now, less than its tiles"]
    assert (tally.files, tally.num_tiles) == ([], 0)
    scene.unlink()
    assert "No such file" in write_mosaics(out, str(tmp_path / "maps")).failed[0]


def test_tiles_of_embedded_rasters_are_said_and_cost_no_other(tmp_path, scene, store_run):
    columns = {"window": [tile(0, 0), tile(0, 0)], "uri": [str(scene), None]}
    probs = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    out = str(store_run(CLASSES, probs, columns=columns, image_ids=["a.tif#0,0,20,20", "7"]))
    tally = write_mosaics(out, str(tmp_path / "maps"))
    assert (tally.files, tally.num_tiles) == ([str(tmp_path / "maps/a.labels.tif")], 1)
    assert tally.failed == ["1 tiles of embedded rasters, which have no file to take the grid from"]


def test_an_image_id_cannot_lead_out_of_the_folder(tmp_path, scene, store_run):
    out = store_run(
        CLASSES,
        np.array([[1, 0, 0]], np.float32),
        columns={"window": [tile(0, 0)], "uri": [str(scene)]},
        image_ids=["../../a.tif#0,0,20,20"],
    )
    assert write_mosaics(str(out), str(tmp_path / "maps")).files == [str(tmp_path / "maps/scene.labels.tif")]


def test_what_has_no_mosaic_is_refused(tmp_path, scene, store_run):
    out = stored(store_run, scene, {(0, 0): [1, 0, 0]})
    with pytest.raises(UsageError, match="--class lake: the classes are field, water, town"):
        write_mosaics(out, str(tmp_path), class_name="lake")
    few = stored(store_run, scene, {(0, 0): [1, 0, 0]}, out="few", keep="top_k")
    with pytest.raises(UsageError, match=r"output\.probabilities=all"):
        write_mosaics(few, str(tmp_path))
    photos = str(store_run(CLASSES, np.eye(3, dtype=np.float32), out="photos"))
    with pytest.raises(UsageError, match="no tiles of scenes"):
        write_mosaics(photos, str(tmp_path))


def test_the_command_names_the_files(tmp_path, scene, store_run, capsys):
    out = stored(store_run, scene, {(0, 0): [1, 0, 0]})
    assert run(["mosaic", out, "-o", str(tmp_path / "maps"), "--class", "water"]) == 0
    printed = "".join(capsys.readouterr().out.split("\n"))
    assert "a.water.tif" in printed
    assert "1 rasters of 1 tiles" in printed


def test_the_command_fails_where_no_raster_was_written_and_counts_what_it_does_not_list(tmp_path, store_run, capsys):
    uris = [str(tmp_path / f"{n:02d}.tif") for n in range(12)]
    columns = {"window": [tile(0, 0)] * 12, "uri": uris}
    out = str(store_run(CLASSES, np.tile(np.float32([1, 0, 0]), (12, 1)), columns=columns))
    assert run(["mosaic", out, "-o", str(tmp_path / "maps")]) == 2
    printed = capsys.readouterr()
    assert "0 rasters of 0 tiles" in printed.out
    assert printed.out.count("left out: ") == 10
    assert printed.out.endswith("and 2 more\n")
    assert "no raster was written; 12 scenes were left out" in printed.err


def test_scenes_of_one_name_get_files_of_their_own(tmp_path, store_run):
    scenes = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        scenes.append(write_raster(tmp_path / folder / "B.tif", noise(1, 40, 40), transform=TRANSFORM))
    columns = {"window": [tile(0, 0), tile(0, 0)], "uri": [str(scene) for scene in scenes]}
    ids = [f"{scene}#0,0,20,20" for scene in scenes]
    probs = np.array([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]], np.float32)
    out = str(store_run(CLASSES, probs, columns=columns, image_ids=ids))
    tally = write_mosaics(out, str(tmp_path / "maps"))
    assert len({*tally.files}) == len(list((tmp_path / "maps").rglob("*.tif"))) == 2
