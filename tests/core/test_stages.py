from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from imgbatch.config import Config
from imgbatch.core import fetch
from imgbatch.core.failpoints import parse_failpoints
from imgbatch.core.plan import plan_run
from imgbatch.core.stages import PIXELS, ClassifyStage, DecodeStage
from tests.conftest import changed


def test_units_decoded_at_once_are_those_decoded_in_turn(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    units = range(run.plan.layout.num_units)
    with DecodeStage(run) as one:
        expected = [one(unit) for unit in units]
    with DecodeStage(run, processes=2) as two, ThreadPoolExecutor(3) as threads:
        given = list(threads.map(two, units))
        children = [process for process in psutil.Process().children() if "decode_child" in " ".join(process.cmdline())]
        assert len(children) == 2
    for block, other in zip(given, expected, strict=True):
        assert block.num_rows == other.num_rows
        for column in ("row_id", PIXELS, "width", "height", "status", "error_message", "unit"):
            assert block[column].equals(other[column])
    assert all(not child.is_running() or child.ppid() != os.getpid() for child in children)


def test_a_unit_that_takes_longer_than_the_watchdog_waits_ends_with_failures_that_may_pass(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "failpoint", parse_failpoints("fetch.file=delay:0.1"))
    with DecodeStage(plan_run(photo_config, "cpu")) as decode:
        unhurried = decode(1)
    config = changed(photo_config, run__no_progress_s=0.5, output__path=f"{photo_config.output.path}-other")
    with DecodeStage(plan_run(config, "cpu")) as decode:
        block = decode(1)
    late = [status == "FETCH_FAILED" for status in block["status"].to_pylist()]
    assert 0 < late.index(True) <= 6
    assert all(late[late.index(True) :])
    assert "the unit took longer than 0.4 s (0.8 of run.no_progress_s)" in block["error_message"].to_pylist()
    with DecodeStage(plan_run(config, "cpu"), watched=False) as decode:
        unwatched = decode(1)
    assert "FETCH_FAILED" not in (unhurried["status"].to_pylist() + unwatched["status"].to_pylist())


def test_a_batch_is_no_larger_than_a_unit(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    assert run.plan.layout.unit_rows == 16
    assert ClassifyStage(run, batch_size=64, num_threads=1)._predictor.batch_size == 16
    assert ClassifyStage(run, batch_size=8, num_threads=1)._predictor.batch_size == 8
