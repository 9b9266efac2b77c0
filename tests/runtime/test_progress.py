from __future__ import annotations

import io

from rich.console import Console

from imgbatch.core.results import Receipt
from imgbatch.runtime.progress import RunProgress
from imgbatch.runtime.reporter import Reporter


def quiet() -> Reporter:
    return Reporter(Console(file=io.StringIO()), run_id="r0", as_json=False)


def receipt(unit: int, *, ok: int, failed: int = 0, **seconds: float) -> Receipt:
    return Receipt(unit, "committed", ok + failed, {"OK": ok, "CORRUPT": failed}, seconds=dict(seconds))


def test_the_line_tells_what_is_done_and_what_is_the_limit() -> None:
    progress = RunProgress(quiet(), total_rows=200, done_rows=20, num_actors={"decode": 4, "classify": 1})
    assert progress.line() == "20 of 200 images, 0 errors"
    progress.add(receipt(0, ok=8, failed=2, decode=3.0, classify=1.0))
    assert progress.images_per_s() is None, "one receipt is no rate"
    progress.add(receipt(1, ok=10, decode=3.0, classify=1.0))
    assert progress.images_per_s() is not None
    line = progress.line()
    assert line.startswith("40 of 200 images, ")
    assert "2 errors" in line
    assert line.endswith("left, limit: classify"), "4 decode actors share 6 s, one classify actor has 2 s"


def test_deferred_units_are_not_done() -> None:
    progress = RunProgress(quiet(), total_rows=20, done_rows=0, num_actors={})
    progress.add(Receipt(0, "deferred", 10, {"FETCH_FAILED": 10}))
    assert progress.line().startswith("0 of 20 images")
