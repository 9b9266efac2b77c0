"""Hive partitions of the output: what ``output.partition_by`` may name, and how a value becomes a directory name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import pyarrow as pa

from imgbatch.errors import UsageError
from imgbatch.schema import IMAGE_ID

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
MAX_VALUE_CHARS = 200
"""Of an encoded value: file systems end a name at 255 bytes."""
MAX_PARTITIONS = 10_000
_SAFE_CHARS = " !$&'()+,;@^`~"
_BUCKET = re.compile(r"bucket:(\d+)")
_UNFIT_NAME = re.compile(r"[/\\=%*?\[\]\x00-\x1f\x7f]|^\.")
_DUCKDB_TYPES = (
    (pa.types.is_string, "varchar"),
    (pa.types.is_integer, "bigint"),
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_date, "date"),
)


@dataclass(frozen=True, slots=True)
class Partition:
    """One level of directories: its ``column`` name and where the values come from."""

    column: str
    source: str
    """A column of the rows, ``label``, ``date`` or ``bucket``."""
    duckdb_type: str
    """The type that readers should give the column."""
    num_buckets: int = 0


def parse_partitions(partition_by: Sequence[str], rows_schema: pa.Schema) -> tuple[Partition, ...]:
    """The partitions that ``output.partition_by`` asks for; raises :class:`UsageError` naming the entry."""
    partitions = [_parse(entry, rows_schema) for entry in partition_by]
    names = [partition.column for partition in partitions]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"output.partition_by: {name!r} stands there twice")
    return tuple(partitions)


def _parse(entry: str, rows_schema: pa.Schema) -> Partition:
    if entry in ("date", "label") and entry not in rows_schema.names:
        return Partition(entry, entry, "date" if entry == "date" else "varchar")
    if match := _BUCKET.fullmatch(entry):
        num_buckets = int(match[1])
        if not 1 <= num_buckets <= MAX_PARTITIONS:
            raise UsageError(f"output.partition_by: {entry}: 1 to {MAX_PARTITIONS:,} buckets")
        return Partition("bucket", "bucket", "bigint", num_buckets)
    if entry not in rows_schema.names:
        raise UsageError(
            f"output.partition_by: the manifest has no column {entry!r}; also possible: date, label, bucket:N"
        )
    if _UNFIT_NAME.search(entry):
        raise UsageError(f"output.partition_by: column {entry!r} cannot name a directory; rename it")
    arrow_type = rows_schema.field(entry).type
    for is_type, duckdb_type in _DUCKDB_TYPES:
        if is_type(arrow_type):
            return Partition(entry, entry, duckdb_type)
    raise UsageError(
        f"output.partition_by: column {entry!r} is {arrow_type}; text, whole numbers, booleans and dates can be"
    )


def partition_paths(table: pa.Table, partitions: Sequence[Partition], date: str) -> pa.Array:
    """The directory of each row, ``a=1/b=x``, as a dictionary array; empty text without partitions.

    Args:
        table: rows with every source column.
        date: the run's date, ``YYYY-MM-DD``.
    """
    parts: list[list[str]] = []
    for partition in partitions:
        if partition.source == "date":
            parts.append([f"date={date}"] * table.num_rows)
        elif partition.source == "bucket":
            ids = table[IMAGE_ID].to_pylist()
            parts.append([f"bucket={zlib.crc32(image_id.encode()) % partition.num_buckets}" for image_id in ids])
        else:
            values = table[partition.source].combine_chunks().dictionary_encode()
            names = [f"{partition.column}={encode_value(value)}" for value in values.dictionary.to_pylist()]
            null_name = f"{partition.column}={NULL_PARTITION}"
            parts.append([null_name if index is None else names[index] for index in values.indices.to_pylist()])
    paths = ["/".join(row) for row in zip(*parts, strict=True)] if parts else [""] * table.num_rows
    return pa.array(paths, pa.string()).dictionary_encode()


def encode_value(value: object) -> str:
    """A value as Hive writes it in a directory name: everything a path or a reader could trip over is %-encoded."""
    if value is None or value == "":
        return NULL_PARTITION
    if isinstance(value, bool):
        return "true" if value else "false"
    encoded = quote(str(value), safe=_SAFE_CHARS)
    if encoded in (".", ".."):
        encoded = encoded.replace(".", "%2E")
    return encoded


def check_class_names(partition_by: Sequence[str], class_names: Iterable[str]) -> None:
    """Raise :class:`UsageError` if the output is partitioned by label and a class cannot name a directory."""
    if "label" in partition_by:
        for name in class_names:
            if len(encode_value(name)) > MAX_VALUE_CHARS:
                raise UsageError(
                    f"output.partition_by: label: the class {name[:40]!r}… is longer than {MAX_VALUE_CHARS} characters "
                    f"as a directory name; partition by something else"
                )


class PartitionCheck:
    """Watches a manifest's partition values as the run is planned, so that no night ends at a bad directory name."""

    def __init__(self, partitions: Iterable[Partition]) -> None:
        self._columns = {p.column: p.source for p in partitions if p.source not in ("date", "label", "bucket")}
        self._seen: dict[str, set[object]] = {column: set() for column in self._columns}

    def __call__(self, table: pa.Table) -> pa.Table:
        """``table`` itself; raises :class:`UsageError` naming the column and the value."""
        for column, seen in self._seen.items():
            for value in table[column].unique().to_pylist():
                if value in seen:
                    continue
                seen.add(value)
                if value == NULL_PARTITION:
                    raise UsageError(f"output.partition_by: {column}: the value {value} means null to Hive; rename it")
                if len(encode_value(value)) > MAX_VALUE_CHARS:
                    raise UsageError(
                        f"output.partition_by: {column}: the value {str(value)[:40]!r}… is longer than "
                        f"{MAX_VALUE_CHARS} characters as a directory name; partition by another column"
                    )
                if len(seen) > MAX_PARTITIONS:
                    raise UsageError(
                        f"output.partition_by: {column} has more than {MAX_PARTITIONS:,} values; use bucket:N instead"
                    )
        return table
