from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from imgbatch.core.hedging import first_answer

AT_ONCE, NEVER = 0.0, 60.0
"""When the second request is sent, in seconds; the tests end the first before long."""
FINAL = (FileNotFoundError,)


class Requests:
    """Requests that are answered when a test says so."""

    def __init__(self) -> None:
        self.answers: list[asyncio.Future[str]] = []
        self.cancelled: list[int] = []
        self._sent = asyncio.Condition()

    async def ask(self) -> str:
        number, answer = len(self.answers), asyncio.get_running_loop().create_future()
        async with self._sent:
            self.answers.append(answer)
            self._sent.notify_all()
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    async def sent(self, count: int) -> None:
        """Until so many requests are under way."""
        async with self._sent:
            await self._sent.wait_for(lambda: len(self.answers) >= count)


async def seen() -> None:
    """Until whoever waits for an answer has had its turn."""
    for _ in range(10):
        await asyncio.sleep(0)


def hedged(answer: Callable[[Requests], Awaitable[None]], after_s: float) -> tuple[str, Requests]:
    """What comes of requests that ``answer`` answers, and those requests."""

    async def both() -> tuple[str, Requests]:
        requests = Requests()
        answering = asyncio.ensure_future(answer(requests))
        said = await first_answer(requests.ask, after_s, FINAL)
        await answering
        return said, requests

    return asyncio.run(asyncio.wait_for(both(), 60))


def test_an_answer_in_time_is_the_only_one_asked_for() -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(1)
        requests.answers[0].set_result("first")

    said, requests = hedged(answer, NEVER)
    assert (said, len(requests.answers)) == ("first", 1)


@pytest.mark.parametrize("winner", [0, 1])
def test_whichever_answers_first_is_taken_and_the_other_given_up(winner: int) -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(2)
        requests.answers[winner].set_result(f"request {winner}")

    said, requests = hedged(answer, AT_ONCE)
    assert (said, requests.cancelled) == (f"request {winner}", [1 - winner])
    assert len(requests.answers) == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_that_may_pass_waits_for_the_other_answer(failing: int) -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(2)
        requests.answers[failing].set_exception(TimeoutError("too long"))
        await seen()
        requests.answers[1 - failing].set_result("the other")

    assert hedged(answer, AT_ONCE)[0] == "the other"


def test_a_failure_that_the_other_request_would_meet_too_counts_at_once() -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(2)
        requests.answers[1].set_exception(FileNotFoundError("no such key"))

    with pytest.raises(FileNotFoundError, match="no such key"):
        hedged(answer, AT_ONCE)


def test_when_both_fail_the_last_failure_counts() -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(2)
        requests.answers[0].set_exception(TimeoutError("the first"))
        await seen()
        requests.answers[1].set_exception(TimeoutError("the second"))

    with pytest.raises(TimeoutError, match="the second"):
        hedged(answer, AT_ONCE)


def test_a_failure_before_the_second_request_is_the_answer() -> None:
    async def answer(requests: Requests) -> None:
        await requests.sent(1)
        requests.answers[0].set_exception(ConnectionError("reset"))

    with pytest.raises(ConnectionError, match="reset"):
        hedged(answer, NEVER)


def test_whoever_gives_up_ends_both_requests() -> None:
    async def give_up() -> list[int]:
        requests = Requests()
        asking = asyncio.ensure_future(first_answer(requests.ask, AT_ONCE, FINAL))
        await requests.sent(2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        return sorted(requests.cancelled)

    assert asyncio.run(give_up()) == [0, 1]
