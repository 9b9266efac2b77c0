"""Metrics for Prometheus, through the agent that Ray runs on every node.

imgbatch_rows_total{run_id,status}            rows with an outcome; status OK are predictions
imgbatch_stage_seconds_total{run_id,stage}    busy seconds of all processes of a stage
imgbatch_units_total{run_id,outcome}          units: committed, existed (another writer was first), deferred
imgbatch_classify_wait_seconds_total{run_id}  seconds that classify actors, and so GPUs, waited for pixels

Rates come from the scraper: rate(imgbatch_rows_total[1m]) is images per second. Ray puts ``ray_`` before the names.
"""

from __future__ import annotations

import threading
import time

from ray.util.metrics import Counter

from imgbatch.core.results import Receipt


class RunMetrics:
    """Counts what the driver's receipts say."""

    def __init__(self, run_id: str) -> None:
        self._tags = {"run_id": run_id}
        self._rows = Counter("imgbatch_rows_total", "Rows with an outcome.", ("run_id", "status"))
        self._units = Counter("imgbatch_units_total", "Units by outcome.", ("run_id", "outcome"))
        self._seconds = Counter("imgbatch_stage_seconds_total", "Busy seconds of a stage.", ("run_id", "stage"))

    def add(self, receipt: Receipt) -> None:
        self._units.inc(1, {**self._tags, "outcome": receipt.outcome})
        for stage, seconds in receipt.seconds.items():
            if seconds > 0:
                self._seconds.inc(seconds, {**self._tags, "stage": stage})
        if receipt.outcome != "deferred":
            for status, count in receipt.counts.items():
                self._rows.inc(count, {**self._tags, "status": status})


class WaitMetric:
    """Counts the seconds in which a classify actor has no block at work; use it as a context manager around the work
    on each, in any number of threads."""

    def __init__(self, run_id: str) -> None:
        self._counter = Counter(
            "imgbatch_classify_wait_seconds_total", "Seconds that classify actors waited.", ("run_id",)
        )
        self._tags = {"run_id": run_id}
        self._lock = threading.Lock()
        self._at_work = 0
        self._idle_since = time.perf_counter()

    def __enter__(self) -> None:
        with self._lock:
            if self._at_work == 0:
                self._counter.inc(max(1e-9, time.perf_counter() - self._idle_since), self._tags)
            self._at_work += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._at_work -= 1
            self._idle_since = time.perf_counter()
