"""Verification: reads back what was written and holds it against the rows that were planned.

With DuckDB rather than with the code that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import duckdb

from imgbatch.core import current, storage
from imgbatch.core.database import spilling
from imgbatch.core.output_files import EMBEDDINGS, ERRORS, PREDICTIONS, find_strays
from imgbatch.core.runs import RunEntry, find_run, list_runs
from imgbatch.errors import Status, UsageError, normalise_message

_MEMORY_MB = 1000


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold of a run."""

    run_id: str
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What was checked of a run and its retries."""

    checks: list[Check]
    counts: dict[str, dict[str, int]]
    """Rows by status in the output files, per run; of a run whose files are not what files.json lists, nothing."""

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def verify(out: str, run_id: str | None = None) -> VerifyResult:
    """Check that every row of a run, and of its retries, came out exactly once and that its files are intact.

    Args:
        run_id: a run; none: the newest that is no retry.
    """
    chain = run_chain(out, run_id)
    checks: list[Check] = []
    counts: dict[str, dict[str, int]] = {}
    for run in chain:
        if not run.finished:
            done = len(run.paths.committed_units(run.plan["num_units"]))
            detail = f"unfinished: {done} of {run.plan['num_units']} units; run the same command again to continue"
            # Until a retry has finished, its rows are errors of the run before.
            checks.append(Check(run.run_id, "finished", run is not chain[0], detail))
            continue
        try:
            checks += _check_current(run)
            checks += _check_files(run)
            if all(check.ok for check in checks if check.run_id == run.run_id):
                with spilling(run.paths.out, memory_mb=_MEMORY_MB) as connection:
                    checks += _check_rows(connection, run, next((r for r in chain if r.run_id == run.parent), None))
                    counts[run.run_id] = _count_statuses(connection, run)
                checks += _check_counts(run, counts[run.run_id])
        except (FileNotFoundError, ValueError, KeyError, duckdb.Error) as error:
            checks.append(Check(run.run_id, "records", False, f"cannot be read: {normalise_message(error)}"))
    return VerifyResult(checks, counts)


def run_chain(out: str, run_id: str | None = None) -> list[RunEntry]:
    """A run and its retries; none: the newest that is no retry. Raises :class:`UsageError` where there is none."""
    root = _root(out, run_id)
    return [root, *_descendants(root, list_runs(out))]


def _root(out: str, run_id: str | None) -> RunEntry:
    if run_id is not None:
        return find_run(out, run_id)
    roots = [run for run in list_runs(out) if run.parent is None and not run.abandoned]
    if not roots:
        raise UsageError(f"{out}: no run there")
    return roots[-1]


def _descendants(root: RunEntry, runs: list[RunEntry]) -> Iterator[RunEntry]:
    for run in runs:
        if run.parent == root.run_id and not run.abandoned:
            yield run
            yield from _descendants(run, runs)


def _check_current(run: RunEntry) -> Iterator[Check]:
    if run.run_id not in {entry.run_id for entry in current.load(run.paths.out)}:
        detail = "the run is not in current.json, so no reader sees it; imgbatch repair puts it there"
        yield Check(run.run_id, "current", False, detail)


def _check_files(run: RunEntry) -> Iterator[Check]:
    listed = storage.read_json(run.paths.files)["files"]
    for file in listed:
        uri = storage.join(run.paths.out, file["path"])
        try:
            found = storage.sha256(uri)
        except FileNotFoundError:
            yield Check(run.run_id, "sha256", False, f"{file['path']}: missing")
            continue
        if found != file["sha256"]:
            yield Check(run.run_id, "sha256", False, f"{file['path']}: content differs from files.json")
    for uri in find_strays(run.paths, {file["path"] for file in listed}):
        yield Check(run.run_id, "listing", False, f"{uri}: not in files.json")
    yield Check(run.run_id, "files", True, f"{len(listed)} files, {sum(f['bytes'] for f in listed):,} bytes")


def check_rows(run: RunEntry, parent: RunEntry | None) -> Iterator[Check]:
    """Hold the rows in a run's files against those that were planned, and a retry's against its parent's errors."""
    with spilling(run.paths.out, memory_mb=_MEMORY_MB) as connection:
        yield from _check_rows(connection, run, parent)


