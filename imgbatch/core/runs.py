"""Where a run's files stand, which runs an output holds, and which of them a command means."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from imgbatch.core import storage
from imgbatch.core.failpoints import failpoint
from imgbatch.core.parallel import map_ahead
from imgbatch.errors import UsageError

_log = logging.getLogger("imgbatch")

HEARTBEAT_EVERY_S = 10.0
HEARTBEAT_STALE_S = 60.0
_READERS = 16
"""Runs whose records are read at once."""
_STEM_DIGITS = 4
"""Unit files whose numbers differ in the last so many digits only are listed together."""


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The names of one run's files under an output directory."""

    out: str
    """Made absolute, so that names of files are those that a listing gives, however the directory was written."""
    run_id: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", storage.absolute(self.out))

    def _of_run(self, *parts: str) -> str:
        return storage.join(self.out, "runs", self.run_id, *parts)

    @property
    def root(self) -> str:
        return self._of_run()

    @property
    def plan(self) -> str:
        return self._of_run("plan.json")

    @property
    def rows(self) -> str:
        return self._of_run("rows")

    def rows_file(self, index: int) -> str:
        return self._of_run("rows", f"part-{index:05d}.parquet")

    @property
    def units(self) -> str:
        return self._of_run("units")

    def unit_file(self, index: int) -> str:
        return self._of_run("units", f"unit-{index:08d}.parquet")

    @property
    def finalize(self) -> str:
        return self._of_run("finalize.json")

    @property
    def files(self) -> str:
        return self._of_run("files.json")

    @property
    def run_json(self) -> str:
        return self._of_run("run.json")

    @property
    def classes(self) -> str:
        return self._of_run("classes.json")

    @property
    def query_sql(self) -> str:
        return self._of_run("query.sql")

    @property
    def query_py(self) -> str:
        return self._of_run("query.py")

    @property
    def spark_py(self) -> str:
        return self._of_run("spark.py")

    @property
    def report(self) -> str:
        return self._of_run("report.html")

    @property
    def explanations(self) -> str:
        """The directory of heat maps that ``explain`` drew for the report."""
        return self._of_run("explanations")

    @property
    def success(self) -> str:
        return self._of_run("_SUCCESS")

    @property
    def abandoned(self) -> str:
        return self._of_run("_ABANDONED")

    @property
    def heartbeat(self) -> str:
        return self._of_run("heartbeat.json")

    def data(self, kind: str) -> str:
        """The run's directory under ``predictions``, ``errors`` or ``embeddings``."""
        return storage.join(self.out, kind, f"run_id={self.run_id}")

    def is_finished(self) -> bool:
        return storage.exists(self.success)

    def committed_units(self, num_units: int) -> set[int]:
        """Indices of the units whose file is there, of the ``num_units`` that the run has."""
        stems = [f"unit-{first:08d}"[:-_STEM_DIGITS] for first in range(0, num_units, 10**_STEM_DIGITS)]
        return {
            int(name.removeprefix("unit-").removesuffix(".parquet"))
            for name in storage.list_stems(self.units, stems)
            if name.endswith(".parquet")
        }


@dataclass(frozen=True, slots=True)
class RunEntry:
    """One run of an output, as its plan says."""

    paths: RunPaths
    plan: Mapping[str, Any]
    finished: bool
    abandoned: bool

    @property
    def run_id(self) -> str:
        return self.paths.run_id

    @property
    def parent(self) -> str | None:
        return self.plan.get("parent")


def list_runs(out: str) -> list[RunEntry]:
    """Every run of ``out``, oldest plan first."""
    run_ids = storage.list_names(storage.join(out, "runs"))
    found = map_ahead(partial(_read_entry, out), sorted(run_ids), threads=_READERS, ahead=2 * _READERS)
    entries = [entry for entry in found if entry is not None]
    return sorted(entries, key=lambda entry: (entry.plan["predicted_at"], entry.run_id))


def _read_entry(out: str, run_id: str) -> RunEntry | None:
    """The run, in two requests; none where there is no plan."""
    paths = RunPaths(out, run_id)
    names = storage.list_names(paths.root)
    if _name(paths.plan) not in names:
        return None
    try:
        plan = storage.read_json(paths.plan)
    except (OSError, ValueError) as error:
        raise UsageError(f"{paths.plan}: not a readable plan ({error}); remove that run's directory") from error
    return RunEntry(paths, plan, _name(paths.success) in names, _name(paths.abandoned) in names)


def _name(uri: str) -> str:
    return uri.rsplit("/", 1)[1]


def find_run(out: str, run_id: str | None = None) -> RunEntry:
    """The run named ``run_id``, or the newest that was not abandoned; raises :class:`UsageError`."""
    runs = list_runs(out)
    if run_id is not None:
        for entry in runs:
            if entry.run_id == run_id:
                return entry
        known = ", ".join(entry.run_id for entry in runs) or "none"
        raise UsageError(f"--run {run_id}: no such run in {out}; there are: {known}")
    candidates = [entry for entry in runs if not entry.abandoned]
    if not candidates:
        raise UsageError(f"{out}: no run there; `imgbatch classify -o {out}` makes one")
    return candidates[-1]


def choose_run_id(
    out: str, fingerprint: str, fields: Mapping[str, Any], *, new_run: bool, abandon: bool, parent: str | None = None
) -> str:
    """:func:`run_id_of`, once no unfinished run stands in the way; those that do may be marked as abandoned.

    Raises:
        UsageError: an unfinished run differs, and the message names the fields; or it is being worked on.
    """
    runs = list_runs(out)
    for entry in runs_in_the_way(runs, fingerprint, parent=parent):
        if not abandon:
            raise UsageError(why_in_the_way(out, entry, fields))
        refuse_if_alive(entry.paths)
        storage.create_if_absent(entry.paths.abandoned, b"")
    return run_id_of(runs, fingerprint, new_run=new_run, parent=parent)


