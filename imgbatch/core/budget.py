"""The error budget: stops a run that is going wrong before everything has become an error row."""

from __future__ import annotations

from collections import Counter, deque

from imgbatch.config import ErrorsConfig
from imgbatch.core.results import Receipt
from imgbatch.errors import ErrorBudgetExceeded, Status

WINDOW_ROWS = 10_000


class ErrorBudget:
    """Counts failed rows over the last 10,000 and over the whole command."""

    def __init__(self, config: ErrorsConfig) -> None:
        self._config = config
        self._window: deque[Receipt] = deque()
        self._window_rows = 0
        self._seen_rows = 0
        self._failed = 0
        self._examples: dict[str, str] = {}

    def add(self, receipt: Receipt) -> None:
        """Take one unit's outcome in; raises :class:`ErrorBudgetExceeded` with the commonest reasons."""
        self._window.append(receipt)
        self._seen_rows += receipt.num_rows
        self._window_rows += receipt.num_rows
        self._failed += _failed(receipt)
        self._examples.update(receipt.examples)
        while self._window_rows - self._window[0].num_rows >= WINDOW_ROWS:
            oldest = self._window.popleft()
            self._window_rows -= oldest.num_rows
            self._failed -= _failed(oldest)
        if self._seen_rows >= self._config.min_rows and self._failed > self._config.max_rate * self._window_rows:
            raise ErrorBudgetExceeded(
                f"{self._failed:,} of the last {self._window_rows:,} rows failed, more than errors.max_rate "
                f"{self._config.max_rate:g}: {self.reasons()}; put it right and run the same command again"
            )

    def reasons(self) -> str:
        """The three commonest failures, with an example each: ``31 NOT_FOUND (…), 2 TRUNCATED (…)``."""
        counts: Counter[str] = Counter()
        for receipt in self._window:
            counts.update({status: n for status, n in receipt.counts.items() if status != Status.OK})
        return ", ".join(f"{n:,} {status} ({self._examples.get(status, '')})" for status, n in counts.most_common(3))


def _failed(receipt: Receipt) -> int:
    return receipt.num_rows - receipt.counts.get(Status.OK.value, 0)
