"""A second request where the first takes long: whichever answers first is taken, the other is given up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def first_answer(ask: Callable[[], Awaitable[T]], after_s: float, final: tuple[type[Exception], ...]) -> T:
    """What ``ask`` returns, asked once more after ``after_s`` seconds without an answer.

    A failure counts where it is one of ``final``, which the other request would meet as well, or where no other answer
    is to come.
    """
    waiting = {asyncio.ensure_future(ask())}
    try:
        answered, _ = await asyncio.wait(waiting, timeout=after_s)
        if not answered:
            waiting.add(asyncio.ensure_future(ask()))
        while True:
            answered, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in answered:
                if task.exception() is None or isinstance(task.exception(), final):
                    return task.result()
            if not left:
                return answered.pop().result()
            waiting = left
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
