"""What only Ray can lose: actors, nodes, the head. The installed command, on a Ray or a cluster of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from imgbatch.core import storage
from imgbatch.core.failpoints import VARIABLE
from imgbatch.errors import ExitCode
from tests.faults.conftest import Job, assert_exactly_once, outcomes, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.soak]

COMMAND = str(Path(sys.executable).with_name("imgbatch"))
ON_RAY = {
    "classify.engine": "ray",
    "resources.decode_actors": 2,
    "resources.classify_actors": 1,
    "run.no_progress_s": 120,
}
CLASSIFY_ACTOR = re.compile(r"ray::MapWorker\(MapBatches\(ClassifyActor")
"""How Ray names its process."""
BOUNDED_S = 300.0
STORE_BYTES = 300 * 10**6


@pytest.fixture
def ray_job(job: Job) -> Job:
    return replace(job, settings=job.settings | ON_RAY)


@contextlib.contextmanager
def started(
    job: Job, failpoints: str = "", address: str = "", *, once: bool = True, **changed: object
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, each failpoint acting in one process; it and whatever it started are ended with the block."""
    environment = os.environ | job.environment(failpoints, once=once) | {"RAY_ADDRESS": address}
    with job.log.open("ab") as log:
        process = subprocess.Popen([COMMAND, *job.arguments(**changed)], stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        for left in [*_descendants(process.pid), *([psutil.Process(process.pid)] if process.poll() is None else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def units_done(job: Job) -> int:
    return len(list(job.out.glob("runs/*/units/unit-*.parquet")))


def test_actors_that_die_cost_no_row(ray_job: Job, oracle: Job) -> None:
    """In the middle of a unit, of a batch and of a commit, by SIGKILL and by ``sys.exit``, all in one run."""
    deaths = ["decode.after_unit=kill@2", "classify.forward=kill@3", "commit.before=kill@2", "classify.unit[96]=exit",
              "storage.create[unit-00000005.parquet]=kill", "commit.after[6]=kill"]  # fmt: skip
    with started(ray_job, ";".join(deaths)) as process:
        assert process.wait(BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    assert len(list((ray_job.folder / "markers").iterdir())) == len(deaths)
    assert_no_word_of_ray(ray_job)
    assert_exactly_once(ray_job, oracle)


def assert_no_word_of_ray(job: Job) -> None:
    """What it prints of dying actors by itself, and of its own bookkeeping's failures."""
    said = job.log.read_text()
    assert not re.search(r"\((raylet|autoscaler)|pid=\d|Unhandled error|Traceback", said), said


def test_a_row_that_kills_whoever_touches_it_ends_alone(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "classify.unit[32]=kill", once=False) as process:
        assert process.wait(2 * BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    assert "unit 2: classified row by row" in ray_job.log.read_text()
    expected = [(*row[:2], "CLASSIFY_FAILED", None, row[4]) if row[0] == 32 else row for row in outcomes(oracle)]
    assert outcomes(ray_job) == expected


def test_a_head_that_dies_ends_the_driver_and_the_run_goes_on_elsewhere(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "classify.unit=hang@3", run__no_progress_s=60) as process:
        wait_until(lambda: units_done(ray_job) >= 2, 120)
        for child in _descendants(process.pid):
            if "gcs_server" in child.name():
                child.kill()
        assert process.wait(BOUNDED_S) != 0
    storage.remove(ray_job.paths.heartbeat)
    assert job_on_one_process(ray_job).run() == ExitCode.DONE
    assert_exactly_once(ray_job, oracle)


def test_a_driver_that_is_killed_leaves_no_process_and_the_same_command_goes_on(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "classify.unit=delay:1", once=False) as process:
        wait_until(lambda: units_done(ray_job) >= 1, 180)
        of_ray = _descendants(process.pid)
        process.kill()
        process.wait()
        try:
            wait_until(lambda: all(map(has_ended, of_ray)))
        finally:
            for left in of_ray:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
    assert of_ray
    assert units_done(ray_job) < 8
    with started(ray_job) as process:
        assert process.wait(BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    assert "continuing: " in ray_job.log.read_text()
    assert_exactly_once(ray_job, oracle)


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody is there to take note of it
    except psutil.NoSuchProcess:
        return True


def test_an_actor_that_hangs_costs_a_pass(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "classify.unit[48]=hang", run__no_progress_s=60) as process:
        assert process.wait(BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    said = ray_job.log.read_text()
    assert "a pass ended early: no unit was committed for 60 s (run.no_progress_s)" in said
    assert re.search(r"[1-8] units through decode, [0-7] units through classify", said)
    assert_exactly_once(ray_job, oracle)


def test_a_row_that_hangs_whoever_touches_it_ends_alone(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "classify.unit[48]=hang", once=False, run__no_progress_s=60) as process:
        assert process.wait(3 * BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    assert "unit 3: classified row by row" in ray_job.log.read_text()
    expected = [(*row[:2], "TIMEOUT", None, row[4]) if row[0] == 48 else row for row in outcomes(oracle)]
    assert outcomes(ray_job) == expected


def test_an_engine_in_which_nothing_is_ever_done_ends_the_job(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "decode.after_unit=hang", once=False, run__no_progress_s=60) as process:
        assert process.wait(BOUNDED_S) == ExitCode.INTERRUPTED, ray_job.log.read_text()
    assert "no unit was committed for 60 s (run.no_progress_s)" in ray_job.last_line()
    assert storage.read_json(ray_job.paths.run_json)["sessions"][-1]["suspect_units"]
    assert job_on_one_process(ray_job).run() == ExitCode.DONE
    assert_exactly_once(ray_job, oracle)


def test_ctrl_c_finishes_the_units_in_flight(ray_job: Job, oracle: Job) -> None:
    """30 units, of which at most eight are under way at once."""
    small = ray_job.settings | {"classify.unit_rows": 4, "resources.decode_actors": 1}
    job = replace(ray_job, settings=small)
    with started(job, "classify.unit=delay:0.5", once=False) as process:
        wait_until(lambda: units_done(job) >= 2, 180)
        process.send_signal(signal.SIGINT)
        assert process.wait(BOUNDED_S) == ExitCode.INTERRUPTED, job.log.read_text()
    assert "stopped after the units in flight" in job.last_line()
    assert 2 <= units_done(job) < 30
    assert job_on_one_process(job).run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_command_whose_time_is_over_and_run_again(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, run__stop_after_s=1e-6) as process:
        assert process.wait(BOUNDED_S) == ExitCode.INTERRUPTED, ray_job.log.read_text()
    assert "s (run.stop_after_s) are over; the same command continues" in ray_job.last_line()
    assert units_done(ray_job) == 0
    with started(ray_job) as process:
        assert process.wait(BOUNDED_S) == ExitCode.DONE, ray_job.log.read_text()
    assert_exactly_once(ray_job, oracle)


def test_a_unit_that_cannot_be_written_ends_the_run_in_one_line(ray_job: Job, oracle: Job) -> None:
    with started(ray_job, "storage.create[unit-00000002.parquet]=raise", once=False) as process:
        assert process.wait(BOUNDED_S) == ExitCode.FAILED, ray_job.log.read_text()
    assert "unit-00000002.parquet: cannot be written (FailpointHit" in ray_job.last_line()
    said = ray_job.log.read_text()
    assert "ended early" not in said, "another pass would have met the same"
    assert "Traceback" not in said
    assert job_on_one_process(ray_job).run() == ExitCode.DONE
    assert_exactly_once(ray_job, oracle)


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]], ids=["twice", "term"])
def test_stopped_at_once(signals: list[signal.Signals], ray_job: Job, oracle: Job) -> None:
    """While a unit is under way that would take for ever, the third that comes to be classified."""
    with started(ray_job, "classify.unit=hang@3") as process:
        wait_until(lambda: units_done(ray_job) >= 2, 180)
        for number, sent in enumerate(signals, start=1):
            process.send_signal(sent)
            if number < len(signals):
                wait_until(lambda: "Ctrl-C again stops now" in ray_job.log.read_text())
        assert process.wait(60) == ExitCode.INTERRUPTED, ray_job.log.read_text()
    assert "the same command continues" in ray_job.last_line()
    assert "SIGTERM handler is not set" not in ray_job.log.read_text(), "a thread that was left started another Ray"
    assert job_on_one_process(ray_job).run() == ExitCode.DONE
    assert_exactly_once(ray_job, oracle)


HEADROOM_BYTES = 5 * 10**9
"""What the job's own processes take, and what others on the machine may come to take meanwhile."""
STEP_BYTES = 2**28


def late_workers(process: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """Of the pool that stays until the last unit is done; those that decode leave when nothing is left to decode."""
    found = set()
    for child in _descendants(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if CLASSIFY_ACTOR.match(" ".join(child.cmdline())):
                found.add(child)
    return found


def test_workers_that_are_killed_for_want_of_memory_cost_no_row(
    ray_job: Job, oracle: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process takes memory until Ray ends a worker, and gives it back at once."""
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total, used = get_system_memory(), get_used_memory()
    limit = used + HEADROOM_BYTES
    if limit + 2 * 10**9 > total:
        pytest.skip(f"{(total - used) / 1e9:.1f} GB are free, too few to bring Ray to its limit and not the machine")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{limit / total:.4f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    with started(ray_job, "classify.unit=delay:4", once=False) as process:
        wait_until(lambda: units_done(ray_job) >= 1, 180)
        before = late_workers(process)
        assert len(before) == 1
        taken = []
        while before <= late_workers(process):
            assert units_done(ray_job) < 7, "no worker was killed"
            if get_used_memory() < limit + STEP_BYTES:
                taken.append(bytearray(b"x") * STEP_BYTES)  # written, so that the pages are really there
            time.sleep(0.05)
        del taken
        code = process.wait(BOUNDED_S)
    assert code in (ExitCode.DONE, ExitCode.INTERRUPTED), ray_job.log.read_text()
    finish(ray_job, code, address="")
    assert_no_word_of_ray(ray_job)
    assert_exactly_once(ray_job, oracle)


def job_on_one_process(job: Job) -> Job:
    return replace(job, settings=job.settings | {"classify.engine": "local"})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without a core to work on, which looks after its nodes every second."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    health = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {
        "num_cpus": 0,
        "node_ip_address": "127.0.0.2",
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "_system_config": health,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


def add_node(cluster: Any, address: str, failpoints: str = "") -> Any:
    """A node of three cores; ``failpoints`` act in every process on it."""
    environment = {VARIABLE: failpoints}
    return cluster.add_node(num_cpus=3, node_ip_address=address, object_store_memory=STORE_BYTES, env_vars=environment)


def raylet_of(node: Any) -> psutil.Process:
    (started,) = node.all_processes["raylet"]
    return psutil.Process(started.process.pid)


def kill_node(node: Any) -> None:
    """The raylet and its workers, by SIGKILL."""
    with contextlib.suppress(psutil.NoSuchProcess):
        raylet = raylet_of(node)
        for victim in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()


def finish(job: Job, code: int, address: str) -> None:
    """The same command again, a few times at most: the loss of a node has been seen to crash Ray 2.60 in the driver."""
    for _ in range(3):
        if code == ExitCode.DONE:
            break
        with started(job, address=address) as process:
            code = process.wait(BOUNDED_S)
    assert code == ExitCode.DONE, job.log.read_text()


SLOWLY = "classify.unit[48]=delay:15;classify.unit[64]=delay:5"
"""On the node that goes away, so that there is work on it when it does."""


def test_a_node_that_dies_costs_no_row(ray_job: Job, oracle: Job, cluster: Any) -> None:
    first = add_node(cluster, "127.0.0.3", SLOWLY)
    with started(ray_job, address=cluster.address) as process:
        wait_until(lambda: units_done(ray_job) >= 1, 180)
        add_node(cluster, "127.0.0.4")
        kill_node(first)
        code = process.wait(BOUNDED_S)
    finish(ray_job, code, cluster.address)
    assert_exactly_once(ray_job, oracle)


def test_the_only_actor_with_the_model_is_lost_and_the_other_node_has_room(
    ray_job: Job, oracle: Job, cluster: Any
) -> None:
    nodes = [add_node(cluster, address, "classify.unit=delay:3") for address in ("127.0.0.3", "127.0.0.4")]
    with started(ray_job, address=cluster.address, once=False) as process:
        wait_until(lambda: units_done(ray_job) >= 1, 180)
        (lost,) = (node for node in nodes if classifies(node))
        kill_node(lost)
        code = process.wait(BOUNDED_S)
    assert code != ExitCode.INTERRUPTED, ray_job.log.read_text()
    finish(ray_job, code, cluster.address)
    assert_exactly_once(ray_job, oracle)


def classifies(node: Any) -> bool:
    """Whether the actor that runs the model is on it."""
    children = raylet_of(node).children(recursive=True)
    return any(CLASSIFY_ACTOR.match(" ".join(child.cmdline())) for child in children)


def test_a_node_that_is_drained_costs_no_row(ray_job: Job, oracle: Job, cluster: Any) -> None:
    """As before a preemption: the node is told to finish, and is gone ten seconds later."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    first = add_node(cluster, "127.0.0.3", SLOWLY)
    with started(ray_job, address=cluster.address) as process:
        wait_until(lambda: units_done(ray_job) >= 1, 180)
        add_node(cluster, "127.0.0.4")
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + 10) * 1000)
        accepted, why_not = GcsClient(address=cluster.address).drain_node(first.node_id, reason, "", deadline_ms)
        assert accepted, why_not
        time.sleep(10)
        kill_node(first)
        code = process.wait(BOUNDED_S)
    finish(ray_job, code, cluster.address)
    assert_exactly_once(ray_job, oracle)
