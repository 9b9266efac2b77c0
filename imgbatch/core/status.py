"""The state of an output's runs, read from storage alone."""

from __future__ import annotations

from typing import Any

from imgbatch.core import storage
from imgbatch.core.runs import RunEntry, is_alive, list_runs
from imgbatch.errors import UsageError


def run_states(out: str) -> list[dict[str, Any]]:
    """One record per run, oldest first; raises :class:`UsageError` where there is none."""
    runs = list_runs(out)
    if not runs:
        raise UsageError(f"{out}: no run there")
    return [_state(run) for run in runs]


def _state(run: RunEntry) -> dict[str, Any]:
    num_units = run.plan["num_units"]
    log = storage.read_json(run.paths.run_json) if storage.exists(run.paths.run_json) else {}
    if run.finished:
        state, units_done, counts = "finished", num_units, storage.read_json(run.paths.files)["counts"]
    else:
        running = is_alive(run.paths)
        state = "abandoned" if run.abandoned else "running" if running else log.get("state", "unfinished")
        units_done, counts = len(run.paths.committed_units(num_units)), None
    return {
        "run_id": run.run_id,
        "parent": run.parent,
        "state": state,
        "num_rows": run.plan["num_rows"],
        "num_units": num_units,
        "units_done": units_done,
        "counts": counts,
        "images_per_s": log.get("images_per_s"),
        "predicted_at": run.plan["predicted_at"],
    }
