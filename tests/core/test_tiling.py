from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.enums import Resampling

from imgbatch.cli import run
from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.manifest import open_manifest
from imgbatch.core.row_decoder import RowDecoder
from imgbatch.core.tiling import TileOptions, tile_scenes, tile_windows
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.vector_labels import VectorLabels
from imgbatch.errors import Status, UsageError
from tests.faults.proxy import Fault, faulty_server
from tests.rasters import noise, write_raster


def test_tiles_cover_the_scene_with_the_overlap_and_end_with_it():
    windows = tile_windows(100, 60, TileOptions(size=32, overlap=0.25))
    assert sorted({*windows[:, 0].tolist()}) == [0, 24, 48, 68]
    assert sorted({*windows[:, 1].tolist()}) == [0, 24, 28]
    assert (windows[:, 2:] == 32).all()
    covered = np.zeros((60, 100), int)
    for left, top, width, height in windows:
        covered[top : top + height, left : left + width] += 1
    assert covered.min() == 1


def test_a_scene_smaller_than_a_tile_is_one_tile():
    assert tile_windows(20, 50, TileOptions(size=32)).tolist() == [[0, 0, 20, 32], [0, 18, 20, 32]]


@pytest.mark.parametrize("options", [{"size": 0}, {"overlap": 1.0}, {"overlap": -0.1}, {"min_valid": 1.1}])
def test_options_that_make_no_tiles_are_refused(options):
    with pytest.raises(UsageError, match="--size must be"):
        TileOptions(**options)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Three scenes: one of UTM, one without a place, one that is no raster."""
    folder = tmp_path / "scenes"
    (folder / "north").mkdir(parents=True)
    write_raster(folder / "north" / "a.tif", noise(2, 64, 96), crs="EPSG:32633")
    write_raster(folder / "b.tif", noise(2, 32, 32), crs=None, transform=Affine(1, 0, 5, 0, 1, 5))
    (folder / "c.tif").write_text("no raster")
    (folder / "notes.txt").write_text("no scene")
    return folder


def test_the_manifest_says_where_every_tile_is(tmp_path, scenes):
    tally = tile_scenes([str(scenes)], str(tmp_path / "tiles.parquet"), TileOptions(size=32, bands=(2, 1)))
    assert (tally.num_scenes, tally.num_tiles, len(tally.failed)) == (3, 7, 1)
    rows = pq.read_table(tmp_path / "tiles.parquet").to_pylist()
    tile = next(row for row in rows if row["image_id"] == "north/a.tif#64,32,32,32")
    assert tile["uri"] == str(scenes / "north" / "a.tif")
    assert tile["bands"] == [2, 1]
    assert tile["crs"] == "EPSG:32633"
    with rasterio.open(tile["uri"]) as scene:
        expected = scene.window_transform(rasterio.windows.Window(64, 32, 32, 32))
    assert tile["transform"] == list(expected)[:6]
    nowhere = next(row for row in rows if row["image_id"] == "b.tif#0,0,32,32")
    assert (nowhere["crs"], nowhere["geometry"], nowhere["bbox"]) == (None, None, None)
    broken = next(row for row in rows if row["image_id"] == "c.tif")
    empty = {"col_off": 0, "row_off": 0, "width": 0, "height": 0}
    assert (broken["uri"], broken["window"]) == (str(scenes / "c.tif"), empty)
    assert open_manifest(str(tmp_path / "tiles.parquet")).num_rows == 8


def test_a_scene_that_could_not_be_opened_never_gets_one_label_as_a_whole(tmp_path, scenes):
    tile_scenes([str(scenes)], str(tmp_path / "tiles.parquet"), TileOptions(size=32))
    tiles = pq.read_table(tmp_path / "tiles.parquet")
    broken = tiles.filter(pa.array([name == "c.tif" for name in tiles["image_id"].to_pylist()]))
    write_raster(scenes / "c.tif", noise(3, 64, 64, dtype="uint8", high=255))
    with RowDecoder(PreprocessSpec(32, 32), Config(), columns=broken.column_names) as decoder:
        (error,) = decoder.decode(broken).errors
    assert error is not None
    assert error.status is Status.BAD_WINDOW


def test_a_scene_that_may_be_there_later_ends_the_command(tmp_path, scenes, capsys):
    """As a share that is away for the moment: here a link that leads nowhere but to itself."""
    (tmp_path / "loop.tif").symlink_to(tmp_path / "loop.tif")
    with (tmp_path / "scenes.csv").open("w") as file:
        csv.writer(file).writerows([["uri"], [scenes / "b.tif"], [tmp_path / "loop.tif"], [scenes / "north" / "a.tif"]])
    assert run(["manifest", "tile", str(tmp_path / "scenes.csv"), "-o", str(tmp_path / "tiles.parquet")]) == 1
    assert f"{tmp_path / 'loop.tif'}: cannot be read now" in "".join(capsys.readouterr().err.split("\n"))
    assert not (tmp_path / "tiles.parquet").exists()


def tile_in_another_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """GDAL holds its process while it waits for an answer, and with it the server's threads."""
    command = [sys.executable, "-c", "from imgbatch.cli import main; main()", "manifest", "tile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_tiles_keep_the_size_and_etag_of_their_scene_in_an_object_store(tmp_path, scenes, s3_bucket):
    """By which a scene that is replaced is told from the one that was labelled."""
    uris = [f"{s3_bucket}/{name}.tif" for name in ("whole", "broken")]
    storage.replace(uris[0], (scenes / "north" / "a.tif").read_bytes())
    storage.replace(uris[1], b"no raster")
    output = tmp_path / "tiles.parquet"
    tiling = tile_in_another_process(*uris, scenes / "b.tif", "-o", output, "--size", "64")
    assert "3 tiles of 3 scenes" in tiling.stdout, tiling.stderr
    listed = [storage.file_info(uri) for uri in uris]
    rows = pq.read_table(output).select(["image_id", "size", "etag"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("whole.tif#0,0,64,64", listed[0].size, listed[0].version),
        ("whole.tif#32,0,64,64", listed[0].size, listed[0].version),
        ("broken.tif", 9, listed[1].version),
        ("b.tif#0,0,32,32", None, None),
    ]


@pytest.mark.parametrize("after", [0, 1], ids=["opened", "its mask is read"])
def test_a_server_that_fails_while_a_scene_is(after, tmp_path, s3_bucket, s3_server, monkeypatch):
    samples = noise(1, 512, 512, dtype="uint8", high=255)
    scene = write_raster(tmp_path / "scene.tif", samples, nodata=0, tiled=True, blockxsize=256, blockysize=256)
    storage.replace(f"{s3_bucket}/scene.tif", scene.read_bytes())
    output = tmp_path / "tiles.parquet"
    with faulty_server(s3_server) as (url, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        server.faults = [Fault("GET", r"/scene\.tif", "403", after=after)]
        tiling = tile_in_another_process(f"{s3_bucket}/scene.tif", "-o", output, "--min-valid", "0.5")
    assert server.acted
    assert tiling.returncode == 1
    assert "scene.tif: cannot be read now" in "".join(tiling.stderr.split("\n"))
    assert not output.exists()


def damaged_tiffs(whole: bytes) -> dict[str, bytes]:
    """Of a TIFF, by what is wrong: GDAL opens none of them."""
    directory = int.from_bytes(whole[4:8], "little")
    return {
        "empty": b"",
        "cut before the directory": whole[:8],
        "cut in the directory": whole[: directory + 20],
        "damaged directory": whole[:directory] + b"\xff" * 200 + whole[directory + 200 :],
    }


def test_a_damaged_scene_in_an_object_store_costs_no_other_and_is_what_it_is_on_a_disk(tmp_path, scenes, s3_bucket):
    local = tmp_path / "damaged"
    local.mkdir()
    whole = (scenes / "north" / "a.tif").read_bytes()
    for name, data in {**damaged_tiffs(whole), "whole": whole}.items():
        (local / f"{name}.tif").write_bytes(data)
        storage.replace(f"{s3_bucket}/{name}.tif", data)
    said, rows = {}, {}
    for place in (str(local), s3_bucket):
        output = tmp_path / "tiles.parquet"
        tiling = tile_in_another_process(place, "-o", output, "--size", "64", "--overwrite")
        assert "2 tiles of 5 scenes" in tiling.stdout, tiling.stderr
        lines = tiling.stdout.replace(f"{place}/", "").splitlines()
        said[place] = [line for line in lines if line.startswith("cannot be opened")]
        rows[place] = pq.read_table(output).drop_columns(["uri"]).to_pylist()
    in_store = [{name: row[name] for name in rows[str(local)][0]} for row in rows[s3_bucket]]
    assert in_store == rows[str(local)]
    assert all(row["etag"] for row in rows[s3_bucket])
    kinds = [[line.split(":")[1:3] for line in lines] for lines in said.values()]
    assert len(kinds[0]) == 4
    assert kinds[0] == kinds[1]


def test_a_scene_whose_mask_is_damaged_in_an_object_store_costs_no_other(tmp_path, scenes, s3_bucket):
    samples = noise(1, 512, 512, dtype="uint8", high=255)
    scene = write_raster(tmp_path / "scene.tif", samples, nodata=0, tiled=True, blockxsize=256, blockysize=256)
    storage.replace(f"{s3_bucket}/cut.tif", scene.read_bytes()[:-1000])
    storage.replace(f"{s3_bucket}/whole.tif", (scenes / "north" / "a.tif").read_bytes())
    output = tmp_path / "tiles.parquet"
    tiling = tile_in_another_process(s3_bucket, "-o", output, "--min-valid", "0.5", "--size", "64")
    assert "2 tiles of 2 scenes" in tiling.stdout, tiling.stderr
    assert f"cannot be opened: {s3_bucket}/cut.tif" in tiling.stdout


def test_a_damaged_scene_that_is_too_large_to_look_into_ends_the_command_unless_its_ends_tell(
    tmp_path, scenes, s3_bucket
):
    damaged = damaged_tiffs((scenes / "north" / "a.tif").read_bytes())
    for name, code in (("cut before the directory", 0), ("damaged directory", 1)):
        uri = f"{s3_bucket}/{name}.tif"
        storage.replace(uri, damaged[name])
        output = tmp_path / f"{name}.parquet"
        tiling = tile_in_another_process(uri, scenes / "b.tif", "-o", output, "--set", "fetch.max_bytes=5")
        assert tiling.returncode == code, tiling.stderr
    assert "more than fetch.max_bytes, so not looked into for damage" in " ".join(tiling.stderr.split())


def test_a_scene_that_only_gdal_could_not_read_is_tiled(tmp_path, s3_bucket, s3_server, monkeypatch):
    """Its bytes, which our own client gets, tell that the network was at fault."""
    samples = noise(1, 512, 512, dtype="uint8", high=255)
    scene = write_raster(tmp_path / "scene.tif", samples, nodata=0, tiled=True, blockxsize=256, blockysize=256)
    storage.replace(f"{s3_bucket}/scene.tif", scene.read_bytes())
    output = tmp_path / "tiles.parquet"
    with faulty_server(s3_server) as (url, server):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        server.faults = [Fault("GET", r"/scene\.tif", "parts")]
        tiling = tile_in_another_process(f"{s3_bucket}/scene.tif", "-o", output, "--min-valid", "0.5")
    assert server.acted
    assert "4 tiles of 1 scenes" in tiling.stdout, tiling.stderr


def test_scenes_are_tiled_again_into_their_own_folder(scenes):
    output = str(scenes / "tiles.parquet")
    for _ in range(2):
        tally = tile_scenes([str(scenes)], output, TileOptions(size=32), overwrite=True)
        assert (tally.num_scenes, tally.num_tiles) == (3, 7)


def test_geopandas_reads_the_tiles_and_they_lie_where_the_scene_does(tmp_path, scenes):
    tile_scenes([str(scenes / "north")], str(tmp_path / "tiles.parquet"), TileOptions(size=32))
    tiles = geopandas.read_parquet(tmp_path / "tiles.parquet")
    assert tiles.crs == "OGC:CRS84"
    assert tiles.geometry.is_valid.all()
    in_utm = tiles.to_crs("EPSG:32633").geometry
    np.testing.assert_allclose(in_utm.total_bounds, (500_000, 4_999_360, 500_960, 5_000_000), atol=0.01)
    np.testing.assert_allclose(in_utm.area, 320 * 320, rtol=1e-6)
    bbox = pq.read_table(tmp_path / "tiles.parquet")["bbox"][0].as_py()
    np.testing.assert_allclose(tiles.geometry[0].bounds, [bbox[side] for side in ("xmin", "ymin", "xmax", "ymax")])
    metadata = json.loads(pq.read_metadata(tmp_path / "tiles.parquet").metadata[b"geo"])
    np.testing.assert_allclose(metadata["columns"]["geometry"]["bbox"], tiles.total_bounds)
    assert len(geopandas.read_parquet(tmp_path / "tiles.parquet", bbox=tuple(tiles.geometry[0].bounds))) >= 1


def test_tiles_keep_their_ids_when_the_collection_moves(tmp_path, scenes):
    tile_scenes([str(scenes)], str(tmp_path / "a.parquet"), TileOptions(size=32))
    moved = scenes.rename(tmp_path / "elsewhere")
    tile_scenes([str(moved)], str(tmp_path / "b.parquet"), TileOptions(size=32))
    before, after = (pq.read_table(tmp_path / name)["image_id"] for name in ("a.parquet", "b.parquet"))
    assert before.equals(after)


def test_tiles_of_which_too_much_is_missing_are_left_out_where_a_mask_is_cheap(tmp_path):
    samples = noise(1, 64, 64)
    samples[:, :40] = 0
    scene = write_raster(tmp_path / "scene.tif", samples, nodata=0)
    tally = tile_scenes([str(scene)], str(tmp_path / "tiles.parquet"), TileOptions(size=32, min_valid=0.5))
    assert (tally.num_tiles, tally.num_left_out) == (2, 2)
    assert pq.read_table(tmp_path / "tiles.parquet")["window"][0].as_py()["row_off"] == 32


@pytest.mark.parametrize(("overviews", "left_out"), [(True, 32), (False, 0)])
def test_a_large_scene_is_judged_by_its_overviews_and_never_by_its_pixels(tmp_path, overviews, left_out):
    samples = np.ones((1, 2048, 2048), "uint8")
    samples[:, :1024] = 0
    scene = write_raster(tmp_path / "scene.tif", samples, nodata=0, tiled=True, compress="deflate")
    if overviews:
        with rasterio.open(scene, "r+") as opened:
            opened.build_overviews([4], Resampling.nearest)
    tally = tile_scenes([str(scene)], str(tmp_path / "tiles.parquet"), TileOptions(size=256, min_valid=0.5))
    assert tally.num_left_out == left_out


def test_labels_drawn_on_a_map_become_targets_and_splits_follow_scenes(tmp_path, scenes):
    def square(west: float, east: float) -> dict:
        ring = [[west, 45.0], [east, 45.0], [east, 45.2], [west, 45.2], [west, 45.0]]
        return {"type": "Polygon", "coordinates": [ring]}

    tiles = geopandas.GeoSeries.from_xy([500_400], [4_999_800], crs="EPSG:32633").to_crs("OGC:CRS84")
    middle, latitude = tiles[0].x, tiles[0].y
    point = {"type": "Point", "coordinates": [middle, latitude]}
    features = [
        {"type": "Feature", "properties": {"use": "water"}, "geometry": square(14.0, middle)},
        {"type": "Feature", "properties": {"use": "town"}, "geometry": square(middle, 16.0)},
        {"type": "Feature", "properties": {"use": "tower"}, "geometry": point},
        {"type": "Feature", "properties": {}, "geometry": square(14.0, 16.0)},
    ]
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    labels = VectorLabels(str(path), "use")
    options = TileOptions(size=32, labels=labels, split_shares={"train": 0.5, "test": 0.5})
    tile_scenes([str(scenes)], str(tmp_path / "tiles.parquet"), options)
    rows = pq.read_table(tmp_path / "tiles.parquet").to_pylist()
    placed = {row["window"]["col_off"]: row["target"] for row in rows if row["crs"]}
    assert placed == {0: "water", 32: "town", 64: "town"}
    assert {row["target"] for row in rows if not row["crs"]} == {None}
    assert len({row["split"] for row in rows if row["crs"]}) == 1
    with pytest.raises(UsageError, match="no feature has the property 'kind'"):
        VectorLabels(str(path), "kind")


def test_labels_of_a_geopackage_are_turned_into_longitude_and_latitude(tmp_path):
    """In UTM, in two layers, of which one has the property."""
    squares = [shapely.box(500_000, 4_999_000, 500_400, 5_000_000), shapely.box(500_400, 4_999_000, 501_000, 5_000_000)]
    path = tmp_path / "labels.gpkg"
    fields = geopandas.GeoDataFrame({"use": ["water", None]}, geometry=squares, crs="EPSG:32633")
    fields.to_file(path, layer="fields")
    fields.rename(columns={"use": "name"}).to_file(path, layer="names")
    labels = VectorLabels(str(path), "use")
    tiles = geopandas.GeoSeries(
        shapely.box([500_100, 500_700], 4_999_500, [500_200, 500_800], 4_999_600), crs="EPSG:32633"
    )
    assert labels.targets(pa.array(tiles.to_crs("OGC:CRS84").to_wkb())) == ["water", None]
    with pytest.raises(UsageError, match="no feature has the property 'kind'"):
        VectorLabels(str(path), "kind")
    (tmp_path / "broken.gpkg").write_bytes(b"SQLite")
    with pytest.raises(UsageError, match=r"broken.gpkg: no vector file that GDAL can read"):
        VectorLabels(str(tmp_path / "broken.gpkg"), "use")
    with pytest.warns(UserWarning, match="'crs' was not provided"):
        fields.set_crs(None, allow_override=True).to_file(tmp_path / "nowhere.gpkg")
    with pytest.raises(UsageError, match="layer 'nowhere' has no coordinate system"):
        VectorLabels(str(tmp_path / "nowhere.gpkg"), "use")


def test_numbers_as_classes_stay_whole_where_one_of_them_is_missing(tmp_path):
    squares = [shapely.box(west, 0, west + 1, 1) for west in (0, 2, 4)]
    columns = {"code": pd.array([3, None, 12], "Int32"), "wet": pd.array([True, None, False], "boolean")}
    geopandas.GeoDataFrame(columns, geometry=squares, crs="OGC:CRS84").to_file(tmp_path / "labels.gpkg")
    tiles = pa.array(shapely.to_wkb(squares))
    assert VectorLabels(str(tmp_path / "labels.gpkg"), "code").targets(tiles) == ["3", None, "12"]
    assert VectorLabels(str(tmp_path / "labels.gpkg"), "wet").targets(tiles) == ["True", None, "False"]


def test_a_polygon_beside_a_tile_says_nothing_about_it(tmp_path):
    features = [
        {"type": "Feature", "properties": {"use": use}, "geometry": json.loads(shapely.to_geojson(shape))}
        for use, shape in (
            ("water", shapely.box(0, 0, 1, 1)),
            ("tower", shapely.Point(3, 0)),
            ("road", shapely.LineString([(5, 0), (5, 1)])),
        )
    ]
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    tiles = [shapely.box(west, south, west + 1, south + 1) for west, south in ((0, 0), (1, 0), (1, 1), (2, 0), (4, 0))]
    targets = VectorLabels(str(path), "use").targets(pa.array(shapely.to_wkb(tiles)))
    assert targets == ["water", None, None, "tower", "road"]


def test_what_two_polygons_of_a_class_have_in_common_counts_once(tmp_path):
    drawn = [("water", shapely.box(0, 0, 0.4, 1))] * 2 + [("town", shapely.box(0.4, 0, 1, 1))]
    features = [
        {"type": "Feature", "properties": {"use": use}, "geometry": json.loads(shapely.to_geojson(shape))}
        for use, shape in drawn
    ]
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert VectorLabels(str(path), "use").targets(pa.array([shapely.box(0, 0, 1, 1).wkb])) == ["town"]


def test_two_scenes_of_one_name_and_no_scene_at_all_are_refused(tmp_path, scenes):
    (tmp_path / "other").mkdir()
    write_raster(tmp_path / "other" / "b.tif", noise(1, 8, 8))
    with pytest.raises(UsageError, match=r"another scene is called b\.tif too"):
        tile_scenes([str(scenes), str(tmp_path / "other")], str(tmp_path / "t.parquet"), TileOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no scene found"):
        tile_scenes([str(tmp_path / "empty")], str(tmp_path / "t.parquet"), TileOptions())
    assert not (tmp_path / "t.parquet").exists()


def test_the_command_says_how_many_tiles_and_which_scenes_cannot_be_opened(tmp_path, scenes, capsys):
    output = str(tmp_path / "tiles.parquet")
    assert run(["manifest", "tile", str(scenes), "-o", output, "--size", "32", "--bands", "1,2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{output}: 7 tiles of 3 scenes" in printed
    assert "c.tif: no raster begins like this" in printed
    assert run(["manifest", "tile", str(scenes), "-o", output]) == 2


def test_one_odd_scene_costs_no_other(tmp_path, scenes):
    """Its coordinates are of a building site, which nothing turns into longitude and latitude."""
    site = 'LOCAL_CS["site",UNIT["metre",1]]'
    write_raster(scenes / "site.tif", noise(1, 32, 32), crs=site)
    tally = tile_scenes([str(scenes)], str(tmp_path / "tiles.parquet"), TileOptions(size=32))
    rows = [row for row in pq.read_table(tmp_path / "tiles.parquet").to_pylist() if row["uri"].endswith("site.tif")]
    assert (tally.num_scenes, len(tally.failed), len(rows)) == (4, 1, 1)
    assert (rows[0]["geometry"], rows[0]["window"]["width"]) == (None, 32)


def test_a_tile_across_the_180th_meridian_does_not_go_around_the_world(tmp_path):
    (tmp_path / "fiji").mkdir()
    transform = Affine(100, 0, 812_000, 0, -100, 8_000_000)
    write_raster(tmp_path / "fiji" / "a.tif", noise(1, 32, 96), crs="EPSG:32760", transform=transform)
    tile_scenes([str(tmp_path / "fiji")], str(tmp_path / "tiles.parquet"), TileOptions(size=32))
    rows = pq.read_table(tmp_path / "tiles.parquet").to_pylist()
    shapes = [shapely.from_wkb(row["geometry"]) if row["geometry"] else None for row in rows]
    assert [shape is None for shape in shapes] == [False, True, False]
    assert max(np.ptp(shape.exterior.xy[0]) for shape in shapes if shape) < 1


def test_geojson_of_another_system_without_a_shape_or_crossing_itself(tmp_path):
    bow_tie = shapely.Polygon([(500_000, 0), (500_400, 100), (500_400, 0), (500_000, 100)])
    features = [
        {"type": "Feature", "properties": {"use": "water"}, "geometry": json.loads(shapely.to_geojson(bow_tie))},
        {"type": "Feature", "properties": {"use": "town"}, "geometry": None},
    ]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    path = tmp_path / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
    tiles = geopandas.GeoSeries([shapely.box(500_000, 0, 500_100, 100)], crs="EPSG:32633").to_crs("OGC:CRS84")
    assert VectorLabels(str(path), "use").targets(pa.array(tiles.to_wkb())) == ["water"]
    crs["properties"]["name"] = "EPSG:0"
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
    with pytest.raises(UsageError, match="crs 'EPSG:0' is not known"):
        VectorLabels(str(path), "use")
