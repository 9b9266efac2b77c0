"""Finalize: from unit files to the output, as a pure function of the unit files and of ``finalize.json``.

    lay_out (finalize.json, created if absent) -> write files -> remove strays -> files.json -> _SUCCESS -> current.json

Running it again, or twice at once, changes nothing: partitions, names, row order and bytes follow from the inputs.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import current, storage
from imgbatch.core.failpoints import failpoint
from imgbatch.core.output_files import EMBEDDINGS, ERRORS, KINDS, PREDICTIONS, OutputFile, OutputFileWriter, find_strays
from imgbatch.core.parallel import MapParts, in_threads, map_ahead
from imgbatch.core.partition_units import PARTITION_RANGES, PartitionUnits
from imgbatch.core.partitions import partition_paths
from imgbatch.core.plan import Run
from imgbatch.core.readers import write_readers
from imgbatch.core.rows import RowsReader
from imgbatch.core.runs import other_driver
from imgbatch.core.secrets import without_secrets
from imgbatch.core.units import Unit
from imgbatch.errors import ImgbatchError, Status
from imgbatch.schema import (
    EMBEDDING_COLUMNS,
    ERROR_COLUMNS,
    IMAGE_ID,
    PREDICTED_AT_TYPE,
    PREDICTION_COLUMNS,
    ROW_ID,
    SCHEMA_VERSION,
    UNIT_SCHEMA,
    URI,
)

OPEN_FILES = 64
"""Output files written in one pass over the units."""
BUFFERED_BYTES = 256 * 2**20
"""Arrow bytes held over all open files before they become row groups."""
MAX_ROW_GROUP_BYTES = 32 * 2**20
COUNTED_UNITS = 1024
"""Units of one part of the layout; files of partitions that are made of no more are written together."""
FEW_PARTS = 4
"""As many as :func:`in_threads` does at once."""
READERS = 8
"""Unit files of an object store that one part reads at once."""
_TRIES = 3


def finalize(run: Run, map_parts: MapParts = in_threads) -> dict[str, Any]:
    """Make a run's output from its unit files; returns what files.json holds.

    Args:
        map_parts: where the parts of the work are done, each a range of units or a few output files; up to
            :data:`FEW_PARTS` of them are done here, because a process elsewhere takes longer to start.

    Raises:
        ImgbatchError: a unit file is missing or damaged, or holds other rows, named.
    """
    tries = _TRIES
    while not run.paths.is_finished():
        tries -= 1
        try:
            _write_output(run, map_parts)
        except FileNotFoundError:
            # Of two drivers at once, either may take the other's unfinished files for what a crash left.
            if not tries:
                raise
        except ImgbatchError:
            # The other one may have finished, and removed the units.
            if not run.paths.is_finished():
                raise
    is_current = run.run_id in {entry.run_id for entry in current.load(run.paths.out)}
    if not is_current or not storage.exists(run.paths.spark_py):  # the last of the scripts
        current.update(run.paths.out)
        failpoint("finalize.after_current")
        write_readers(run.paths)
    is_kept = run.plan.config.output.keep_units or not storage.exists(run.paths.units)
    if not is_kept and other_driver(run.paths) is None:  # a repair may be at work on them
        storage.remove(run.paths.units)
        failpoint("finalize.after_units")
    return storage.read_json(run.paths.files)


def _write_output(run: Run, map_parts: MapParts) -> None:
    files = _settled_layout(run, map_parts)
    failpoint("finalize.after_layout")
    parts = [part for group in group_files(run, files) for part in _spread(group)]
    entries = itertools.chain.from_iterable(_here_if_few(parts, map_parts)(write_files, run, parts))
    entry_of = {entry["path"]: entry for entry in entries}
    written = [entry_of[file.path] for file in files]
    failpoint("finalize.after_files")
    _remove_strays(run, files)
    failpoint("finalize.after_strays")
    storage.write_json(run.paths.classes, _classes(run))
    storage.write_json(
        run.paths.files,
        {
            "schema_version": SCHEMA_VERSION,
            "counts": count_statuses(written),
            "partition_types": {p.column: p.duckdb_type for p in run.partitions},
            "files": written,
        },
    )
    failpoint("finalize.after_record")
    storage.create_if_absent(run.paths.success, b"")
    failpoint("finalize.after_success")


def _settled_layout(run: Run, map_parts: MapParts) -> list[OutputFile]:
    if not storage.exists(run.paths.finalize):
        layout = {"files": [asdict(file) for file in _lay_out(run, map_parts)]}
        storage.create_if_absent(run.paths.finalize, storage.json_bytes(layout))
    return [OutputFile(**file) for file in storage.read_json(run.paths.finalize)["files"]]


def _lay_out(run: Run, map_parts: MapParts) -> Iterator[OutputFile]:
    """Which units make which file: each partition's rows in unit order, cut at units when a file is full."""
    num_units = run.plan.layout.num_units
    parts = [(first, min(first + COUNTED_UNITS, num_units)) for first in range(0, num_units, COUNTED_UNITS)]
    held: dict[tuple[str, str], PartitionUnits] = defaultdict(PartitionUnits)
    arrow_bytes: Counter[str] = Counter()
    stored_bytes = sum(info.size for info in storage.list_files(run.paths.rows, ".parquet"))
    for counts in _here_if_few(parts, map_parts)(count_units, run, parts):
        for key, unit_rows in counts.held.items():
            held[key].extend(unit_rows)
        arrow_bytes.update(counts.arrow_bytes)
        stored_bytes += counts.stored_bytes
    for kind in _kinds(run):
        if not any(key[0] == kind for key in held) and not (kind == PREDICTIONS and run.partitions):
            held[kind, ""] = PartitionUnits()  # an empty file, so that a reader finds the columns
    rows_of_kind: Counter[str] = Counter()
    for (kind, _), unit_rows in held.items():
        rows_of_kind[kind] += sum(unit_rows.rows)
    for kind, partition in sorted(held, key=lambda key: (KINDS.index(key[0]), key[1])):
        kind_bytes = stored_bytes * arrow_bytes[kind] // arrow_bytes.total()
        rows_per_file = _rows_per_file(run, kind_bytes, rows_of_kind[kind])
        for number, chunk in enumerate(held[kind, partition].cut(rows_per_file)):
            name = "/".join(filter(None, [kind, f"run_id={run.run_id}", partition, f"part-{number:05d}.parquet"]))
            ranges = chunk.ranges(PARTITION_RANGES if partition else num_units)
            yield OutputFile(name, kind, partition, ranges, sum(chunk.rows))


