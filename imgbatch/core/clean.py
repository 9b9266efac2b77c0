"""Removing runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imgbatch.core import current, storage
from imgbatch.core.output_files import KINDS
from imgbatch.core.runs import RunEntry, find_run, is_alive, list_runs, refuse_if_alive
from imgbatch.errors import UsageError


def remove_run(out: str, run_id: str) -> None:
    """Remove a run's labels, errors and records; what readers see changes first, so that nothing dangles.

    Raises:
        UsageError: no such run, another run retries it, or a driver works on it.
    """
    run = find_run(out, run_id)
    retries = [other.run_id for other in list_runs(out) if other.parent == run_id]
    if retries:
        raise UsageError(f"--run {run_id}: {', '.join(retries)} retries it; remove that first")
    refuse_if_alive(run.paths)
    # First, so that no command continues what is left of it where this one is cut off.
    storage.create_if_absent(run.paths.abandoned, b"")
    storage.remove(run.paths.success)
    current.update(out)
    _remove_files(run)


@dataclass(frozen=True)
class AbandonedRun:
    """An unfinished run that another one was started in place of: nothing continues it, and no reader sees it."""

    run: RunEntry
    num_bytes: int
    """Of everything that it wrote."""


def abandoned_runs(out: str) -> list[AbandonedRun]:
    """Those of an output, oldest first, but for one that a driver is at work on all the same.

    Raises:
        UsageError: no run there.
    """
    runs = list_runs(out)
    if not runs:
        raise UsageError(f"{out}: no run there")
    return [AbandonedRun(run, _num_bytes(run)) for run in _abandoned(runs)]


def remove_abandoned(out: str, run_ids: Sequence[str]) -> list[str]:
    """Remove those of the runs that are abandoned still; returns which they were."""
    runs = [run for run in _abandoned(list_runs(out)) if run.run_id in run_ids]
    for run in runs:
        _remove_files(run)
    return [run.run_id for run in runs]


def _abandoned(runs: Sequence[RunEntry]) -> list[RunEntry]:
    retried = {run.parent for run in runs}
    # A driver that was cut off when its run was abandoned may have come back, and finished it.
    return [
        run
        for run in runs
        if run.abandoned and not run.finished and run.run_id not in retried and not is_alive(run.paths)
    ]


def _directories(run: RunEntry) -> list[str]:
    """What the run wrote."""
    return [*(run.paths.data(kind) for kind in KINDS), run.paths.root]


def _num_bytes(run: RunEntry) -> int:
    return sum(info.size for directory in _directories(run) for info in storage.iter_files(directory))


def _remove_files(run: RunEntry) -> None:
    """Remove what the run wrote: its plan when nothing else is left, because without it nobody knows of the rest."""
    *data, root = _directories(run)
    last = [run.paths.plan, run.paths.abandoned]
    records = [uri for name in sorted(storage.list_names(root)) if (uri := storage.join(root, name)) not in last]
    for uri in [*data, *records, *last, root]:
        storage.remove(uri)
    for directory in _directories(run):
        storage.remove_left_uploads(directory, older_than_s=0)
