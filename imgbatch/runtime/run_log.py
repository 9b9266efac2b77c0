"""``run.json``: what a run was, what it took, and what it ran on; kept up over every command that worked on it."""

from __future__ import annotations

import platform
import socket
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from imgbatch import __version__
from imgbatch.core import storage
from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt
from imgbatch.core.runs import utc_now
from imgbatch.runtime.pools import this_machine

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow", "numpy")


class RunLog:
    """Collects one command's work on a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stage_seconds: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._deferred = set(self.deferred_before())
        self._suspects = set(self.suspects_before())
        self._session: dict[str, Any] = {
            "engine": run.config.classify.engine,
            "pools": None,
            "started_at": utc_now(),
            "engine_ready_at": None,
            "finished_at": None,
            "units": 0,
            "rows": 0,
            "passes": 0,
            "isolated_units": 0,
            "host": socket.gethostname(),
            "config": run.config.model_dump(mode="json"),
        }

    def deferred_before(self) -> list[int]:
        """Units that the command before left uncommitted because too many of their rows failed."""
        earlier = _earlier_sessions(self._run)
        return earlier[-1].get("deferred_units", []) if earlier else []

    def suspects_before(self) -> list[int]:
        """Units that were under way when the engine stopped, in the commands before, and that did not come since."""
        earlier = _earlier_sessions(self._run)
        return earlier[-1].get("suspect_units", []) if earlier else []

    def suspect(self, units: Iterable[int]) -> None:
        """Units for the next command to be careful with, unless they come in this one."""
        self._suspects.update(units)

    def engine_described(self, pools: str) -> None:
        self._session["pools"] = pools

    def pass_started(self) -> None:
        self._session["passes"] += 1

    def add(self, receipt: Receipt) -> None:
        self._stage_seconds.update(receipt.seconds)
        # The engine is ready when the first unit is begun, which is before every actor is up: never too late.
        ready_at = datetime.fromtimestamp(receipt.started_at, UTC).isoformat(timespec="microseconds")
        self._session["engine_ready_at"] = min(ready_at, self._session["engine_ready_at"] or ready_at)
        self._session["isolated_units"] += receipt.isolated
        self._suspects.discard(receipt.unit)
        if receipt.outcome == "deferred":
            self._deferred.add(receipt.unit)
        else:
            self._deferred.discard(receipt.unit)
            self._session["units"] += 1
            self._session["rows"] += receipt.num_rows
            self._counts.update(receipt.counts)

    def write(self, state: str) -> dict[str, Any]:
        """Write run.json with this command's work added; ``state``: finished, interrupted, failed, error_budget."""
        run, session = self._run, self._session
        session["finished_at"] = utc_now()
        session["stage_seconds"] = {stage: round(s, 3) for stage, s in self._stage_seconds.items()}
        session["counts"] = dict(self._counts)
        # What looked like an outage is judged anew by the next command.
        session["deferred_units"] = [] if state == "error_budget" else sorted(self._deferred)
        session["suspect_units"] = sorted(self._suspects)
        session["images_per_s"] = _rate(session)
        sessions = [*_earlier_sessions(run), session]
        record = {
            "run_id": run.run_id,
            "parent": run.plan.parent,
            "state": state,
            "num_rows": run.plan.layout.num_rows,
            "num_units": run.plan.layout.num_units,
            "unit_rows": run.plan.layout.unit_rows,
            "model": {"path": run.bundle.path, "model_id": run.bundle.model_id, "arch": run.bundle.arch},
            "preprocess": run.spec.describe(),
            "device": run.plan.device,
            **run.backend.fields,
            "predicted_at": run.plan.predicted_at,
            "started_at": sessions[0]["started_at"],
            "engine_ready_at": session["engine_ready_at"],
            "finished_at": session["finished_at"],
            "images_per_s": session["images_per_s"],
            "stage_seconds": _summed(sessions),
            "sessions": sessions,
            "machine": {
                "cpus": this_machine().num_cpus,
                "gpus": this_machine().num_gpus,
                "system": platform.platform(),
            },
            "versions": {"imgbatch": __version__, "python": platform.python_version(), **_versions()},
        }
        storage.write_json(run.paths.run_json, record)
        return record


def _rate(session: dict[str, Any]) -> float | None:
    """Rows per second from the moment the engine was ready; none where nothing was done."""
    if session["engine_ready_at"] is None or session["rows"] == 0:
        return None
    ready, finished = (datetime.fromisoformat(session[key]) for key in ("engine_ready_at", "finished_at"))
    return round(session["rows"] / max(1e-6, (finished - ready).total_seconds()), 2)


def _earlier_sessions(run: Run) -> list[dict[str, Any]]:
    if not storage.exists(run.paths.run_json):
        return []
    return storage.read_json(run.paths.run_json)["sessions"]


def _summed(sessions: list[dict[str, Any]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for session in sessions:
        total.update(session["stage_seconds"])
    return {stage: round(s, 3) for stage, s in total.items()}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}
