"""The manifest as a value: one row per image, opened, validated and read in batches.

The place of a row in the manifest is its ``row_id``: files in the order of their names, rows in the order of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.core import storage
from imgbatch.core.parquet import BATCH_ROWS, ParquetDataset, RowGroup, open_dataset, read_footer
from imgbatch.core.secrets import without_secrets
from imgbatch.errors import UsageError
from imgbatch.schema import (
    BANDS,
    BYTES,
    IMAGE_ID,
    SPLIT,
    TARGET,
    TARGETS,
    URI,
    WINDOW,
    WINDOW_TYPE,
    check_no_collisions,
)

MAX_ROW_GROUP_BYTES = 256 << 20
"""Uncompressed bytes of a row group with embedded images: one is read into memory whole."""


@dataclass(frozen=True)
class Manifest:
    """A manifest whose schema is valid."""

    data: ParquetDataset
    schema: pa.Schema
    """What :meth:`iter_batches` yields: every column but ``bytes``, plain types."""

    @property
    def path(self) -> str:
        return self.data.path

    @property
    def files(self) -> tuple[storage.FileInfo, ...]:
        """In row order."""
        return self.data.files

    @property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """(file index, row group index, num_rows) in row order; empty ones are left out."""
        return self.data.row_groups

    @property
    def num_rows(self) -> int:
        return self.data.num_rows

    @property
    def has_bytes(self) -> bool:
        """Whether images are embedded; ``uri``, where there is one too, then only names them."""
        return BYTES in self.data.schema.names

    def content_identity(self) -> str:
        """Hex sha256 that changes with the rows, whatever the manifest is called and wherever it lies.

        Over the sha256 of each file; where images are embedded, over size, version (etag or mtime) and the sha256
        of the Parquet footer of each file, so that terabytes are not read.
        """
        digest = hashlib.sha256()
        for info in self.files:
            identity = _footer_identity(info) if self.has_bytes else storage.sha256(info.uri)
            digest.update(f"{identity}\n".encode())
        return digest.hexdigest()

    def iter_batches(
        self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS, limit: int | None = None
    ) -> Iterator[pa.Table]:
        """Tables of ``batch_rows`` rows (the last may be shorter) in row order, in bounded memory.

        Args:
            columns: some of ``schema.names``; none: all of them. Never ``bytes``: see :meth:`read_images`.
            limit: stop after so many rows.
        """
        names = list(self.schema.names if columns is None else columns)
        schema = pa.schema([self.schema.field(name) for name in names])
        if not names:  # nothing but embedded images: rows without columns
            rows = self.num_rows if limit is None else min(limit, self.num_rows)
            for first in range(0, rows, batch_rows):
                yield pa.table({"": pa.nulls(min(batch_rows, rows - first))}).select([])
            return
        for table in self.data.iter_batches(names, batch_rows, limit):
            yield table.cast(schema)

    def read_images(self, group: RowGroup) -> pa.ChunkedArray:
        """The embedded images of one row group: binary, null where a row has none."""
        return self.data.read_row_group(group, [BYTES])[BYTES]

    def image_ids(self, table: pa.Table, first_row: int) -> pa.ChunkedArray:
        """The ``image_id`` of each row, null where there is none.

        It is the manifest's own column, or else the uri, with ``#col_off,row_off,width,height`` appended where
        there is a window; for embedded images without a uri it is the row_id. A signature in the uri is left out.

        Args:
            table: rows from :meth:`iter_batches`.
            first_row: row_id of the first of them.
        """
        if IMAGE_ID in self.schema.names:
            return table[IMAGE_ID]
        no_ids = pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
        ids = without_secrets(table[URI]) if URI in self.schema.names else no_ids
        if WINDOW in self.schema.names:
            window = table[WINDOW].combine_chunks()
            numbers = [pc.struct_field(window, field.name).cast(pa.string()) for field in WINDOW_TYPE]
            suffixed = pc.binary_join_element_wise(ids, pc.binary_join_element_wise(*numbers, ","), "#")
            ids = pc.if_else(window.is_valid(), suffixed, ids)
        if self.has_bytes:
            row_ids = pa.array(np.arange(first_row, first_row + table.num_rows)).cast(pa.string())
            ids = pc.coalesce(ids, row_ids)
        return ids

    def with_image_id(self, table: pa.Table, first_row: int) -> pa.Table:
        """``table`` with ``image_id`` as its first column; see :meth:`image_ids`.

        Raises:
            UsageError: a row without a uri, or without an image_id.
        """
        if URI in self.schema.names and not self.has_bytes:
            self._require(table[URI], URI, first_row)
        ids = self.image_ids(table, first_row)
        self._require(ids, IMAGE_ID if IMAGE_ID in self.schema.names else f"a field of {WINDOW}", first_row)
        rest = table.drop_columns([IMAGE_ID]) if IMAGE_ID in table.column_names else table
        return rest.add_column(0, pa.field(IMAGE_ID, pa.string()), ids)

    def _require(self, column: pa.ChunkedArray, what: str, first_row: int) -> None:
        if column.null_count:
            row = first_row + pc.index(column.is_null(), True).as_py()
            raise UsageError(f"manifest {self.path}: row {row} (from 0): {what} is null; fill it in or drop the row")


def open_manifest(path: str) -> Manifest:
    """The manifest at ``path``: a Parquet file or a directory of them, any fsspec URI.

    Raises:
        UsageError: one line: nothing there, no rows, or a schema that is no manifest's (:func:`find_problems`).
    """
    data = open_dataset(storage.absolute(path))
    for problem in find_problems(data):
        raise UsageError(f"manifest {path}: {problem}")
    return as_manifest(data)


def as_manifest(data: ParquetDataset) -> Manifest:
    """A dataset in which :func:`find_problems` found none, seen as a manifest."""
    fields = [pa.field(WINDOW, WINDOW_TYPE) if f.name == WINDOW else f for f in data.schema if f.name != BYTES]
    return Manifest(data, pa.schema(fields))


def find_problems(data: ParquetDataset) -> list[str]:
    """What keeps a dataset from being a manifest, seen from its schema and footers; a line each, worst first."""
    problems = schema_problems(data.schema, data.path)
    if BYTES in data.schema.names:
        problems.extend(_too_large_row_groups(data))
    if data.num_rows == 0:
        problems.append("no rows")
    return problems


def schema_problems(schema: pa.Schema, path: str) -> list[str]:
    """What keeps a plain schema from being a manifest's, a line each; ``path`` is what the advice names."""
    problems = []
    if URI not in schema.names and BYTES not in schema.names:
        problems.append(
            f"neither a {URI!r} nor a {BYTES!r} column (columns: {', '.join(schema.names) or 'none'}); "
            f"'imgbatch manifest build {path} --column uri=NAME -o MANIFEST' renames one"
        )
    for field in schema:
        if field.name in _EXPECTED and not _EXPECTED[field.name].accepts(field.type):
            problems.append(f"column {field.name!r} is {field.type}, expected {_EXPECTED[field.name].words}; cast it")
    try:
        check_no_collisions(schema.names)
    except UsageError as error:
        problems.append(str(error).removeprefix("manifest: "))
    return problems


