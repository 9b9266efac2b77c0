"""GeoParquet 1.1: what a Parquet file says of its geometry, written with the manifest and carried to the output.

The one geometry column is ``geometry``: WKB polygons in longitude and latitude (OGC:CRS84), each with its ``bbox``.
A manifest that is GeoParquet already keeps what it says itself, whatever its columns and CRS.
"""

from __future__ import annotations

import json
from collections.abc import Collection
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


def geo_metadata(bounds: tuple[float, float, float, float] | None) -> bytes:
    """What stands under :data:`METADATA_KEY` of a file with the columns of :func:`quadrilaterals`.

    Args:
        bounds: xmin, ymin, xmax, ymax around every geometry; none: there is none.
    """
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"] if bounds else [],
        "covering": {"bbox": {side: [BBOX, side] for side in _SIDES}},
    }
    if bounds:
        column["bbox"] = list(bounds)
    return json.dumps({"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}).encode()


def carried_metadata(manifest: Manifest) -> dict[bytes, bytes]:
    """What a manifest's first file says of its geometry, to stand in the files of a run; empty without a word."""
    with storage.open_ranges(manifest.files[0].uri) as file:
        metadata = pq.read_metadata(file).metadata or {}
    geo = metadata.get(METADATA_KEY)
    return {METADATA_KEY: geo} if geo is not None and _describes(geo, manifest.schema.names) else {}


def _describes(geo: bytes, names: Collection[str]) -> bool:
    """Whether the metadata is sound and its columns are there: a person may have dropped or renamed one."""
    try:
        columns = json.loads(geo)["columns"]
        return bool(columns) and set(columns) <= set(names)
    except (ValueError, KeyError, TypeError):
        return False
