from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pyarrow as pa
import pytest

from imgbatch.config import Config
from imgbatch.core import fetch, stages
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


def test_one_bad_image_does_not_have_the_others_copied(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan_run(changed(photo_config, classify__unit_rows=128), "cpu")
    with DecodeStage(run) as decode:
        block = decode(0)
    failed = np.flatnonzero(block["status"].is_valid())
    assert len(failed) == 6
    for name in ("status", "error_stage", "error_message", "attempts"):
        only_first = pa.array(np.arange(block.num_rows) == failed[0])
        column = pa.compute.if_else(only_first, block[name], pa.scalar(None, block[name].type))
        block = block.set_column(block.column_names.index(name), name, column)
    classify = ClassifyStage(run, batch_size=8, num_threads=1)
    predict, asked = classify._predictor.predict, []
    monkeypatch.setattr(classify._predictor, "predict", lambda images: asked.append(images) or predict(images))
    given = classify(block)
    monkeypatch.setattr(stages, "_FEW_FAILED", 0)
    expected = classify(block)
    pixels = np.frombuffer(block[PIXELS].chunk(0).buffers()[2], np.uint8)
    assert [np.shares_memory(images, pixels) for images in asked] == [True, False]
    assert [len(images) for images in asked] == [120, 119]
    assert given.column_names == expected.column_names
    for column in ("row_id", "status", "error_message", "label", "width"):
        assert given[column].equals(expected[column]), column
    probs, others = (table["probabilities"].combine_chunks().flatten().to_numpy() for table in (given, expected))
    np.testing.assert_allclose(probs, others, atol=1e-6)


def test_a_batch_is_no_larger_than_a_unit(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    assert run.plan.layout.unit_rows == 16
    assert ClassifyStage(run, batch_size=64, num_threads=1)._predictor.batch_size == 16
    assert ClassifyStage(run, batch_size=8, num_threads=1)._predictor.batch_size == 8