def run_id_of(runs: Sequence[RunEntry], fingerprint: str, *, new_run: bool, parent: str | None = None) -> str:
    """The id of the run that a command with this fingerprint continues or starts.

    The newest run with the same fingerprint is continued, or done; ``new_run`` starts another beside a finished
    one, with ``-2`` and so on after its id.

    Args:
        runs: every run of the output.
    """
    run_id = "r" + fingerprint[:12]
    taken = {entry.run_id for entry in runs}
    same = [entry for entry in _siblings(runs, parent) if entry.plan["fingerprint"] == fingerprint]
    if not same:
        return run_id if run_id not in taken else _next_id(run_id, taken)
    newest = max(same, key=lambda entry: (len(entry.run_id), entry.run_id))
    return _next_id(run_id, taken) if newest.finished and new_run else newest.run_id


def runs_in_the_way(runs: Sequence[RunEntry], fingerprint: str, *, parent: str | None = None) -> list[RunEntry]:
    """Unfinished runs with another fingerprint, which stop a command unless it is to give them up."""
    return [
        entry for entry in _siblings(runs, parent) if not entry.finished and entry.plan["fingerprint"] != fingerprint
    ]


def why_in_the_way(out: str, entry: RunEntry, fields: Mapping[str, Any]) -> str:
    """One line about a run in the way of one with these ``fields`` of its fingerprint, and what to do about it."""
    differing = ", ".join(differing_fields(entry.plan["fields"], fields))
    return (
        f"output {out}: run {entry.run_id} is unfinished and was started with other settings ({differing}); "
        f"finish it with those, or give it up with --set run.on_unfinished=abandon"
    )


def _siblings(runs: Sequence[RunEntry], parent: str | None) -> list[RunEntry]:
    return [entry for entry in runs if entry.parent == parent and not entry.abandoned]


def _next_id(run_id: str, taken: set[str]) -> str:
    number = 2
    while f"{run_id}-{number}" in taken:
        number += 1
    return f"{run_id}-{number}"


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``name: old -> new`` of every field that differs, shortened for one line."""
    return [
        f"{name}: {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def heartbeat(paths: RunPaths) -> AbstractContextManager[None]:
    """Says that a driver works on the run, and refuses if another one says so: :func:`sign_of_life`.

    A courtesy only: two drivers at once are safe, because the first writer of a unit wins.
    """
    return sign_of_life(paths.heartbeat, f"run {paths.run_id}")


@contextmanager
def sign_of_life(uri: str, what: str) -> Iterator[None]:
    """Says in the file ``uri`` that this process works on ``what``, and refuses if another one says so.

    Raises:
        UsageError: another process shows signs of life.
    """
    _refuse_if_shown(uri, what)
    failpoint("heartbeat.checked")
    stop = threading.Event()

    def beat() -> None:
        while True:
            # A store that is away for a while must not end the heartbeat.
            with suppress(Exception):
                sign = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
                storage.write_json(uri, sign)
            if stop.wait(HEARTBEAT_EVERY_S):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        # It goes stale by itself, and a store that is away must not hide why the block ended.
        with suppress(Exception):
            storage.remove(uri)


def refuse_if_alive(paths: RunPaths) -> None:
    """Raise :class:`UsageError` if another driver works on the run."""
    _refuse_if_shown(paths.heartbeat, f"run {paths.run_id}")


def _refuse_if_shown(uri: str, what: str) -> None:
    if other := _sign_of_others(uri, what):
        raise UsageError(
            f"{what}: another driver works on it (process {other['pid']} on {other['host']}); wait for it, "
            f"or stop it and try again in a minute"
        )


def other_driver(paths: RunPaths) -> dict[str, Any] | None:
    """The last sign of life of another process that works on the run.

    Of another host, whose clock may be wrong, only a sign that changes is one: that takes 15 s to see.
    """
    return _sign_of_others(paths.heartbeat, f"run {paths.run_id}")


def _sign_of_others(uri: str, what: str) -> dict[str, Any] | None:
    sign = _last_sign(uri)
    if sign is None or (_is_of_this_host(sign) and sign["pid"] == os.getpid()):
        return None
    if _is_of_this_host(sign):
        return sign if _is_fresh(sign) and _is_running(sign["pid"]) else None
    wait_s = 1.5 * HEARTBEAT_EVERY_S
    _log.warning("%s: was worked on from %s; waiting %g s to see if it still is", what, sign["host"], wait_s)
    time.sleep(wait_s)
    later = _last_sign(uri)
    return later if later != sign else None


def is_alive(paths: RunPaths) -> bool:
    """Whether a driver works on the run, as far as clocks agree: its sign of life is younger than a minute."""
    sign = _last_sign(paths.heartbeat)
    if sign is None or not _is_fresh(sign):
        return False
    return not _is_of_this_host(sign) or _is_running(sign["pid"])


def _last_sign(uri: str) -> dict[str, Any] | None:
    try:
        sign: dict[str, Any] = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        return None
    return sign


def _is_fresh(sign: dict[str, Any]) -> bool:
    return bool(time.time() - sign["time"] <= HEARTBEAT_STALE_S)


def _is_of_this_host(sign: dict[str, Any]) -> bool:
    return bool(sign["host"] == socket.gethostname())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def utc_now() -> str:
    """The time now, UTC, ISO 8601 with microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")
