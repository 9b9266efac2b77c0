from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import psutil

from imgbatch.config import Config
from imgbatch.core.plan import plan_run
from imgbatch.core.stages import PIXELS, DecodeStage


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