def _here_if_few(parts: Sequence[object], map_parts: MapParts) -> MapParts:
    return map_parts if len(parts) > FEW_PARTS else in_threads


@dataclass(frozen=True)
class UnitCounts:
    """What some units hold."""

    held: dict[tuple[str, str], PartitionUnits]
    """By kind and partition."""
    arrow_bytes: dict[str, int]
    """By kind, in memory."""
    stored_bytes: int
    """Of the unit files."""


def count_units(run: Run, units: tuple[int, int]) -> UnitCounts:
    """What the units from the first up to the second index hold: a part of the layout, for :class:`MapParts`."""
    storage.configure(run.config.storage)
    held: dict[tuple[str, str], PartitionUnits] = defaultdict(PartitionUnits)
    arrow_bytes: Counter[str] = Counter()
    stored_bytes = 0
    for unit, results, rows, size in _iter_units(run, range(*units)):
        stored_bytes += size
        for kind, table in _split(run, results, rows).items():
            arrow_bytes[kind] += table.nbytes
            paths = partition_paths(table, run.partitions if kind == PREDICTIONS else (), _date(run))
            counts = Counter(paths.indices.to_pylist())
            for index, path in enumerate(paths.dictionary.to_pylist()):
                held[kind, path].add(unit.index, counts[index])
    return UnitCounts(dict(held), dict(arrow_bytes), stored_bytes)


