"""GeoParquet 1.1: what a Parquet file says of its geometry, written with the manifest and carried to the output.

The one geometry column is ``geometry``: WKB polygons in longitude and latitude (OGC:CRS84), each with its ``bbox``.
A manifest that is GeoParquet already keeps what it says itself, whatever its columns and CRS.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.manifest import Manifest

GEOMETRY, BBOX, CRS, TRANSFORM = "geometry", "bbox", "crs", "transform"
METADATA_KEY = b"geo"
_SIDES = ("xmin", "ymin", "xmax", "ymax")
BBOX_TYPE = pa.struct([(side, pa.float64()) for side in _SIDES])

_WKB_POLYGON = np.dtype(
    [("order", "u1"), ("type", "<u4"), ("rings", "<u4"), ("points", "<u4"), ("ring", "<f8", (5, 2))], align=False
)
_LITTLE_ENDIAN, _POLYGON = 1, 3


def quadrilaterals(corners_N42: np.ndarray) -> tuple[pa.Array, pa.Array]:
    """The columns ``geometry`` (WKB) and ``bbox`` of N quadrilaterals.

    Args:
        corners_N42: float64, x and y of the four corners in the order of the ring; rows that are not finite are null.
    """
    polygons = np.zeros(len(corners_N42), _WKB_POLYGON)
    polygons["order"], polygons["type"], polygons["rings"], polygons["points"] = _LITTLE_ENDIAN, _POLYGON, 1, 5
    polygons["ring"] = corners_N42[:, [0, 1, 2, 3, 0]]
    unknown_N = ~np.isfinite(corners_N42).all(axis=(1, 2))
    size = _WKB_POLYGON.itemsize
    values = pa.py_buffer(polygons.tobytes())
    cells = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(polygons), [None, values])
    null = pa.array(unknown_N)
    geometry = pc.if_else(null, pa.scalar(None, pa.binary()), cells.cast(pa.binary()))
    edges = (corners_N42.min(axis=1), corners_N42.max(axis=1))
    sides = [pa.array(edge_N2[:, axis]) for edge_N2 in edges for axis in (0, 1)]
    return geometry, pa.StructArray.from_arrays(sides, fields=list(BBOX_TYPE), mask=null)


def geo_metadata() -> bytes:
    """What stands under :data:`METADATA_KEY` of files with the columns of :func:`quadrilaterals`, but for the rows."""
    column = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"],
        "covering": {"bbox": {side: [BBOX, side] for side in _SIDES}},
    }
    return json.dumps({"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}).encode()


class FileGeometry:
    """Turns metadata that describes columns into that of one file: what depends on its rows is found out from them.

    The box around all follows from the boxes of the rows, where the metadata names a covering; otherwise none is given.
    Of several types of geometry it is not known which the file holds, and none is named.
    """

    def __init__(self, geo: bytes) -> None:
        self._geo: dict[str, Any] = json.loads(geo)
        self._columns: dict[str, Any] = self._geo["columns"]
        self._low: dict[str, dict[str, float]] = {name: {} for name in self._columns}
        self._high: dict[str, dict[str, float]] = {name: {} for name in self._columns}
        self._filled: set[str] = set()

    def add(self, rows: pa.Table) -> None:
        """Take rows of the file into account."""
        for name in self._columns:
            if name in rows.column_names and rows[name].null_count < rows.num_rows:
                self._filled.add(name)
            for side, (column, field) in self._covering(name).items():
                edges = pc.struct_field(rows[column].combine_chunks(), field).drop_null().cast(pa.float64())
                edges_N = edges.to_numpy(zero_copy_only=False)
                edges_N = edges_N[np.isfinite(edges_N)]
                if len(edges_N):
                    axis, low, high = side[0], self._low[name], self._high[name]
                    low[axis] = min(low.get(axis, np.inf), float(edges_N.min()))
                    high[axis] = max(high.get(axis, -np.inf), float(edges_N.max()))

    def metadata(self) -> bytes:
        """What stands under :data:`METADATA_KEY` of a file of these rows."""
        columns = {}
        for name, column in self._columns.items():
            types = column.get("geometry_types", [])
            known = types if len(types) == 1 and name in self._filled else []
            kept = {key: value for key, value in column.items() if key != "bbox"} | {"geometry_types": known}
            low, high = self._low[name], self._high[name]
            columns[name] = kept | ({"bbox": [*low.values(), *high.values()]} if {"x", "y"} <= low.keys() else {})
        return json.dumps(self._geo | {"columns": columns}).encode()

    def _covering(self, name: str) -> dict[str, list[str]]:
        """Of each side of the rows' boxes, in the order of the axes: the column and the field that hold it."""
        box = self._columns[name].get("covering", {}).get("bbox", {})
        return {side: box[side] for side in ("xmin", "xmax", "ymin", "ymax", "zmin", "zmax") if side in box}


def carried_metadata(manifest: Manifest) -> dict[bytes, bytes]:
    """What a manifest's first file says of its geometry, to stand in the files of a run; empty without a word."""
    with storage.open_ranges(manifest.files[0].uri) as file:
        metadata = pq.read_metadata(file).metadata or {}
    geo = metadata.get(METADATA_KEY)
    return {METADATA_KEY: geo} if geo is not None and _describes(geo, manifest.schema) else {}


def _describes(geo: bytes, schema: pa.Schema) -> bool:
    """Whether the metadata is sound and its columns are there: a person may have dropped or renamed one."""
    try:
        columns = json.loads(geo)["columns"]
        coverings = [column.get("covering", {}).get("bbox", {}) for column in columns.values()]
        edges = [schema.field(column).type.field(field).type for box in coverings for column, field in box.values()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(columns) and set(columns) <= set(schema.names) and all(map(pa.types.is_floating, edges))
