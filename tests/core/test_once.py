from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from imgbatch.core import once
from imgbatch.core.once import Once


def test_what_was_found_is_kept() -> None:
    asked: list[None] = []
    found = Once(lambda: asked.append(None))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: found.get(), range(50))) == [None] * 50
    assert len(asked) == 1


def test_a_failure_that_lasts_is_told_again_and_another_is_not() -> None:
    failures: list[Exception] = [TimeoutError("slow"), PermissionError("no"), TimeoutError("never asked")]
    found = Once[str](lambda: (_ for _ in ()).throw(failures.pop(0)), lasting=(PermissionError,))
    with pytest.raises(TimeoutError, match="slow"):
        found.get()
    for _ in range(3):
        with pytest.raises(PermissionError, match="no"):
            found.get()
    assert len(failures) == 1


def test_a_failure_that_lasted_long_enough_is_asked_about_again() -> None:
    answers: list[object] = [PermissionError("no"), "yes"]

    def find() -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = Once(find, lasting=(PermissionError,), lasting_s=0.0)
    with pytest.raises(PermissionError):
        found.get()
    assert found.get() == "yes"


def test_who_waits_meanwhile_shares_the_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    num_asking, finds = 9, 0
    asking = threading.Semaphore(0)

    def now() -> float:
        asking.release()
        return time.monotonic()

    monkeypatch.setattr(once, "time", SimpleNamespace(monotonic=now))

    def find() -> None:
        nonlocal finds
        finds += 1
        for _ in range(num_asking):  # each looks at the clock when it asks
            assert asking.acquire(timeout=60)
        raise TimeoutError("slow")

    found = Once(find)

    def ask(_: int) -> str:
        with pytest.raises(TimeoutError) as failure:
            found.get()
        return str(failure.value)

    with ThreadPoolExecutor(num_asking) as pool:
        assert list(pool.map(ask, range(num_asking))) == ["slow"] * num_asking
    assert finds == 1