def _rows_per_file(run: Run, kind_bytes: int, num_rows: int) -> int:
    """Rows that fill an output file, where ``num_rows`` take ``kind_bytes``."""
    bytes_per_row = max(1, kind_bytes // max(1, num_rows))
    return max(1, run.plan.config.output.target_file_mb * 10**6 // bytes_per_row)


def _kinds(run: Run) -> tuple[str, ...]:
    return KINDS if run.plan.config.output.embeddings else (PREDICTIONS, ERRORS)


class _UnitRows(NamedTuple):
    unit: Unit
    results: pa.Table
    rows: pa.Table
    stored_bytes: int


def _iter_units(run: Run, indices: Sequence[int]) -> Iterator[_UnitRows]:
    """Units with the manifest's rows, in the order of ``indices``; files of an object store are read ahead."""
    reader = RowsReader(run.paths)
    read = partial(_read_unit, run)
    is_near = storage.is_local(run.paths.out)
    files = map(read, indices) if is_near else map_ahead(read, indices, threads=READERS, ahead=2 * READERS)
    try:
        for index, (results, stored_bytes) in zip(indices, files, strict=True):
            unit = run.plan.layout.unit(index)
            rows = reader.read(unit)
            if not results[ROW_ID].equals(rows[ROW_ID]):
                raise ImgbatchError(
                    f"unit file {run.paths.unit_file(index)}: holds other rows than the run planned; remove it and run "
                    f"the same command again"
                )
            yield _UnitRows(unit, results, rows, stored_bytes)
    finally:
        reader.close()


def _read_unit(run: Run, index: int) -> tuple[pa.Table, int]:
    """The unit's results, and the size of its file."""
    uri = run.paths.unit_file(index)
    try:
        data = storage.read_bytes(uri)
        table = pq.read_table(pa.BufferReader(data), use_threads=False)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise ImgbatchError(
            f"unit file {uri}: missing or damaged ({error}); remove it and run the same command again"
        ) from error
    except OSError as error:  # as when credentials have expired: the file may be whole
        raise ImgbatchError(
            f"unit file {uri}: cannot be read ({error}); put it right and run the same command again"
        ) from error
    return table.cast(UNIT_SCHEMA), len(data)


def _split(run: Run, results: pa.Table, rows: pa.Table) -> dict[str, pa.Table]:
    """A unit's rows as output rows of each kind; a kind without rows is left out."""
    ok = pc.equal(results["status"], Status.OK.value)
    masks = {PREDICTIONS: ok, ERRORS: pc.invert(ok), EMBEDDINGS: ok}
    tables = {
        kind: _output_rows(run, kind, rows.filter(masks[kind]), results.filter(masks[kind])) for kind in _kinds(run)
    }
    return {kind: table for kind, table in tables.items() if table.num_rows}


def _output_rows(run: Run, kind: str, rows: pa.Table, results: pa.Table) -> pa.Table:
    """Rows and their results with the columns of ``kind``."""
    if kind == PREDICTIONS:
        return _join(rows, results.select(PREDICTION_COLUMNS), run)
    if kind == ERRORS:
        return _join(rows, results.select(ERROR_COLUMNS), None)
    table = rows.select([ROW_ID, IMAGE_ID])
    for name in EMBEDDING_COLUMNS:
        table = table.append_column(results.schema.field(name), results[name])
    return table


def _join(rows: pa.Table, outcome: pa.Table, run: Run | None) -> pa.Table:
    identity = [ROW_ID, IMAGE_ID, URI]
    table = rows.select(identity).set_column(2, rows.schema.field(URI), without_secrets(rows[URI]))
    for name in outcome.column_names:
        table = table.append_column(outcome.schema.field(name), outcome[name])
    if run is not None:
        predicted_at = pa.scalar(datetime.fromisoformat(run.plan.predicted_at), PREDICTED_AT_TYPE)
        table = table.append_column("model_id", pa.repeat(pa.scalar(run.bundle.model_id), rows.num_rows))
        table = table.append_column("predicted_at", pa.repeat(predicted_at, rows.num_rows))
    for name in rows.column_names[len(identity) :]:
        table = table.append_column(rows.schema.field(name), rows[name])
    return table


def output_schema(run: Run, kind: str) -> pa.Schema:
    """The one schema of the files of ``kind``: partition columns left out, metadata for readers."""
    reader = RowsReader(run.paths)
    rows = reader.schema.empty_table()
    reader.close()
    table = _output_rows(run, kind, rows, UNIT_SCHEMA.empty_table())
    if kind == PREDICTIONS:
        table = _drop_partition_columns(table, run)
    metadata = {
        "imgbatch.schema_version": SCHEMA_VERSION,
        "imgbatch.run_id": run.run_id,
        "imgbatch.classes": storage.json_bytes(_classes(run)),
    }
    carried = (rows.schema.metadata or {}) if kind != EMBEDDINGS else {}
    return table.schema.with_metadata({**carried, **metadata})


def _drop_partition_columns(table: pa.Table, run: Run) -> pa.Table:
    return table.drop_columns([p.column for p in run.partitions if p.column in table.column_names])


def _classes(run: Run) -> dict[str, Any]:
    return {
        "task": run.bundle.task,
        "model_id": run.bundle.model_id,
        "class_names": list(run.bundle.class_names),
    }


def _date(run: Run) -> str:
    return run.plan.predicted_at[:10]


class FilesToWrite(NamedTuple):
    """Output files that are written in one pass over their units."""

    files: list[OutputFile]
    group_size: int
    """Files of the group that these are part of, which settles their row groups."""


def group_files(run: Run, files: list[OutputFile]) -> list[list[OutputFile]]:
    """Files whose row groups share a memory: those of partitions, which may share units too."""
    size = OPEN_FILES if run.partitions else 1
    files = sorted(files, key=lambda file: file.units[:1])  # near each other, where a partition is no matter of chance
    return [files[first : first + size] for first in range(0, len(files), size)]


def _spread(group: list[OutputFile]) -> list[FilesToWrite]:
    """The files of a large group one by one, where no unit is of two files of a kind: as where all have one date."""
    spans: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for file in group:
        if file.units:
            spans[file.kind].append((file.units[0][0], file.units[-1][1]))
    is_apart = all(
        last < first for ordered in map(sorted, spans.values()) for (_, last), (first, _) in itertools.pairwise(ordered)
    )
    is_large = any(sum(last - first + 1 for first, last in of_kind) > COUNTED_UNITS for of_kind in spans.values())
    parts = [[file] for file in group] if is_apart and is_large else [group]
    return [FilesToWrite(files, len(group)) for files in parts]


def write_files(run: Run, part: FilesToWrite) -> list[dict[str, Any]]:
    """Write some output files in one pass over their units, for :class:`MapParts`; what files.json says of each."""
    files = part.files
    storage.configure(run.config.storage)
    schemas = {kind: output_schema(run, kind) for kind in _kinds(run)}
    limit = min(MAX_ROW_GROUP_BYTES, BUFFERED_BYTES // part.group_size)
    with ExitStack() as stack:
        writers = {
            file.path: stack.enter_context(OutputFileWriter(run.paths.out, file, schemas[file.kind], limit))
            for file in files
        }
        by_unit: dict[int, list[OutputFile]] = defaultdict(list)
        for file in files:
            for index in file.unit_indices():
                by_unit[index].append(file)
        for unit, results, rows, _ in _iter_units(run, sorted(by_unit)):
            for kind, table in _split(run, results, rows).items():
                wanted = {file.partition: file for file in by_unit[unit.index] if file.kind == kind}
                for partition, part in _by_partition(run, kind, table, wanted):
                    writers[wanted[partition].path].add(part)
    return [writer.entry() for writer in writers.values()]


def _by_partition(run: Run, kind: str, table: pa.Table, wanted: Collection[str]) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each of the wanted partitions that has some."""
    if kind != PREDICTIONS or not run.partitions:
        if "" in wanted:
            yield "", table
        return
    paths = partition_paths(table, run.partitions, _date(run))
    columns = _drop_partition_columns(table, run)
    for index, path in enumerate(paths.dictionary.to_pylist()):
        if path in wanted:
            yield path, columns.filter(pc.equal(paths.indices, index))


def count_statuses(written: list[dict[str, Any]]) -> dict[str, int]:
    """Rows by status, of the files that files.json lists."""
    total: Counter[str] = Counter()
    for entry in written:
        if entry["kind"] != EMBEDDINGS:
            total.update(entry["counts"])
    return dict(sorted(total.items()))


def _remove_strays(run: Run, files: list[OutputFile]) -> None:
    """Remove what an earlier, interrupted finalize left under the run's own directories, and uploads of days ago."""
    for uri in find_strays(run.paths, {file.path for file in files}):
        storage.remove(uri)
    for name in (*KINDS, "runs"):  # of every run: nobody looks again at what this one leaves behind
        storage.remove_left_uploads(storage.join(run.paths.out, name))
