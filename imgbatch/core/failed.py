"""Rows that failed and have no prediction yet, and the runs whose retry is to classify them again."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.core import storage
from imgbatch.core.database import connect
from imgbatch.core.runs import RunEntry, find_run, list_runs
from imgbatch.core.views import open_views

_LEFT_OVER = """
with roots as (select unnest($runs::varchar[]) as run_id, unnest($roots::varchar[]) as root),
failed as (
    select e.row_id, e.image_id, roots.root, runs.run_id, runs.predicted_at as failed_at
    from all_errors e join runs using (run_id) join roots using (run_id)
)
select root, row_id from failed
where not exists (
    select 1 from all_predictions p where p.image_id = failed.image_id and p.predicted_at > failed.failed_at
)
qualify rank() over (partition by image_id order by failed_at desc, run_id desc) = 1
order by row_id
"""
"""The view ``errors``, by the runs that are no retries, and with every row of an image that stands twice in a run."""


@dataclass(frozen=True)
class FailedRun:
    """A finished run, no retry itself, with rows for a retry."""

    run: RunEntry
    row_ids: pa.Array
    """What a retry of it is to classify, in order."""

    @property
    def run_id(self) -> str:
        return self.run.run_id


def find_retried(out: str, run_id: str | None = None) -> RunEntry:
    """The run that a retry is of: the one named, else that of an unfinished retry, else the newest that is no retry.

    Raises:
        UsageError: there is none.
    """
    if run_id is not None:
        return find_run(out, run_id)
    runs = list_runs(out)
    for run in runs:
        if run.parent is not None and not run.finished and not run.abandoned:
            return find_run(out, run.parent)
    roots = [run for run in runs if run.parent is None and not run.abandoned]
    return roots[-1] if roots else find_run(out)


def finished_retries(runs: Sequence[RunEntry], run_id: str) -> list[RunEntry]:
    """Those among ``runs``, which are all of the output."""
    return [run for run in runs if run.parent == run_id and run.finished]


def failed_rows(out: str, parent: RunEntry) -> pa.Array:
    """row_ids that a retry of ``parent`` is for, in order: those of an unfinished one, which is to be continued, else
    of the error rows that no retry has turned into a prediction."""
    runs = list_runs(out)
    if unfinished := _unfinished_retry(runs, parent.run_id):
        return _planned_rows(unfinished)
    with contextlib.closing(open_views(out)) as connection:
        found = connection.sql(
            "select row_id from all_errors where run_id = ? and row_id not in "
            "(select row_id from all_predictions where run_id in (select unnest(?::varchar[]))) order by row_id",
            params=[parent.run_id, [run.run_id for run in finished_retries(runs, parent.run_id)]],
        )
        return found.to_arrow_table()["row_id"].combine_chunks()


def failed_runs(out: str) -> list[FailedRun]:
    """The finished runs with failed rows whose image has no prediction in a later run.

    An image that failed in several runs is left to the newest of them. Runs with an unfinished retry come first, with
    the rows of that, then what was tried the longest ago: a command that was interrupted goes on with what is left.

    Raises:
        UsageError: no finished run there.
    """
    runs = list_runs(out)
    root_of = _roots(runs)
    with contextlib.closing(open_views(out)) as connection:
        parameters = {"runs": [*root_of], "roots": [*root_of.values()]}
        found = connection.sql(_LEFT_OVER, params=parameters).to_arrow_table()
    failed = []
    for run in runs:
        row_ids = found.filter(pc.equal(found["root"], run.run_id))["row_id"].combine_chunks()
        if len(row_ids):
            unfinished = _unfinished_retry(runs, run.run_id)
            tried = [each.plan["predicted_at"] for each in runs if root_of.get(each.run_id) == run.run_id]
            turn = (unfinished is None, max(tried))
            failed.append((turn, FailedRun(run, _planned_rows(unfinished) if unfinished else row_ids)))
    return [each for _, each in sorted(failed, key=lambda item: item[0])]


def _roots(runs: Sequence[RunEntry]) -> dict[str, str]:
    """Each finished run to the one that it is, in the end, a retry of."""
    parent_of = {run.run_id: run.parent for run in runs if run.finished}
    roots = {}
    for run_id in parent_of:
        root = run_id
        while (parent := parent_of[root]) in parent_of:
            root = parent
        roots[run_id] = root
    return roots


def _unfinished_retry(runs: Sequence[RunEntry], run_id: str) -> RunEntry | None:
    return next((run for run in runs if run.parent == run_id and not (run.finished or run.abandoned)), None)


def _planned_rows(run: RunEntry) -> pa.Array:
    with contextlib.closing(connect(run.paths.rows)) as connection:
        files = storage.join(run.paths.rows, "*.parquet")
        found = connection.sql("select row_id from read_parquet(?) order by row_id", params=[files])
        return found.to_arrow_table()["row_id"].combine_chunks()
