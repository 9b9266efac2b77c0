"""A Parquet file, or a directory of them, as one table of plain columns that is read in bounded memory.

Opening never instantiates an extension type that could run code: see :func:`open_parquet`.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.retry import may_pass
from imgbatch.core.storage import FileInfo
from imgbatch.errors import UsageError, normalise_message
from imgbatch.schema import BYTES, plain_type, to_plain

SUFFIX = ".parquet"

BATCH_ROWS = 65_536
"""Rows that are read or written at once."""

_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 64 << 20

_MAGIC = b"PAR1"
_TAIL_BYTES = 8

_UNSAFE_EXTENSIONS = (b"arrow.py_extension_type", b"ray.data.")
"""Ray's types and pyarrow's PyExtensionType: both have carried pickles in their metadata."""


class RowGroup(NamedTuple):
    """A row group: which file of the dataset, which of the file's row groups, and its rows."""

    file_index: int
    row_group: int
    num_rows: int


@dataclass(frozen=True)
class ParquetDataset:
    """Files in the order of their names: that order is the order of the rows."""

    path: str
    files: tuple[FileInfo, ...]
    schema: pa.Schema
    """Plain types, without metadata; see :func:`imgbatch.schema.plain_type`."""
    row_groups: tuple[RowGroup, ...]
    row_group_bytes: tuple[int, ...]
    """Uncompressed bytes of each row group."""

    @property
    def num_rows(self) -> int:
        return sum(group.num_rows for group in self.row_groups)

    def iter_batches(
        self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS, limit: int | None = None
    ) -> Iterator[pa.Table]:
        """Tables of exactly ``batch_rows`` rows (the last may be shorter) in row order, plain columns.

        Where ``bytes`` are among the columns, batches hold at most about 64 MiB and so may be shorter.

        Args:
            columns: names, in the order wanted; none: all.
            limit: stop after so many rows.
        """
        names = list(self.schema.names if columns is None else columns)
        max_bytes = _BATCH_BYTES if BYTES in names else None
        return rechunk(_head(self._iter_pieces(names, batch_rows), limit), batch_rows, max_bytes)

    def read_row_group(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group, whole."""
        with open_parquet(self.files[group.file_index].uri) as file:
            table = file.read_row_group(group.row_group, columns=list(columns))
        return self._plain(table, columns)

    def _iter_pieces(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
        groups = iter(zip(self.row_groups, self.row_group_bytes, strict=True))
        group, group_bytes = next(groups, (None, 0))
        for index, info in enumerate(self.files):
            if group is None or group.file_index != index:
                continue
            with open_parquet(info.uri) as file:
                while group is not None and group.file_index == index:
                    rows = batch_rows
                    if BYTES in columns:
                        rows = max(1, min(batch_rows, group.num_rows * _BATCH_BYTES // max(group_bytes, 1)))
                    # Row group by row group: what is read ahead for one is released before the next.
                    for batch in file.iter_batches(rows, row_groups=[group.row_group], columns=list(columns)):
                        yield self._plain(pa.Table.from_batches([batch]), columns)
                    group, group_bytes = next(groups, (None, 0))

    def _plain(self, table: pa.Table, columns: Sequence[str]) -> pa.Table:
        return to_plain(table.select(list(columns))).cast(pa.schema([self.schema.field(name) for name in columns]))


@contextlib.contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """One Parquet file, after a look at its footer.

    Raises:
        UsageError: missing, unreadable, not Parquet, or with columns whose type Ray or pickle would load.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(storage.open_ranges(uri))
            _refuse_unsafe_extensions(uri, read_footer(file))
            # Reading ahead spares requests on an object store and only costs memory on a disk.
            reader = pq.ParquetFile(file, pre_buffer=not storage.is_local(uri), buffer_size=_BUFFER_BYTES)
        except FileNotFoundError as error:
            raise UsageError(f"{uri}: there is no such file") from error
        except pa.ArrowInvalid as error:
            raise UsageError(f"{uri}: not a readable Parquet file ({normalise_message(error)})") from error
        except Exception as error:
            if not isinstance(error, OSError) and not may_pass(error):  # clients have network errors of their own
                raise
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{uri}: cannot be read ({normalise_message(reason)})") from error
        yield reader


def read_footer(file: IO[bytes]) -> bytes:
    """The serialised metadata of an open Parquet file; raises ``pa.ArrowInvalid`` if it is none."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length + _TAIL_BYTES > size:
        raise pa.ArrowInvalid(f"it does not end in {_MAGIC.decode()} and a footer")
    file.seek(size - _TAIL_BYTES - length)
    footer = file.read(length)
    file.seek(0)
    return footer


def open_dataset(path: str) -> ParquetDataset:
    """The Parquet file or directory at ``path`` (any fsspec URI); reads listings and footers only.

    In a directory, files and folders whose names start with ``_`` or ``.`` are not data.

    Raises:
        UsageError: one line: nothing there, no Parquet there, or files that do not fit each other.
    """
    files = _find_files(path)
    schema: pa.Schema | None = None
    groups: list[RowGroup] = []
    sizes: list[int] = []
    for index, info in enumerate(files):
        with open_parquet(info.uri) as file:
            own = _plain_schema(info.uri, file.schema_arrow)
            schema = schema if schema is not None else own
            _check_same(files[0].uri, schema, info.uri, own)
            for number in range(file.metadata.num_row_groups):
                row_group = file.metadata.row_group(number)
                if row_group.num_rows:
                    groups.append(RowGroup(index, number, row_group.num_rows))
                    sizes.append(row_group.total_byte_size)
    return ParquetDataset(path, tuple(files), schema, tuple(groups), tuple(sizes))


def rechunk(tables: Iterable[pa.Table], num_rows: int, max_bytes: int | None = None) -> Iterator[pa.Table]:
    """The same rows in tables of ``num_rows`` each, or fewer where ``max_bytes`` are reached first.

    Only a row that is larger by itself makes a table of more than ``max_bytes``.
    """
    pending: list[pa.Table] = []
    pending_rows = pending_bytes = 0
    for table in tables:
        while table.num_rows:
            take = min(table.num_rows, num_rows - pending_rows)
            if max_bytes is not None:
                while take > 1 and pending_bytes + table.slice(0, take).nbytes > max_bytes:
                    take //= 2
                size = table.slice(0, take).nbytes
                if pending and pending_bytes + size > max_bytes:
                    yield pa.concat_tables(pending)
                    pending, pending_rows, pending_bytes = [], 0, 0
                    continue
                pending_bytes += size
            pending.append(table.slice(0, take))
            pending_rows += take
            table = table.slice(take)
            if pending_rows == num_rows or (max_bytes is not None and pending_bytes >= max_bytes):
                yield pa.concat_tables(pending)
                pending, pending_rows, pending_bytes = [], 0, 0
    if pending:
        yield pa.concat_tables(pending)


def _head(tables: Iterable[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    left = limit
    for table in tables:
        if left is None:
            yield table
            continue
        yield table.slice(0, left)
        left -= min(left, table.num_rows)
        if left == 0:
            return


def _find_files(path: str) -> list[FileInfo]:
    try:
        if storage.is_file(path):
            return [storage.file_info(path)]
        found = storage.exists(path)
        files = [info for info in storage.list_files(path, SUFFIX) if _is_data(path, info.uri)] if found else []
    except UsageError:
        raise
    except Exception as error:  # every object store's client has exceptions of its own
        raise UsageError(f"{path}: cannot be read ({normalise_message(error)})") from error
    if not found:
        raise UsageError(f"{path}: there is no such file or directory")
    if not files:
        raise UsageError(f"{path}: the directory holds no {SUFFIX} file")
    for info in files:
        if partition := next((part for part in _below(path, info.uri)[:-1] if "=" in part), None):
            raise UsageError(
                f"{path}: partition directories ({partition}) are not read as columns; write the column into the files"
            )
    return files


def _is_data(path: str, uri: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in _below(path, uri))


def _below(path: str, uri: str) -> list[str]:
    return uri.removeprefix(storage.listing_prefix(path)).split("/")


def _refuse_unsafe_extensions(uri: str, footer: bytes) -> None:
    # pyarrow loads registered extension types as soon as it opens a file, so this looks at the raw footer, in which
    # the Arrow schema with the names of its extension types stands as one run of base64.
    for name in _UNSAFE_EXTENSIONS:
        if any(form in footer for form in _base64_forms(name)):
            raise UsageError(
                f"{uri}: holds a column of an extension type {name.decode()}…, which may run code when read; "
                "write the file again with plain columns"
            )


def _base64_forms(text: bytes) -> list[bytes]:
    """What ``text`` looks like within base64 at each alignment, less the characters it shares with its neighbours."""
    forms = []
    for lead in range(3):
        encoded = base64.b64encode(bytes(lead) + text)
        forms.append(encoded[-(-8 * lead // 6) : 8 * (lead + len(text)) // 6])
    return forms


def _plain_schema(uri: str, schema: pa.Schema) -> pa.Schema:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UsageError(f"{uri}: column {name!r} stands there twice; rename one of them")
    fields = []
    for field in schema:
        plain = pa.field(field.name, plain_type(field.type))
        try:
            to_plain(pa.schema([field.remove_metadata()]).empty_table())
        except pa.ArrowException as error:
            raise UsageError(
                f"{uri}: column {field.name!r} of type {field.type} cannot be brought to {plain.type}; drop or cast it"
            ) from error
        fields.append(plain)
    return pa.schema(fields)


def _check_same(first_uri: str, first: pa.Schema, uri: str, schema: pa.Schema) -> None:
    for name in dict.fromkeys([*first.names, *schema.names]):
        here = schema.field(name).type if name in schema.names else "missing"
        there = first.field(name).type if name in first.names else "missing"
        if here != there:
            raise UsageError(
                f"{uri}: column {name!r} is {here}, but {there} in {first_uri}; files must have one schema"
            )
