from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from imgbatch.errors import Interrupted
from imgbatch.runtime.watchdog import watched


def test_items_come_through_in_order() -> None:
    assert list(watched(range(5), timeout_s=30)) == [0, 1, 2, 3, 4]


def test_an_error_comes_through_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    items = watched(failing(), timeout_s=30)
    assert next(items) == 1
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_a_wait_ends() -> None:
    release = threading.Event()

    def stuck() -> Iterator[int]:
        yield 1
        release.wait(60)

    items = watched(stuck(), timeout_s=2)
    assert next(items) == 1
    with pytest.raises(Interrupted, match="no unit was committed for 2 s"):
        next(items)
    release.set()


def test_nothing_more_is_taken_of_what_nobody_waits_for() -> None:
    asked, ended = threading.Semaphore(0), threading.Event()

    def counting() -> Iterator[int]:
        try:
            for number in range(1000):
                yield number
                asked.acquire(timeout=60)
        finally:
            ended.set()

    items = watched(counting(), timeout_s=30)
    assert next(items) == 0
    items.close()
    asked.release()
    assert ended.wait(30)
