"""The Ray engine held to the plain loop."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import finalize as finalize_module
from imgbatch.core import storage
from imgbatch.core.finalize import finalize
from imgbatch.core.plan import open_inputs, open_run, plan_run
from imgbatch.core.runs import RunPaths, find_run
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import Interrupted, UsageError
from imgbatch.runtime import ray_data
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import classify, iter_retries
from imgbatch.runtime.pools import Machine, choose_pools
from imgbatch.runtime.ray_data import map_in_tasks
from tests.conftest import changed

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

EXACT = "row_id, image_id, label, label_index, width, height, target, shop, price"


def on_ray(config: Config, tmp_path: Path, **flags: object) -> Config:
    return changed(
        config,
        classify__engine="ray",
        output__path=str(tmp_path / "on_ray"),
        resources__decode_actors=1,
        resources__classify_actors=1,
        resources__classify_threads=1,
        resources__decode_labels={"role": "tests"},
        resources__classify_labels={"role": "tests"},
        **flags,
    )


def table_of(config: Config, sql: str) -> pa.Table:
    with open_views(str(config.output.path)) as connection:
        return connection.sql(sql).to_arrow_table()


def assert_same_output(config: Config, oracle: Config) -> None:
    """Same rows, statuses and labels, probabilities within 1e-5."""
    predictions = f"select {EXACT} from predictions order by row_id"
    assert table_of(config, predictions).equals(table_of(oracle, predictions))
    errors = "select row_id, status, error_stage, error_message, attempts from errors order by row_id"
    assert table_of(config, errors).equals(table_of(oracle, errors))
    probabilities = "select unnest(probabilities)::double p from predictions order by row_id"
    ours, theirs = (table_of(c, probabilities)["p"].to_numpy() for c in (config, oracle))
    assert abs(ours - theirs).max() < 1e-5


def test_ray_gives_what_the_loop_gives(photo_config: Config, tmp_path: Path) -> None:
    oracle = changed(photo_config, output__partition_by=("shop",))
    config = on_ray(oracle, tmp_path)
    result = classify(config)
    classify(oracle)
    assert verify(result.out).ok
    assert_same_output(config, oracle)
    assert classify(config).already_finished
    record = storage.read_json(RunPaths(result.out, result.run_id).run_json)
    assert record["state"] == "finished"
    assert record["sessions"][0]["units"] == 8
    assert record["engine_ready_at"] < record["finished_at"]
    assert set(record["stage_seconds"]) == {"fetch", "decode", "classify", "commit"}


def test_a_command_whose_time_is_over_finishes_the_units_in_flight_and_the_same_goes_on(
    photo_config: Config, tmp_path: Path
) -> None:
    """30 units, of which eight are under way at once; the clock goes on by one with each unit that comes."""
    oracle = changed(photo_config, classify__unit_rows=4)
    config = on_ray(oracle, tmp_path)
    stop = StopSwitch(itertools.count().__next__)
    with pytest.raises(Interrupted, match=r"3\.5 s \(run\.stop_after_s\) are over; the same command continues"):
        classify(changed(config, run__stop_after_s=3.5), stop=stop)
    paths = find_run(str(config.output.path)).paths
    record = storage.read_json(paths.run_json)
    assert (record["state"], record["sessions"][0]["units"]) == ("interrupted", 10), "the third, and seven after it"
    result = classify(config)
    assert result.run_id == paths.run_id
    classify(oracle)
    assert verify(result.out).ok
    assert_same_output(config, oracle)


def test_nights_are_retried_on_one_ray(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    config = on_ray(photo_config, tmp_path)
    for night in range(2):
        late = tmp_path / f"{night}.jpg"
        pq.write_table(pa.table({"uri": [str(photos[6 + night]), str(late)]}), tmp_path / f"{night}.parquet")
        classify(changed(config, input__manifest=str(tmp_path / f"{night}.parquet"), classify__engine="local"))
        late.write_bytes(photos[1].read_bytes())
    assert [each.result and each.result.counts for each in iter_retries(config)] == [{"OK": 1}, {"OK": 1}]
    assert ray.is_initialized()


def test_a_model_that_does_not_load_ends_the_command_as_it_does_in_the_loop(
    photo_config: Config, damaged_model: str, tmp_path: Path
) -> None:
    printed = StringIO()
    config = on_ray(changed(photo_config, model__path=damaged_model), tmp_path)
    with pytest.raises(
        UsageError, match=rf"^{damaged_model}/model\.safetensors: not the weights .* \(sha256 differs\)"
    ):
        classify(config, Console(file=printed, width=1000))
    reason = rf"a pass ended early: \S*UsageError: {damaged_model}/model\.safetensors: not the weights"
    assert re.search(reason, printed.getvalue())


def test_finalize_in_tasks_gives_the_bytes_of_finalize_in_threads(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(photo_config, output__keep_units=True, output__partition_by=("shop",))
    result = classify(config)
    paths = RunPaths(result.out, result.run_id)
    data = [paths.finalize, paths.files, *map(str, Path(result.out).rglob(f"run_id={result.run_id}/**/*.parquet"))]
    before = {path: Path(path).read_bytes() for path in data}
    for path in (paths.success, *data):
        storage.remove(path)
    monkeypatch.setattr(finalize_module, "COUNTED_UNITS", 3)
    monkeypatch.setattr(finalize_module, "FEW_PARTS", 0)
    parts: list[int] = []

    def counted(function: Any, context: Any, items: Any) -> Iterator[Any]:
        parts.append(len(items))
        return map_in_tasks(function, context, items, timeout_s=60)

    _, bundle, spec = open_inputs(config)
    finalize(open_run(paths, config, bundle, spec), counted)
    assert {path: Path(path).read_bytes() for path in data} == before
    assert parts == [3, 1]


def test_finalize_starts_no_task_beside_actors_that_are_ending(
    photo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = on_ray(photo_config, tmp_path)
    cpus = ray.cluster_resources()["CPU"]
    monkeypatch.setattr(finalize_module, "FEW_PARTS", 0)
    free: list[float] = []

    def watched(*arguments: Any, **settings: Any) -> Iterator[Any]:
        free.append(ray.available_resources().get("CPU", 0))
        return map_in_tasks(*arguments, **settings)

    monkeypatch.setattr(ray_data, "map_in_tasks", watched)
    classify(config)
    assert free == [cpus, cpus]


def test_parts_that_are_not_done_end_the_command_in_one_line() -> None:
    def last_long(context: float, part: int) -> None:  # noqa: ARG001
        # Not for ever: a task that is cancelled while its process starts goes on, and would keep the next test waiting.
        until = time.monotonic() + context
        while time.monotonic() < until:  # one long sleep could not be ended
            time.sleep(0.05)

    def die(context: int, part: int) -> None:  # noqa: ARG001
        os._exit(context)

    with pytest.raises(Interrupted, match=r"^no part of the output was done for 0\.5 s \(run\.no_progress_s\)"):
        list(map_in_tasks(last_long, 20.0, [0, 1], timeout_s=0.5))
    with pytest.raises(Interrupted, match=r"^WorkerCrashedError: .*; run the same command again to continue$"):
        list(map_in_tasks(die, 1, [0], timeout_s=60))


def test_whichever_part_is_done_counts_as_progress(tmp_path: Path) -> None:
    """The results come in the order of the parts, and the first may be the last to be done."""

    def wait_for(path: Path) -> None:
        while not path.exists():
            time.sleep(0.05)

    def meet(context: str, part: int) -> None:
        Path(context, f"started{part}").touch()
        for other in range(4):
            wait_for(Path(context, f"started{other}"))

    def in_turn(context: str, part: int) -> int:
        wait_for(Path(context, f"done{part - 1 if part else 3}"))
        if part:
            time.sleep(4)
            Path(context, f"done{part}").touch()
        return part

    list(map_in_tasks(meet, str(tmp_path), range(4), timeout_s=300))  # so that no process has to start any more
    (tmp_path / "done0").touch()
    assert list(map_in_tasks(in_turn, str(tmp_path), range(4), timeout_s=10)) == [0, 1, 2, 3]


def test_who_takes_no_more_receipts_ends_the_pass_and_in_a_cluster_the_model_has_one_arena(
    photo_config: Config, tmp_path: Path
) -> None:
    config = on_ray(changed(photo_config, classify__unit_rows=1, ray__address="auto"), tmp_path)
    cpus = ray.cluster_resources()["CPU"]
    run = plan_run(config, "cpu")
    engine = ray_data.RayEngine(run, lambda: choose_pools(config.resources, "cpu", Machine(2, 0)))
    receipts = engine.classify_units(range(run.plan.layout.num_units), defer=False)
    next(receipts)
    below = {process: " ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)}
    [actor] = [process for process, command in below.items() if "ClassifyActor" in command]
    assert actor.environ()["MALLOC_ARENA_MAX"] == "1"
    receipts.close()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < cpus:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert 0 < run.plan.layout.num_units - len(run.pending_units()) < run.plan.layout.num_units // 2
