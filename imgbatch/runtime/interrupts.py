"""Ctrl-C once finishes the units in flight, twice stops now. SIGTERM, which Ray Jobs follow with SIGKILL, stops now."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from imgbatch.errors import Interrupted

_NOTICE = b"\nfinishing the units in flight; Ctrl-C again stops now\n"


class StopSwitch:
    """Whether the job is to stop after the units in flight: a person asked for it, or its time is over."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """``now``: the clock that the time is taken from, s."""
        self.is_on = False
        """Whether a person asked."""
        self._now = now
        self._stop_after_s: float | None = None
        self._ends_at = math.inf

    def turn_on_after(self, seconds: float | None) -> None:
        """Let its time be over in so many seconds from now; none: never."""
        self._stop_after_s = seconds
        self._ends_at = math.inf if seconds is None else self._now() + seconds

    def reason(self) -> str | None:
        """What the job says of why it stopped; none: it is to go on."""
        if self.is_on:
            return "stopped after the units in flight; the same command continues"
        if self._now() >= self._ends_at:
            return (
                f"stopped after the units in flight: {self._stop_after_s:g} s (run.stop_after_s) are over; the same "
                f"command continues"
            )
        return None

    def check(self) -> None:
        """Raises :class:`Interrupted` if the job is to stop."""
        if reason := self.reason():
            raise Interrupted(reason)


@contextmanager
def stop_on_signals() -> Iterator[StopSwitch]:
    """Inside the block the first SIGINT turns the switch on; a second one, and SIGTERM, raise ``KeyboardInterrupt``.

    For the main thread. What a signal meant before it means again afterwards.
    """
    switch = StopSwitch()

    def on_interrupt(_number: int, _frame: Any) -> None:
        if switch.is_on:
            raise KeyboardInterrupt
        switch.is_on = True
        # Past Python's buffers, which the signal may have found locked.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _NOTICE)

    def on_terminate(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, on_interrupt)
    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield switch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
