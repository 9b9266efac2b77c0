"""Failpoints: named places in the code where a test makes a process die, hang, fail or wait.

    IMGBATCH_FAILPOINTS="commit.before=kill@3;finalize.after_files=delay:2;decode.row[5]=hang"

``kill`` is SIGKILL to the own process, ``stop`` SIGSTOP; ``exit`` leaves by ``sys.exit``; ``raise`` raises
:class:`FailpointHit`; ``hang`` never comes back; ``delay:S`` waits ``S`` seconds. ``@N`` acts on the N-th passage of
this process only, ``@N+`` on that and all later ones, otherwise every passage acts. ``[KEY]`` limits the point to
what it is passed with: a file name, a row. With ``IMGBATCH_FAILPOINTS_ONCE=DIRECTORY`` each entry acts once over all
processes that share the directory.

The variable is read when this module is loaded. Where it is not set, a passage is a call of an empty function.
"""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from imgbatch.errors import UsageError

VARIABLE = "IMGBATCH_FAILPOINTS"
ONCE_VARIABLE = "IMGBATCH_FAILPOINTS_ONCE"

POINTS = {
    "plan.after_rows": "rows/ is written, plan.json is not",
    "plan.after_plan": "plan.json is written",
    "heartbeat.checked": "no other driver was seen, and this one has not shown itself yet",
    "job.before_pass": "the driver is about to start a pass",
    "job.receipt": "the driver has one more receipt; key: the unit",
    "job.after_pass": "a pass has ended",
    "fetch.file": "a file is about to be read",
    "decode.row": "the child is at work on an image; key: the row within its unit",
    "decode.after_unit": "a unit is decoded; key: the unit",
    "classify.unit": "a unit, or in isolation a row, is about to be classified; key: its first row_id",
    "classify.forward": "a batch is on its way through the network",
    "commit.before": "a unit's results are about to be written; key: the unit",
    "commit.after": "a unit's file is there; key: the unit",
    "storage.create": "a file's content is on the disk under a temporary name; key: its final name",
    "finalize.after_layout": "finalize.json is written",
    "finalize.mid_file": "an output file is complete and has not taken its name; key: its kind",
    "finalize.after_files": "every output file has its name",
    "finalize.after_strays": "what an earlier finalize left is removed",
    "finalize.after_record": "files.json is written",
    "finalize.after_success": "_SUCCESS is written",
    "finalize.after_current": "current.json is written",
    "finalize.after_units": "the unit files are removed",
    "train.step": "an optimiser step is done",
}
"""Every failpoint, and where a process is when it passes."""

_ENTRY = re.compile(
    r"(?P<point>[a-z_.]+)(\[(?P<key>[^\]]+)\])?=(?P<action>[a-z]+)(:(?P<seconds>[\d.]+))?(@(?P<hit>\d+)(?P<on>\+)?)?"
)
_FOREVER_S = 10**8


class FailpointHit(RuntimeError):
    """What the action ``raise`` raises."""


@dataclass(frozen=True, slots=True)
class _Entry:
    text: str
    point: str
    key: str | None
    act: Callable[[], object]
    first: int
    last: float
    """Of the passages that act."""


def _ignore(point: str, key: object = None) -> None:
    """A passage through a failpoint of the name ``point``; ``key`` says of what."""


class _Armed:
    """Acts on the entries of a specification; counts passages of this process."""

    def __init__(self, entries: list[_Entry], once: Path | None) -> None:
        self._entries = entries
        self._once = once
        self._passages: Counter[str] = Counter()

    def __call__(self, point: str, key: object = None) -> None:
        passed = [entry for entry in self._entries if entry.point == point and entry.key in (None, str(key))]
        self._passages.update(entry.text for entry in passed)  # all of them, whatever the first that acts may raise
        for entry in passed:
            if entry.first <= self._passages[entry.text] <= entry.last and self._is_first(entry):
                entry.act()

    def _is_first(self, entry: _Entry) -> bool:
        if self._once is None:
            return True
        try:
            (self._once / re.sub(r"[^\w.@-]", "_", entry.text)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def parse_failpoints(specification: str, once: Path | None = None) -> Callable[..., None]:
    """What :data:`failpoint` is for a specification; ``once`` as ``IMGBATCH_FAILPOINTS_ONCE``.

    Raises:
        UsageError: an entry that is not understood, or names no failpoint.
    """
    entries = [_parse_entry(text.strip()) for text in specification.split(";") if text.strip()]
    return _Armed(entries, once) if entries else _ignore


def _parse_entry(text: str) -> _Entry:
    match = _ENTRY.fullmatch(text)
    if not match or match["point"] not in POINTS:
        raise UsageError(f"{VARIABLE}: {text}: expected POINT[KEY]=ACTION@N with one of {', '.join(POINTS)}")
    name, seconds = match["action"], float(match["seconds"] or 0)
    actions: dict[str, Callable[[], object]] = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "exit": lambda: sys.exit(1),
        "raise": lambda: _raise(text),
        "hang": lambda: time.sleep(_FOREVER_S),
        "delay": lambda: time.sleep(seconds),
    }
    if name not in actions:
        raise UsageError(f"{VARIABLE}: {text}: {name} is none of {', '.join(actions)}")
    first = int(match["hit"] or 1)
    last = first if match["hit"] and not match["on"] else math.inf
    return _Entry(text, match["point"], match["key"], actions[name], first, last)


def _raise(text: str) -> NoReturn:
    raise FailpointHit(text)


_once = os.environ.get(ONCE_VARIABLE)
failpoint = parse_failpoints(os.environ.get(VARIABLE, ""), Path(_once) if _once else None)
"""Called where a process passes; see :func:`_ignore`."""
