"""Classes drawn on a map, as polygons or points, as the targets of tiles.

GeoJSON is read with the extra ``geo``; GeoPackage and what else GDAL knows (shapefiles in a .zip, FlatGeobuf) with
pyogrio, which the extra brings too.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from imgbatch.core import storage
from imgbatch.errors import UsageError

_GEOJSON = (".geojson", ".json")
_LONGITUDE_LATITUDE = "OGC:CRS84"
_POLYGONAL = 2
"""Dimensions of polygons, and of collections that have one."""


class VectorLabels:
    """Labelled features in longitude and latitude.

    Args:
        path: a GeoJSON FeatureCollection, a GeoPackage or another vector file, local or ``s3://``.
        field: the property that names the class; features without it are left out.

    Raises:
        UsageError: not such a file, no coordinate system, or no feature has the property.
    """

    def __init__(self, path: str, field: str) -> None:
        try:
            data = storage.read_bytes(path)
        except OSError as error:
            raise UsageError(f"--labels {path}: {error.strerror or error}") from error
        if path.lower().endswith(_GEOJSON):
            self._classes, self._geometries = _read_geojson(data, field, path)
        else:
            with tempfile.TemporaryDirectory() as folder:
                # GDAL goes by the name too.
                copy = Path(folder, path.rsplit("/", 1)[-1])
                copy.write_bytes(data)
                self._classes, self._geometries = _read_layers(copy, field, path)
        if not self._classes:
            raise UsageError(f"--labels {path}: no feature has the property {field!r}; name it with --label-field")
        # Of a polygon that crosses itself nothing can be cut off.
        self._geometries = list(shapely.make_valid(np.array(self._geometries, object)))
        self._tree = shapely.STRtree(self._geometries)

    def targets(self, tiles: pa.Array) -> list[str | None]:
        """The class of each tile (WKB polygons): that which covers most of it, else that of most points in it.

        None where nothing touches a tile or it has no geometry; of equals the first by name.
        """
        return [self._target(shapely.from_wkb(tile)) if tile is not None else None for tile in tiles.to_pylist()]

    def _target(self, tile: Any) -> str | None:
        parts: dict[str, list[Any]] = defaultdict(list)
        for index in self._tree.query(tile, predicate="intersects"):
            geometry = self._geometries[index]
            common = geometry.intersection(tile)
            if common.area == 0 and shapely.get_dimensions(geometry) == _POLYGONAL:
                # It lies beside the tile, with an edge or a corner in common.
                continue
            parts[self._classes[index]].extend(shapely.get_parts(common))
        # Together, because what two polygons of a class have in common is covered once.
        areas = {name: shapely.union_all(common).area for name, common in parts.items()}
        return min(parts, key=lambda name: (-areas[name], -len(parts[name]), name)) if parts else None


def _read_geojson(data: bytes, field: str, path: str) -> tuple[list[str], list[Any]]:
    """Class and geometry of each feature.

    RFC 7946 knows longitude and latitude only; the ``crs`` of the format before it, which many programs still write,
    is heeded.
    """
    try:
        collection = json.loads(data)
        labelled = [
            feature
            for feature in collection["features"]
            if (feature.get("properties") or {}).get(field) is not None and feature["geometry"] is not None
        ]
        geometries = [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in labelled]
        crs = ((collection.get("crs") or {}).get("properties") or {}).get("name")
    except (ValueError, KeyError, TypeError, AttributeError, shapely.GEOSException) as error:
        raise UsageError(f"--labels {path}: not a GeoJSON FeatureCollection ({error})") from error
    # In GeoJSON longitude comes first in EPSG:4326 too.
    if crs and labelled and not crs.endswith(("CRS84", ":4326")):
        from rasterio.errors import CRSError

        try:
            geometries = list(_to_longitude_latitude(np.array(geometries, object), crs))
        except CRSError as error:
            raise UsageError(f"--labels {path}: crs {crs!r} is not known ({error})") from error
    return [str(feature["properties"][field]) for feature in labelled], geometries


def _read_layers(file: Path, field: str, path: str) -> tuple[list[str], list[Any]]:
    """Of every layer that has the property, turned into longitude and latitude."""
    try:
        import pyogrio
    except ImportError as error:
        raise UsageError(f"--labels {path}: pyogrio is not installed; pip install 'imgbatch[geo]'") from error
    classes: list[str] = []
    geometries: list[Any] = []
    try:
        for layer, _ in pyogrio.list_layers(file):
            info = pyogrio.read_info(file, layer=layer)
            if field not in info["fields"]:
                continue
            dtype = info["dtypes"][list(info["fields"]).index(field)]
            meta, _, wkb_N, (values_N,) = pyogrio.raw.read(file, layer=layer, columns=[field])
            # Integers and truth values among which one is missing come as floats, and what is missing as NaN.
            values = pa.array(values_N, from_pandas=True).to_pylist()
            known = [index for index, value in enumerate(values) if value is not None and wkb_N[index] is not None]
            if meta["crs"] is None:
                raise UsageError(f"--labels {path}: layer {layer!r} has no coordinate system; assign one")
            is_whole = dtype.startswith(("int", "uint"))
            as_stored = int if is_whole else bool if dtype == "bool" else str
            classes += [str(as_stored(values[index])) for index in known]
            geometries += list(_to_longitude_latitude(shapely.from_wkb(wkb_N[known]), meta["crs"]))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.GEOSException) as error:
        raise UsageError(f"--labels {path}: no vector file that GDAL can read ({error})") from error
    return classes, geometries


def _to_longitude_latitude(geometries_N: np.ndarray, crs: str) -> np.ndarray:
    from rasterio.crs import CRS
    from rasterio.warp import transform

    source, target = CRS.from_user_input(crs), CRS.from_user_input(_LONGITUDE_LATITUDE)

    def turn(x_M: np.ndarray, y_M: np.ndarray) -> np.ndarray:
        return np.array(transform(source, target, x_M, y_M))

    return shapely.transform(geometries_N, turn, interleaved=False)
