"""Progress for a person: a bar on a terminal, one plain line every 30 seconds elsewhere."""

from __future__ import annotations

import time
from collections import Counter, deque
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn

from imgbatch.core.results import Receipt
from imgbatch.errors import Status
from imgbatch.runtime.reporter import Reporter

PLAIN_EVERY_S = 30.0
RATE_OVER_S = 120.0
"""The rate shown, and the time left, are those of the last two minutes: starting up is no forecast."""


class RunProgress:
    """Counts receipts and shows rows done, total, images/s, errors, time left and the stage that is the limit."""

    def __init__(self, reporter: Reporter, *, total_rows: int, done_rows: int, num_actors: dict[str, int]) -> None:
        """``num_actors``: how many processes share each stage's busy seconds."""
        self._reporter = reporter
        self._total = total_rows
        self._num_actors = num_actors
        self._done = done_rows
        self._errors = 0
        self._busy: Counter[str] = Counter()
        self._recent: deque[tuple[float, int]] = deque()
        """When receipts came, and the rows that were done then."""
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> RunProgress:
        console = self._reporter.console
        if console.is_terminal and not self._reporter.as_json:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True)
            self._task = self._bar.add_task(self.line(), total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, receipt: Receipt) -> None:
        now = time.monotonic()
        self._busy.update(receipt.seconds)
        if receipt.outcome != "deferred":
            self._done += receipt.num_rows
            self._errors += receipt.num_rows - receipt.counts.get(Status.OK.value, 0)
        self._recent.append((now, self._done))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_OVER_S:
            self._recent.popleft()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self.line())
        elif now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            self._reporter.say(self.line())

    def line(self) -> str:
        """``1,024 of 3,000 images, 61 images/s, 3 errors, 0:32 left, limit: classify``."""
        parts = [f"{self._done:,} of {self._total:,} images"]
        rate = self.images_per_s()
        if rate:
            parts.append(f"{rate:,.0f} images/s")
        parts.append(f"{self._errors:,} errors")
        if rate:
            left = int((self._total - self._done) / rate)
            parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self._busy:
            parts.append(f"limit: {self.limit()}")
        return ", ".join(parts)

    def images_per_s(self) -> float | None:
        """Over the last two minutes; none before the second receipt."""
        if len(self._recent) < 2 or self._recent[-1][0] == self._recent[0][0]:
            return None
        (first_time, first_done), (last_time, last_done) = self._recent[0], self._recent[-1]
        return (last_done - first_done) / (last_time - first_time)

    def limit(self) -> str:
        """The stage whose processes were busiest."""
        return max(self._busy, key=lambda stage: self._busy[stage] / self._num_actors.get(stage, 1))