class _Expected(NamedTuple):
    words: str
    accepts: Callable[[pa.DataType], bool]


def _is_list_of(accepts: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda t: pa.types.is_list(t) and accepts(t.value_type)


def _is_window(arrow_type: pa.DataType) -> bool:
    return (
        pa.types.is_struct(arrow_type)
        and [f.name for f in arrow_type] == [f.name for f in WINDOW_TYPE]
        and all(pa.types.is_integer(f.type) for f in arrow_type)
    )


_EXPECTED = {
    URI: _Expected("string", pa.types.is_string),
    BYTES: _Expected("binary", pa.types.is_binary),
    IMAGE_ID: _Expected("string", pa.types.is_string),
    TARGET: _Expected("string", pa.types.is_string),
    TARGETS: _Expected("a list of strings", _is_list_of(pa.types.is_string)),
    SPLIT: _Expected("string", pa.types.is_string),
    WINDOW: _Expected("struct<col_off, row_off, width, height> of integers", _is_window),
    BANDS: _Expected("a list of integers", _is_list_of(pa.types.is_integer)),
}


def _too_large_row_groups(data: ParquetDataset) -> list[str]:
    large = [
        (group, size)
        for group, size in zip(data.row_groups, data.row_group_bytes, strict=True)
        if size > MAX_ROW_GROUP_BYTES
    ]
    if not large:
        return []
    group, size = large[0]
    return [
        f"row group {group.row_group} of {data.files[group.file_index].uri} is {size >> 20} MB, more than "
        f"{MAX_ROW_GROUP_BYTES >> 20} MB of embedded images ({len(large)} such); "
        f"'imgbatch manifest build {data.path} -o NEW.parquet' rewrites it in small ones"
    ]


def _footer_identity(info: storage.FileInfo) -> str:
    with storage.open_ranges(info.uri) as file:
        footer = read_footer(file)
    return f"{info.size} {info.version} {hashlib.sha256(footer).hexdigest()}"
