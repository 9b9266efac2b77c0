"""Ctrl-C once finishes the units in flight, twice stops now. SIGTERM, which Ray Jobs follow with SIGKILL, stops now."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NOTICE = b"\nfinishing the units in flight; Ctrl-C again stops now\n"


class StopSwitch:
    """Whether a person asked the job to stop after the units in flight."""

    def __init__(self) -> None:
        self.is_on = False


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
