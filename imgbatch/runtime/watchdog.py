"""A wait that ends: an iterator read in a thread, so that the driver never hangs on a dead component."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from imgbatch.errors import Interrupted

T = TypeVar("T")


class Stalled(Interrupted):
    """Nothing came for too long."""


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


def watched(items: Iterable[T], timeout_s: float, where: Callable[[], str] = str) -> Iterator[T]:
    """``items``, as they come; raises :class:`Stalled` if none comes for ``timeout_s`` seconds.

    Whoever takes no more of them leaves the rest untouched, but for one that may be on its way.

    Args:
        where: how far the work has come, asked for when it stands still; empty where nobody knows.
    """
    arrived: queue.Queue[T | _End] = queue.Queue()
    enough = threading.Event()

    def pump() -> None:
        try:
            for item in items:
                if enough.is_set():
                    return
                arrived.put(item)
        except BaseException as error:  # handed to the thread that waits, whatever it is
            arrived.put(_End(error))
        else:
            arrived.put(_End(None))

    threading.Thread(target=pump, name="watched", daemon=True).start()
    try:
        while True:
            try:
                item = arrived.get(timeout=timeout_s)
            except queue.Empty:
                raise Stalled(
                    f"no unit was committed for {timeout_s:g} s (run.no_progress_s): the driver waited for the engine, "
                    f"{where() or 'which says nothing'}; run the same command again to continue"
                ) from None
            if not isinstance(item, _End):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                return
    finally:
        enough.set()
