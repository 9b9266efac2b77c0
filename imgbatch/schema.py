"""The columns: what a manifest may hold, what a unit file and the output hold, and which Arrow types are plain.

Nothing here knows where the data comes from or goes to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pyarrow as pa

from imgbatch.errors import UsageError

SCHEMA_VERSION = "1"
"""Stored in the Parquet metadata of every output file under ``imgbatch.schema_version``."""

URI, BYTES, ROW_ID, IMAGE_ID = "uri", "bytes", "row_id", "image_id"
TARGET, TARGETS, SPLIT, WINDOW, BANDS = "target", "targets", "split", "window", "bands"
SIZE, ETAG = "size", "etag"
"""Bytes of an object, and what an object store called the object's content when it was listed."""

WINDOW_TYPE = pa.struct(
    [("col_off", pa.int64()), ("row_off", pa.int64()), ("width", pa.int64()), ("height", pa.int64())]
)

TILE_ID = re.compile(r"(?s)(.+)#\d+,\d+,\d+,\d+")
"""The image_id that tiling gives a tile: its scene, and its window."""

TOP_K_TYPE = pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))

PREDICTED_AT_TYPE = pa.timestamp("us", tz="UTC")

UNIT_SCHEMA = pa.schema(
    [
        (ROW_ID, pa.int64()),
        ("status", pa.string()),
        ("error_stage", pa.string()),
        ("error_message", pa.string()),
        ("attempts", pa.int32()),
        ("label", pa.string()),
        ("label_index", pa.int32()),
        ("probability", pa.float32()),
        ("margin", pa.float32()),
        ("top_k", TOP_K_TYPE),
        ("probabilities", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.string())),
        ("decision", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("embedding", pa.list_(pa.float32())),
    ]
)
"""A unit file: one row per manifest row of the unit, in the unit's order, whatever its status.

The manifest's own columns are not repeated: they stand at the same place in the run's ``rows/``.
"""

PREDICTION_COLUMNS = [
    "label",
    "label_index",
    "probability",
    "margin",
    "top_k",
    "probabilities",
    "labels",
    "decision",
    "width",
    "height",
]
ERROR_COLUMNS = ["status", "error_stage", "error_message", "attempts"]
EMBEDDING_COLUMNS = ["embedding"]

RESERVED_COLUMNS = frozenset(
    [ROW_ID, *PREDICTION_COLUMNS, *ERROR_COLUMNS, *EMBEDDING_COLUMNS, "model_id", "predicted_at", "run_id", "bucket"]
)
"""Output columns that a manifest may not bring itself."""


def check_no_collisions(column_names: Sequence[str]) -> None:
    """Raise :class:`UsageError` if a manifest column has the name of an output column, or twice the same name."""
    for name in column_names:
        if name.lower() in RESERVED_COLUMNS:
            raise UsageError(
                f"manifest: column {name!r} is the name of an output column (readers ignore case); rename it in the "
                f"manifest"
            )
        if name.lower() in (URI, IMAGE_ID) and name != name.lower():
            raise UsageError(f"manifest: column {name!r} must be called {name.lower()!r}")
    lowered = [name.lower() for name in column_names]
    for name, low in zip(column_names, lowered, strict=True):
        if lowered.count(low) > 1:
            raise UsageError(f"manifest: column {name!r} stands there twice (readers ignore case); rename one of them")


def plain_type(arrow_type: pa.DataType) -> pa.DataType:
    """The nearest type that DuckDB and Spark both read.

    Nanosecond timestamps become microseconds, float16 becomes float32, null becomes string, time64 becomes its
    microsecond count (int64), extension types their storage, dictionaries and views their plain values; lists,
    structs and maps are converted inside.
    """
    t = pa.types
    if isinstance(arrow_type, pa.BaseExtensionType):
        return plain_type(arrow_type.storage_type)
    if t.is_null(arrow_type):
        return pa.string()
    if t.is_float16(arrow_type):
        return pa.float32()
    if t.is_timestamp(arrow_type):
        return pa.timestamp("us", tz=arrow_type.tz)
    if t.is_time(arrow_type) or t.is_duration(arrow_type):
        return pa.int64()
    if t.is_dictionary(arrow_type):
        return plain_type(arrow_type.value_type)
    if t.is_large_string(arrow_type) or t.is_string_view(arrow_type):
        return pa.string()
    if t.is_large_binary(arrow_type) or t.is_binary_view(arrow_type) or t.is_fixed_size_binary(arrow_type):
        return pa.binary()
    return convert_nested(arrow_type, plain_type)


def convert_nested(arrow_type: pa.DataType, convert: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with ``convert`` applied inside lists, structs and maps; any other as it is."""
    t = pa.types
    if t.is_list(arrow_type) or t.is_large_list(arrow_type) or t.is_fixed_size_list(arrow_type):
        return pa.list_(convert(arrow_type.value_type))
    if t.is_struct(arrow_type):
        return pa.struct([pa.field(f.name, convert(f.type), f.nullable) for f in arrow_type])
    if t.is_map(arrow_type):
        return pa.map_(convert(arrow_type.key_type), convert(arrow_type.item_type))
    return arrow_type


def to_plain(table: pa.Table) -> pa.Table:
    """``table`` with every column brought to :func:`plain_type`, without schema metadata."""
    fields, columns = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        target = plain_type(field.type)
        fields.append(pa.field(field.name, target))
        columns.append(_cast(column, target))
    return pa.table(columns, schema=pa.schema(fields))


def _cast(column: pa.ChunkedArray, target: pa.DataType) -> pa.ChunkedArray:
    if column.type == target:
        return column
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([c.storage for c in column.chunks], type=column.type.storage_type)
        return _cast(column, target)
    if pa.types.is_dictionary(column.type):
        return _cast(column.cast(column.type.value_type), target)
    in_us = _with_times_in_us(column.type)
    if in_us != column.type:
        column = column.cast(in_us, safe=False)
    return column.cast(target, safe=False)


def _with_times_in_us(arrow_type: pa.DataType) -> pa.DataType:
    """What the type is to be before its times and durations, at whatever depth, become their counts."""
    if pa.types.is_time(arrow_type):
        return pa.time64("us")
    if pa.types.is_duration(arrow_type):
        return pa.duration("us")
    return convert_nested(arrow_type, _with_times_in_us)
