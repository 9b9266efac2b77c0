from __future__ import annotations

import threading
import time

import psutil
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core.plan import plan_run
from imgbatch.errors import UsageError
from imgbatch.runtime.isolate import classify_isolated
from tests.conftest import changed


def kill_first_child(stop: threading.Event, killed: list[int]) -> None:
    """SIGKILL the first process that classifies for this one, once it has loaded the model and begun."""
    while not stop.is_set():
        for process in psutil.Process().children():
            try:
                if "spawn_main" in " ".join(process.cmdline()) and process.memory_info().rss > 250 * 2**20:
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.Error:
                continue
        time.sleep(0.01)


def test_every_row_of_an_isolated_unit_has_an_outcome(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    receipt = classify_isolated(run, 0)
    assert receipt.isolated
    assert receipt.outcome == "committed"
    table = pq.read_table(run.paths.unit_file(0))
    assert table["row_id"].to_pylist() == list(range(16))
    assert receipt.counts == {"OK": 15, "TRUNCATED": 1}


def test_why_a_model_does_not_load_is_told_as_it_is(photo_config: Config, damaged_model: str) -> None:
    run = plan_run(changed(photo_config, model__path=damaged_model), "cpu")
    with pytest.raises(UsageError, match=r"model\.safetensors: not the weights that model\.json describes"):
        classify_isolated(run, 0)


def test_a_process_that_dies_in_isolation_costs_a_row_at_most(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    stop, killed = threading.Event(), list[int]()
    thread = threading.Thread(target=kill_first_child, args=(stop, killed))
    thread.start()
    try:
        receipt = classify_isolated(run, 1)
    finally:
        stop.set()
        thread.join()
    assert killed
    assert receipt.outcome == "committed"
    assert sum(receipt.counts.values()) == receipt.num_rows == 16
    assert receipt.counts["OK"] >= 14  # of 15, and one photo is cut short
    assert receipt.counts.get("CLASSIFY_FAILED", 0) <= 1
