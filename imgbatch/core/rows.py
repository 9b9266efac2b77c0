"""A run's ``rows/``: the manifest's columns as the run saw them, one Parquet row group per unit.

A unit is then one small read, however the manifest is laid out, and verification has its truth.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.manifest import Manifest
from imgbatch.core.runs import RunPaths
from imgbatch.core.units import Unit, UnitLayout
from imgbatch.schema import IMAGE_ID, ROW_ID, URI

UNITS_PER_FILE = 256
"""Row groups in one file of ``rows/``: keeps the footer that every decode actor parses small."""


def normalise_columns(table: pa.Table) -> pa.Table:
    """``row_id, image_id, uri`` first (``uri`` null for embedded images), then the manifest's other columns."""
    if URI not in table.column_names:
        table = table.append_column(URI, pa.nulls(table.num_rows, pa.string()))
    first = [ROW_ID, IMAGE_ID, URI]
    return table.select([*first, *(name for name in table.column_names if name not in first)])


def write_rows(paths: RunPaths, layout: UnitLayout, tables: Iterable[pa.Table]) -> None:
    """Write ``rows/`` from tables in row order; equal input gives equal files, so a second writer does no harm.

    Files of an earlier plan in other units, which was never finished, are removed.
    """
    unit_tables = _cut(tables, (unit.num_rows for unit in layout))
    num_files = -(-layout.num_units // UNITS_PER_FILE)
    for file_index in range(num_files):
        count = min(UNITS_PER_FILE, layout.num_units - file_index * UNITS_PER_FILE)
        with storage.staged_file(paths.rows_file(file_index)) as staged:
            first = next(unit_tables)
            with pq.ParquetWriter(staged, first.schema, compression="zstd") as writer:
                writer.write_table(first)
                for _ in range(count - 1):
                    writer.write_table(next(unit_tables))
    written = {paths.rows_file(index).rpartition("/")[2] for index in range(num_files)}
    for info in storage.list_files(paths.rows, ".parquet"):
        if info.uri.rpartition("/")[2] not in written:
            storage.remove(info.uri)


def _cut(tables: Iterable[pa.Table], sizes: Iterable[int]) -> Iterator[pa.Table]:
    """``tables`` cut anew into pieces of the given sizes, holding one input table at a time."""
    source = iter(tables)
    held: list[pa.Table] = []
    held_rows = 0
    for size in sizes:
        while held_rows < size:
            table = next(source)
            held.append(table)
            held_rows += table.num_rows
        joined = pa.concat_tables(held)
        yield joined.slice(0, size).combine_chunks()
        held, held_rows = [joined.slice(size)], held_rows - size


_KEPT_GROUPS = 3
"""Of embedded images: an actor has two children, and the next unit on its way."""


class RowsReader:
    """Reads units of ``rows/``; keeps the file last used open."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._file_index = -1
        self._file: pq.ParquetFile | None = None

    def read(self, unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
        """The unit's rows, in order."""
        return self._open(unit.index // UNITS_PER_FILE).read_row_group(
            unit.index % UNITS_PER_FILE, columns=columns, use_threads=False
        )

    def row_id_range(self, unit: Unit) -> tuple[int, int]:
        """The unit's first and last row_id, from the footer of the file."""
        group = self._open(unit.index // UNITS_PER_FILE).metadata.row_group(unit.index % UNITS_PER_FILE)
        statistics = group.column(0).statistics  # row_id is the first column
        return statistics.min, statistics.max

    @property
    def schema(self) -> pa.Schema:
        return self._open(0).schema_arrow

    def _open(self, file_index: int) -> pq.ParquetFile:
        if self._file is None or file_index != self._file_index:
            self.close()
            uri = self._paths.rows_file(file_index)
            self._file = pq.ParquetFile(storage.open_ranges(uri), pre_buffer=not storage.is_local(uri))
            self._file_index = file_index
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close(force=True)
            self._file = None


class EmbeddedImages:
    """Reads the ``bytes`` of rows of a manifest by row_id; several threads may, in row groups of their own.

    Keeps the row groups last used, one for each unit that an actor has under way.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._first_rows = np.cumsum([0, *(group.num_rows for group in manifest.row_groups)])
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, row_ids: Sequence[int]) -> Iterator[bytes | None]:
        """Each row's bytes, in order; ``None`` where the cell is null."""
        # Held here: with more units under way than groups are kept, each row would find its group gone again.
        group_index, group = -1, pa.chunked_array([], pa.binary())
        for row_id in row_ids:
            index = int(np.searchsorted(self._first_rows, row_id, side="right")) - 1
            if index != group_index:
                group_index, group = index, self._group(index)
            yield group[row_id - int(self._first_rows[index])].as_py()

    def _group(self, index: int) -> pa.ChunkedArray:
        with self._lock:
            group = self._groups.pop(index, None)
            if group is None:
                group = self._manifest.read_images(self._manifest.row_groups[index])
            self._groups[index] = group
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
            return group


def select_rows(tables: Iterable[pa.Table], row_ids: pa.Array) -> Iterator[pa.Table]:
    """Those rows whose row_id is in ``row_ids``, tables without any left out."""
    for table in tables:
        chosen = table.filter(pc.is_in(table[ROW_ID], value_set=row_ids))
        if chosen.num_rows:
            yield chosen


def take_rows(tables: Iterable[pa.Table], row_ids_N: np.ndarray) -> pa.Table:
    """The rows of these ids, which ascend, of a manifest's tables in row order; holds one table at a time."""
    taken = []
    first_row = 0
    for table in tables:
        start, stop = np.searchsorted(row_ids_N, (first_row, first_row + table.num_rows))
        taken.append(table.take(row_ids_N[start:stop] - first_row))
        first_row += table.num_rows
    return pa.concat_tables(taken)


def read_selected(reader: RowsReader, units: Iterable[Unit], row_ids: pa.Array) -> Iterator[pa.Table]:
    """The rows of a run whose row_id is in ``row_ids``, which are in order; units without any are not read."""
    wanted = row_ids.to_numpy()
    for unit in units:
        first_id, last_id = reader.row_id_range(unit)
        first, end = int(np.searchsorted(wanted, first_id)), int(np.searchsorted(wanted, last_id, side="right"))
        if first < end:
            yield from select_rows([reader.read(unit)], row_ids.slice(first, end - first))
