from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from imgbatch.core.results import Receipt
from imgbatch.runtime import progress as progress_module
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


def test_without_a_terminal_there_is_a_line_every_30_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, force_terminal=False, width=100), run_id="r0", as_json=False)
    with RunProgress(reporter, total_rows=1000, done_rows=0, num_actors={}) as progress:
        for unit in range(10):
            now[0] += 12
            progress.add(receipt(unit, ok=12))
    assert stream.getvalue().splitlines() == [
        "36 of 1,000 images, 1 images/s, 0 errors, 0:16:04 left",
        "72 of 1,000 images, 1 images/s, 0 errors, 0:15:28 left",
        "108 of 1,000 images, 1 images/s, 0 errors, 0:14:52 left",
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_on_a_terminal_there_is_a_bar_unless_lines_are_for_a_machine(as_json: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    reporter = Reporter(console, run_id="r0", as_json=as_json)
    with RunProgress(reporter, total_rows=40, done_rows=20, num_actors={}) as progress:
        progress.add(receipt(0, ok=9, failed=1))
    shown = stream.getvalue()
    assert ("━" in shown) != as_json
    assert ("20 of 40 images, 0 errors" in shown) != as_json
    assert ("30 of 40 images, 1 errors" in shown) != as_json
