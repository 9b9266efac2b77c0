"""``run.stop_after_s``: a command whose time is over ends like one that a person stops, and the same goes on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from imgbatch.cli import run
from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.runs import RunPaths, find_run
from imgbatch.core.verify import verify
from imgbatch.errors import ExitCode, Interrupted
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import classify, retry
from tests.conftest import changed
from tests.runtime.conftest import rows_of

OVER = r"^stopped after the units in flight: {} s \(run\.stop_after_s\) are over; the same command continues$"


def looked_at(times: float) -> tuple[float, StopSwitch]:
    """Seconds, and a clock that goes on by one whenever somebody looks at it, so that they are over after so many."""
    return times + 0.5, StopSwitch(itertools.count().__next__)


def only_run(config: Config) -> RunPaths:
    return find_run(str(config.output.path)).paths


def committed(paths: RunPaths) -> set[int]:
    return paths.committed_units(1000)


def test_time_that_is_over_before_the_first_unit(photo_config: Config) -> None:
    with pytest.raises(Interrupted, match=OVER.format("1e-09")):
        classify(changed(photo_config, run__stop_after_s=1e-9))
    paths = only_run(photo_config)
    assert committed(paths) == set()
    assert storage.read_json(paths.run_json)["state"] == "interrupted"
    assert classify(photo_config).run_id == paths.run_id
    assert verify(paths.out).ok


def test_the_unit_in_flight_is_finished(photo_config: Config) -> None:
    """One look before each pass, and one after each unit: the third is after the second unit."""
    seconds, stop = looked_at(2)
    with pytest.raises(Interrupted, match=OVER.format(seconds)):
        classify(changed(photo_config, run__stop_after_s=seconds), stop=stop)
    paths = only_run(photo_config)
    assert committed(paths) == {0, 1}
    result = classify(photo_config)
    assert (result.run_id, result.num_rows) == (paths.run_id, 120)
    assert verify(result.out).ok


def test_time_that_is_over_after_the_last_unit_keeps_no_run_from_its_end(photo_config: Config) -> None:
    seconds, stop = looked_at(9)
    result = classify(changed(photo_config, run__stop_after_s=seconds), stop=stop)
    assert verify(result.out).ok
    assert stop.reason() is not None


def test_a_switch_serves_one_command_after_the_other(photo_config: Config) -> None:
    stop = StopSwitch()
    with pytest.raises(Interrupted):
        classify(changed(photo_config, run__stop_after_s=1e-9), stop=stop)
    assert verify(classify(photo_config, stop=stop).out).ok


def test_a_retry_ends_and_goes_on_too(photo_config: Config) -> None:
    first = classify(photo_config)
    with pytest.raises(Interrupted, match=OVER.format("1e-09")):
        retry(changed(photo_config, run__stop_after_s=1e-9))
    again = retry(photo_config)
    assert again is not None
    assert again.num_rows == first.num_errors == 6
    assert rows_of(photo_config, "select count(*) from runs") == [(2,)]


def test_on_the_command_line_it_is_an_exit_code_and_one_line(
    photo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["-m", str(photo_config.model.path), "--manifest", str(photo_config.input.manifest)]
    settings = ["--engine", "local", "--set", "resources.device=cpu", "--set", "errors.max_rate=1"]
    command = ["classify", *inputs, "-o", str(tmp_path / "out"), *settings]
    assert run([*command, "--set", "run.stop_after_s=0.000001"]) == ExitCode.INTERRUPTED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "imgbatch: stopped after the units in flight: 1e-06 s (run.stop_after_s) are over; the same command continues"
    )
    assert run(command) == ExitCode.DONE
    assert "120 rows: " in capsys.readouterr().out
