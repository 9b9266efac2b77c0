"""What is found out once by whoever asks first, for every thread; that it cannot be found is remembered too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """What ``find`` returns, called until it has returned once.

    A failure is that of everybody who asked before it was known: otherwise they would meet it one after the other,
    each after the time that it takes. One that is a ``lasting`` exception counts for ``lasting_s`` seconds more.
    """

    def __init__(
        self, find: Callable[[], T], *, lasting: tuple[type[Exception], ...] = (), lasting_s: float = 60.0
    ) -> None:
        self._find = find
        self._lasting = lasting
        self._lasting_s = lasting_s
        self._lock = threading.Lock()
        self._found: list[T] = []
        self._failure: Exception | None = None
        self._failed_until = 0.0

    def get(self) -> T:
        """Raises what ``find`` raises."""
        if self._found:
            return self._found[0]
        asked = time.monotonic()
        with self._lock:
            if not self._found:
                if self._failure is not None and asked <= self._failed_until:
                    raise self._failure.with_traceback(None)
                try:
                    self._found.append(self._find())
                except Exception as error:
                    self._failure = error
                    lasts_s = self._lasting_s if isinstance(error, self._lasting) else 0.0
                    self._failed_until = time.monotonic() + lasts_s
                    raise
            return self._found[0]