def _check_rows(connection: duckdb.DuckDBPyConnection, run: RunEntry, parent: RunEntry | None) -> Iterator[Check]:
    def number(query: str) -> int:
        row = connection.execute(query).fetchone()
        return int(row[0]) if row else 0

    listed = storage.read_json(run.paths.files)["files"]
    connection.execute(f"create view planned as select row_id from {_parquet([_rows_glob(run)])}")
    of_kind = {kind: [file for file in listed if file["kind"] == kind] for kind in (PREDICTIONS, EMBEDDINGS)}
    outcomes = [file for file in listed if file["kind"] != EMBEDDINGS]
    connection.execute(f"create view written as {_row_ids(run, outcomes)}")
    num_planned, num_written = number("select count(*) from planned"), number("select count(*) from written")
    num_distinct = number("select count(distinct row_id) from written")
    missing = number("select count(*) from planned anti join written using (row_id)")
    unknown = number("select count(*) from written anti join planned using (row_id)")
    yield Check(run.run_id, "rows", num_planned == num_written, f"{num_written:,} of {num_planned:,} rows")
    yield Check(run.run_id, "distinct", num_distinct == num_written, f"{num_distinct:,} distinct row_ids")
    yield Check(run.run_id, "missing", missing == 0, f"{missing:,} planned rows without an outcome")
    yield Check(run.run_id, "unknown", unknown == 0, f"{unknown:,} rows that were not planned")
    if of_kind[EMBEDDINGS]:
        predicted, embedded = (f"({_row_ids(run, of_kind[kind])})" for kind in (PREDICTIONS, EMBEDDINGS))
        unpaired = number(
            f"select count(*) from (({predicted} except all {embedded}) union all ({embedded} except all {predicted}))"
        )
        yield Check(run.run_id, "embeddings", unpaired == 0, f"{unpaired:,} predictions and embeddings without a pair")
    if parent is not None:
        failed = [file for file in storage.read_json(parent.paths.files)["files"] if file["kind"] == ERRORS]
        connection.execute(f"create view failed as {_row_ids(parent, failed)}")
        strays = number("select count(*) from planned anti join failed using (row_id)")
        yield Check(run.run_id, "retry", strays == 0, f"{strays:,} rows that had not failed in {parent.run_id}")


def _count_statuses(connection: duckdb.DuckDBPyConnection, run: RunEntry) -> dict[str, int]:
    """Rows by status, as the output files hold them."""
    listed = storage.read_json(run.paths.files)["files"]
    counts: dict[str, int] = {}
    for kind, status in ((PREDICTIONS, f"'{Status.OK.value}'"), (ERRORS, "status")):
        uris = [storage.join(run.paths.out, file["path"]) for file in listed if file["kind"] == kind]
        if uris:
            counts.update(connection.execute(f"select {status}, count(*) from {_parquet(uris)} group by 1").fetchall())
    return dict(sorted(counts.items()))


def _check_counts(run: RunEntry, counts: dict[str, int]) -> Iterator[Check]:
    recorded = storage.read_json(run.paths.files)["counts"]
    differing = sorted(name for name in recorded.keys() | counts if recorded.get(name, 0) != counts.get(name, 0))
    if differing:
        said = (f"{counts.get(name, 0):,} {name} where files.json has {recorded.get(name, 0):,}" for name in differing)
        yield Check(run.run_id, "statuses", False, ", ".join(said))


def _rows_glob(run: RunEntry) -> str:
    return storage.join(run.paths.rows, "*.parquet")


def _row_ids(run: RunEntry, files: list[dict[str, str]]) -> str:
    uris = [storage.join(run.paths.out, file["path"]) for file in files]
    return f"select row_id from {_parquet(uris)}" if uris else "select null::bigint as row_id where false"


def _parquet(uris: list[str]) -> str:
    quoted = ", ".join("'" + uri.replace("'", "''") + "'" for uri in uris)
    return f"read_parquet([{quoted}], hive_partitioning=false)"
