"""Removing a run."""

from __future__ import annotations

from imgbatch.core import current, storage
from imgbatch.core.output_files import KINDS
from imgbatch.core.runs import find_run, list_runs
from imgbatch.errors import UsageError


def remove_run(out: str, run_id: str) -> None:
    """Remove a run's labels, errors and records; what readers see changes first, so that nothing dangles.

    Raises:
        UsageError: no such run, or another run retries it.
    """
    run = find_run(out, run_id)
    retries = [other.run_id for other in list_runs(out) if other.parent == run_id]
    if retries:
        raise UsageError(f"--run {run_id}: {', '.join(retries)} retries it; remove that first")
    storage.remove(run.paths.success)
    current.update(out)
    for kind in KINDS:
        storage.remove(run.paths.data(kind))
        storage.remove_left_uploads(run.paths.data(kind), older_than_s=0)
    storage.remove(run.paths.root)
