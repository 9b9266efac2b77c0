"""Work in parts, side by side: in threads of this process, or wherever an engine spreads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

from imgbatch.core.machine import num_cpus

Context = TypeVar("Context")
Part = TypeVar("Part")
Result = TypeVar("Result")

_MAX_THREADS = 4


class MapParts(Protocol):
    """Calls a function of a context and a part for each of many parts; the results come in the order of the parts.

    Function, context, parts and results can be pickled.
    """

    def __call__(
        self, function: Callable[[Context, Part], Result], context: Context, parts: Sequence[Part]
    ) -> Iterator[Result]: ...


def in_threads(
    function: Callable[[Context, Part], Result], context: Context, parts: Sequence[Part]
) -> Iterator[Result]:
    """:class:`MapParts` in this process, a few parts at once."""
    threads = min(_MAX_THREADS, num_cpus())
    return map_ahead(lambda part: function(context, part), parts, threads=threads, ahead=threads)


def map_ahead(
    function: Callable[[Part], Result], items: Iterable[Part], *, threads: int, ahead: int
) -> Iterator[Result]:
    """``function`` of each item, in order; at most ``ahead`` results are held or under way."""
    following = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            while True:
                pending.extend(pool.submit(function, item) for item in islice(following, ahead - len(pending)))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
