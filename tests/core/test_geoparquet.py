"""What files say of their geometry: held to GeoParquet's own schema, and read as users do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import geopandas
import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rasterio.transform import from_origin

from imgbatch.config import load_config
from imgbatch.core.compact import compact
from imgbatch.core.geoparquet import BBOX_TYPE, FileGeometry, geo_metadata, quadrilaterals
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.core.manifest_sources import TableOptions
from imgbatch.core.tiling import TileOptions, tile_scenes
from imgbatch.runtime.job import classify
from tests.rasters import noise, write_raster

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "geoparquet-1.1.0.json").read_text())


def checked(geo: bytes) -> dict[str, Any]:
    """The metadata of the column ``geometry`` of what the schema accepts."""
    metadata = json.loads(geo)
    jsonschema.validate(metadata, SCHEMA)
    return metadata["columns"]["geometry"]


def geo_of(path: Path) -> dict[str, Any]:
    return checked(pq.read_metadata(path).metadata[b"geo"])


@pytest.fixture
def out(tmp_path: Path, tiny_model) -> Path:
    """Tiles of two scenes far apart and of one that lies nowhere, labelled; a file of predictions for each scene."""
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for index, (name, left) in enumerate([("east", 600_000), ("west", 400_000)]):
        pixels = noise(3, 64, 64, dtype="uint8", high=255, seed=index)
        write_raster(scenes / f"{name}.tif", pixels, transform=from_origin(left, 5_000_000, 10, 10))
    write_raster(scenes / "nowhere.tif", noise(3, 32, 32, dtype="uint8", high=255), crs=None)
    (scenes / "text.tif").write_text("no raster")
    tile_scenes([str(scenes)], str(tmp_path / "tiles.parquet"), TileOptions(size=32))
    geo = pq.read_metadata(tmp_path / "tiles.parquet").metadata[b"geo"]
    rows = pq.read_table(tmp_path / "tiles.parquet").replace_schema_metadata({b"geo": geo})
    names = pa.array([Path(uri).stem for uri in rows["uri"].to_pylist()])
    pq.write_table(rows.append_column("scene", names), tmp_path / "tiles.parquet")
    flags = {"classify.engine": "local", "errors.max_rate": "1", "resources.device": "cpu"}
    paths = {"input.manifest": tmp_path / "tiles.parquet", "model.path": tiny_model.path}
    flags |= {name: str(path) for name, path in paths.items()} | {"output.path": str(tmp_path / "out")}
    return Path(classify(load_config(None, ["output.partition_by=[scene]"], flags)).out)


def test_every_output_file_says_where_its_own_rows_lie(tmp_path, out):
    whole = geo_of(tmp_path / "tiles.parquet")
    files = {path.parent.name: path for path in (out / "predictions").rglob("*.parquet")}
    assert set(files) == {"scene=east", "scene=west", "scene=nowhere"}
    for name in ("scene=east", "scene=west"):
        said = geo_of(files[name])
        tiles = geopandas.read_parquet(files[name])
        assert (len(tiles), tiles.crs, said["geometry_types"]) == (4, "OGC:CRS84", ["Polygon"])
        np.testing.assert_allclose(said["bbox"], tiles.total_bounds)
        assert whole["bbox"] != said["bbox"]
        assert len(geopandas.read_parquet(files[name], bbox=tuple(tiles.total_bounds))) == 4
    for path in (files["scene=nowhere"], *(out / "errors").rglob("*.parquet")):
        said = geo_of(path)
        assert "bbox" not in said
        assert said["geometry_types"] == []


def test_a_compacted_file_says_where_its_rows_lie(out):
    (entry,) = compact(str(out), target_file_mb=128).files
    said = geo_of(out / entry["path"])
    tiles = geopandas.read_parquet(out / entry["path"])
    assert (len(tiles), tiles.crs, said["geometry_types"]) == (9, "OGC:CRS84", [])
    np.testing.assert_allclose(said["bbox"], tiles.total_bounds)


def test_a_manifest_built_from_tiles_says_what_they_do_unless_the_column_has_another_name(tmp_path):
    scene = write_raster(tmp_path / "a.tif", noise(3, 64, 64), transform=from_origin(600_000, 5_000_000, 10, 10))
    tiles, built, renamed = (tmp_path / f"{name}.parquet" for name in ("tiles", "built", "renamed"))
    tile_scenes([str(scene)], str(tiles), TileOptions(size=32))
    build_manifest([str(tiles)], str(built), BuildOptions(split_shares={"train": 1.0}))
    assert geo_of(built)["bbox"] == geo_of(tiles)["bbox"]
    assert len(geopandas.read_parquet(built)) == 4
    build_manifest([str(tiles)], str(renamed), BuildOptions(table=TableOptions(columns={"outline": "geometry"})))
    assert b"geo" not in pq.read_metadata(renamed).metadata


def test_duckdb_reads_the_boxes_and_the_geometry(out):
    files = str(out / "predictions" / "**" / "*.parquet")
    query = "select count(*), count(geometry), min(bbox.xmin) < max(bbox.xmax) from read_parquet(?)"
    assert duckdb.execute(query, [files]).fetchall() == [(9, 8, True)]


def test_a_users_own_columns_lose_what_cannot_be_known_of_a_part_of_the_rows():
    metadata = json.loads(geo_metadata())
    column = metadata["columns"]["geometry"] | {"bbox": [0, 0, 9, 9], "geometry_types": ["Point", "Polygon"]}
    del column["covering"]
    metadata["columns"] = {"geometry": column}
    geometry = FileGeometry(json.dumps(metadata).encode())
    geometry.add(pa.table({"geometry": [b"wkb"]}))
    assert checked(geometry.metadata()) == {"encoding": "WKB", "geometry_types": []}


def test_the_box_is_around_all_rows_that_have_one():
    corners = np.array([[[0, 5], [0, 1], [2, 1], [2, 5]], [[7, 2], [7, 0], [9, 0], [9, 2]]], float)
    geometry = FileGeometry(geo_metadata())
    for one in (corners[:1], np.full((1, 4, 2), np.nan), corners[1:]):
        polygons, boxes = quadrilaterals(one)
        geometry.add(pa.table({"geometry": polygons, "bbox": boxes.cast(BBOX_TYPE)}))
    assert checked(geometry.metadata())["bbox"] == [0, 0, 9, 5]
