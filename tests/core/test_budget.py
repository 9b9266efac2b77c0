from __future__ import annotations

import pytest

from imgbatch.config import ErrorsConfig
from imgbatch.core.budget import WINDOW_ROWS, ErrorBudget
from imgbatch.core.results import Receipt
from imgbatch.errors import ErrorBudgetExceeded


def receipt(ok: int, failed: int, status: str = "NOT_FOUND") -> Receipt:
    return Receipt(0, "committed", ok + failed, {"OK": ok, status: failed}, {status: f"example of {status}"})


def budget(max_rate: float = 0.1, min_rows: int = 100) -> ErrorBudget:
    return ErrorBudget(ErrorsConfig(max_rate=max_rate, min_rows=min_rows))


def test_nothing_is_judged_before_enough_rows_were_seen() -> None:
    judge = budget()
    judge.add(receipt(0, 99))
    with pytest.raises(ErrorBudgetExceeded, match="100 of the last 100 rows failed"):
        judge.add(receipt(0, 1))


def test_the_limit_itself_is_allowed() -> None:
    judge = budget()
    judge.add(receipt(90, 10))
    with pytest.raises(ErrorBudgetExceeded):
        judge.add(receipt(0, 1))


def test_only_the_last_ten_thousand_rows_count() -> None:
    judge = budget()
    for _ in range(20):
        judge.add(receipt(WINDOW_ROWS // 10, 0))
    judge.add(receipt(0, 1000))  # exactly a tenth of the window, however many were good before
    with pytest.raises(ErrorBudgetExceeded, match="1,001 of the last 10,000 rows"):
        judge.add(receipt(999, 1))


def test_a_rate_of_one_never_stops() -> None:
    judge = budget(max_rate=1.0)
    for _ in range(5):
        judge.add(receipt(0, 1000))


def test_the_commonest_reasons_come_first() -> None:
    judge = budget(max_rate=1.0)
    judge.add(receipt(0, 2, "TRUNCATED"))
    judge.add(receipt(0, 5, "NOT_FOUND"))
    assert judge.reasons() == "5 NOT_FOUND (example of NOT_FOUND), 2 TRUNCATED (example of TRUNCATED)"
