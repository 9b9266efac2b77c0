from __future__ import annotations

import threading

import pytest

from imgbatch.core.parallel import in_threads, map_ahead


def test_parts_come_in_order_whatever_takes_longest() -> None:
    first_may_end = threading.Event()

    def work(base: int, part: int) -> int:
        if part == 0:
            assert first_may_end.wait(10)
        else:
            first_may_end.set()
        return base + part

    assert list(map_ahead(lambda part: work(10, part), range(5), threads=2, ahead=2)) == [10, 11, 12, 13, 14]
    assert list(in_threads(lambda base, part: base * part, 3, range(4))) == [0, 3, 6, 9]
    assert list(in_threads(lambda base, part: base * part, 3, [])) == []


def test_no_more_is_begun_than_may_be_held() -> None:
    begun: list[int] = []
    results = map_ahead(lambda item: begun.append(item) or item, iter(range(100)), threads=4, ahead=6)  # type: ignore[func-returns-value]
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert max(begun) < 6


def test_an_error_arrives_where_the_results_are_read() -> None:
    def fail_at_two(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = map_ahead(fail_at_two, range(9), threads=2, ahead=4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
