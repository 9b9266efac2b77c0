"""Whatever is killed, and whenever: through the local engine, in processes that really die."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imgbatch.core import storage
from imgbatch.core.failpoints import POINTS
from imgbatch.core.model import ModelBundle, load_bundle, load_network
from imgbatch.errors import ExitCode
from tests.faults.conftest import Job, assert_exactly_once, is_stopped, outcomes, output_bytes, wait_until
from tests.faults.drivers import KILLED, Driver

NOT_IN_THIS_DRIVER = {"decode.row", "train.step", "finalize.after_units"}
"""Passed by the decoding child, by training, and only where unit files are not kept."""
OTHER_PASSAGES = [
    "job.receipt=kill@4",
    "fetch.file=kill@50",
    "classify.forward=kill@5",
    "commit.before=kill@3",
    "storage.create[plan.json]=kill",
    "storage.create[unit-00000003.parquet]=kill",
    "storage.create[finalize.json]=kill",
    "storage.create[_SUCCESS]=kill",
    "finalize.mid_file[errors]=kill",
    "finalize.mid_file=kill@3",
]


def committed(job: Job) -> set[int]:
    """Indices of the units whose file is there."""
    return {int(path.stem.removeprefix("unit-")) for path in job.out.glob("runs/*/units/unit-*.parquet")}


@pytest.mark.parametrize(
    "failpoint",
    [
        *(f"{point}=kill" for point in POINTS if point not in NOT_IN_THIS_DRIVER),
        *(pytest.param(text, marks=pytest.mark.soak) for text in OTHER_PASSAGES),
    ],
)
def test_a_driver_killed_anywhere_and_run_again(failpoint: str, job: Job, oracle: Job) -> None:
    assert job.run(failpoint) == KILLED
    assert job.run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_driver_killed_while_it_removes_the_units(job: Job, oracle: Job) -> None:
    assert job.run("finalize.after_units=kill", output__keep_units=False) == KILLED
    assert job.run(output__keep_units=False) == ExitCode.DONE
    assert_exactly_once(job, oracle)


@pytest.mark.soak
def test_a_driver_killed_again_and_again(job: Job, oracle: Job) -> None:
    for failpoint in ("commit.after=kill@2", "commit.before=kill@2", "finalize.after_layout=kill",
                      "finalize.mid_file=kill@2", "finalize.after_record=kill"):  # fmt: skip
        assert job.run(failpoint) == KILLED
    assert job.run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_two_drivers_at_once(job: Job, oracle: Job, start: Callable[..., Driver]) -> None:
    """Both look for another driver before either shows itself; the first writer of a unit wins."""
    assert job.run("plan.after_plan=kill", output__keep_units=False) == KILLED
    drivers = [start("heartbeat.checked=stop", output__keep_units=False) for _ in range(2)]
    wait_until(lambda: all(is_stopped(driver.pid) for driver in drivers))
    for driver in drivers:
        os.kill(driver.pid, signal.SIGCONT)
    assert [driver.wait() for driver in drivers] == [ExitCode.DONE, ExitCode.DONE], job.log.read_text()
    assert_exactly_once(job, oracle)


def test_two_drivers_that_plan_at_once(job: Job, oracle: Job, start: Callable[..., Driver]) -> None:
    """Whoever is behind may be refused, once the other one shows itself."""
    drivers = [start("heartbeat.checked=stop@1") for _ in range(2)]
    wait_until(lambda: all(is_stopped(driver.pid) for driver in drivers))
    for driver in drivers:
        os.kill(driver.pid, signal.SIGCONT)
    assert {ExitCode.DONE} <= {driver.wait() for driver in drivers} <= {ExitCode.DONE, ExitCode.USAGE}
    assert_exactly_once(job, oracle)


def test_a_second_driver_is_refused_while_the_first_shows_itself(job: Job, start: Callable[..., Driver]) -> None:
    first = start("job.receipt=hang@2")
    wait_until(lambda: len(committed(job)) == 2)
    assert job.run() == ExitCode.USAGE
    assert f"another driver works on it (process {first.pid}" in job.last_line()


def test_a_zombie_that_wakes_up_after_finalize(job: Job, oracle: Job, start: Callable[..., Driver]) -> None:
    """A driver stands still in the middle of a commit, as on a machine that was paused, while another finishes."""
    zombie = start("storage.create[unit-00000002.parquet]=stop", output__keep_units=False)
    wait_until(lambda: is_stopped(zombie.pid))
    storage.remove(job.paths.heartbeat)  # a minute without a sign of life would do the same
    assert job.run(output__keep_units=False) == ExitCode.DONE
    before = output_bytes(job)
    os.kill(zombie.pid, signal.SIGCONT)
    assert zombie.wait() == ExitCode.DONE
    assert output_bytes(job) == before
    assert_exactly_once(job, oracle)


def other_manifest(job: Job, _: Callable[..., ModelBundle]) -> Job:
    table = pq.read_table(job.manifest)
    path = job.folder / "other.parquet"
    pq.write_table(table.set_column(3, "price", pc.add(table["price"], pa.scalar(1.0, pa.float32()))), path)
    return replace(job, manifest=path)


def other_model(job: Job, make_bundle: Callable[..., ModelBundle]) -> Job:
    bundle = load_bundle(job.model)
    return replace(job, model=make_bundle(seed=1, class_names=bundle.class_names, preprocess=bundle.preprocess).path)


def other_setting(job: Job, _: Callable[..., ModelBundle]) -> Job:
    return replace(job, settings=job.settings | {"decode.max_pixels": 5000})


@pytest.mark.parametrize(
    ("change", "field"),
    [(other_manifest, "manifest: "), (other_model, "model: "), (other_setting, "decode.max_pixels: ")],
)
def test_what_changed_between_two_commands_is_named(
    change: Callable[..., Job], field: str, job: Job, make_bundle: Callable[..., ModelBundle]
) -> None:
    assert job.run("commit.after=kill@2") == KILLED
    units = committed(job)
    assert change(job, make_bundle).run() == ExitCode.USAGE
    assert "is unfinished and was started with other settings" in job.last_line()
    assert field in job.last_line()
    assert committed(job) == units


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KB; :func:`enlarge` makes room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True)
    if tried.returncode:
        pytest.skip(f"no disk can be mounted here: {tried.stderr.decode().strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def enlarge(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)


def test_a_full_disk_is_one_line_and_room_is_all_it_takes(job: Job, oracle: Job, small_disk: Path) -> None:
    job = replace(job, out=small_disk / "out")
    assert job.run() == ExitCode.FAILED
    assert "No space left on device" in job.last_line()
    assert "Traceback" not in job.log.read_text()
    enlarge(small_disk)
    assert job.run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


@pytest.mark.parametrize("action", ["kill", "raise", "hang"])
def test_an_image_that_the_decoder_does_not_survive_costs_its_row(action: str, job: Job) -> None:
    """The 4th row of both units: a crash, an exception that nothing catches, and a hang."""
    assert job.run(f"decode.row[3]={action}", decode__timeout_s=2, classify__unit_rows=64) == ExitCode.DONE
    status = "TIMEOUT" if action == "hang" else "DECODER_CRASH"
    expected = dict.fromkeys(range(120), "OK") | dict.fromkeys(range(5, 120, 20), "TRUNCATED")
    expected |= {3: status, 67: status}
    assert statuses(job) == expected


def statuses(job: Job) -> dict[int, str]:
    return {row[0]: row[2] for row in outcomes(job)}  # type: ignore[misc]


@pytest.mark.soak
def test_a_unit_that_nobody_survives_ends_row_by_row(job: Job) -> None:
    """Whoever touches row 32 dies: unit 2 in both passes, then, in isolation, the row alone."""
    assert job.run("classify.unit[32]=raise") == ExitCode.DONE
    assert {row for row, status in statuses(job).items() if status == "CLASSIFY_FAILED"} == {32}


def test_a_batch_whose_forward_fails_is_tried_again_in_halves(job: Job, oracle: Job) -> None:
    assert job.run("classify.forward=raise@3") == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_files_that_cannot_be_had_any_more_stop_the_run_and_become_no_rows(job: Job, oracle: Job) -> None:
    """As when credentials expire or a disk goes away; the same command labels everything once that is put right."""
    patience = {"errors__max_rate": 0.2, "errors__min_rows": 32}
    assert job.run("fetch.file=raise@60+", **patience) == ExitCode.ERROR_BUDGET
    assert "FETCH_FAILED" in job.last_line()
    assert 0 < len(committed(job)) < 5
    assert job.run(**patience) == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_wrong_endpoint_stops_the_run_at_the_start(
    job: Job, oracle: Job, photos: list[Path], s3_bucket: str, s3_server: str
) -> None:
    def upload(path: Path) -> str:
        uri = storage.join(s3_bucket, path.name)
        storage.replace(uri, path.read_bytes())
        return uri

    with ThreadPoolExecutor(8) as pool:
        uris = list(pool.map(upload, photos))
    table = pq.read_table(job.manifest)
    manifest = job.folder / "objects.parquet"
    pq.write_table(table.set_column(0, "uri", pa.array(uris)).append_column("image_id", table["uri"]), manifest)
    job = replace(job, manifest=manifest, settings=job.settings | {"errors.max_rate": 0.5, "fetch.retries": 0})
    assert job.run(storage__endpoint_url="http://127.0.0.1:1") == ExitCode.ERROR_BUDGET
    assert "none of 16 sampled images could be fetched" in job.last_line()
    assert job.run(storage__endpoint_url=s3_server) == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_model_that_gives_no_numbers_gives_no_labels(job: Job, make_bundle: Callable[..., ModelBundle]) -> None:
    bundle = make_bundle(preprocess=load_bundle(job.model).preprocess)
    weights = load_network(bundle).state_dict()
    weights = {name: w * math.nan if w.is_floating_point() else w for name, w in weights.items()}
    nothing = make_bundle("nothing", state_dict=weights, preprocess=bundle.preprocess)
    job = replace(job, model=nothing.path, settings=job.settings | {"output.partition_by": "[]"})
    assert job.run() == ExitCode.ERROR_BUDGET
    assert "has not one prediction (114 NON_FINITE, 6 TRUNCATED)" in job.last_line()
    assert Counter(statuses(job).values()) == {"NON_FINITE": 114, "TRUNCATED": 6}


@pytest.mark.parametrize(
    ("signals", "units"),
    [
        ([signal.SIGINT], {0, 1, 2, 3}),
        ([signal.SIGINT, signal.SIGINT], {0, 1, 2}),
        ([signal.SIGTERM], {0, 1, 2}),
    ],
    ids=["once", "twice", "term"],
)
def test_interrupted(
    signals: list[signal.Signals], units: set[int], job: Job, oracle: Job, start: Callable[..., Driver]
) -> None:
    """Ctrl-C finishes the unit in flight; a second one, and SIGTERM, do not."""
    driver = start(f"classify.unit[48]=delay:{2 if units == {0, 1, 2, 3} else 60}")
    wait_until(lambda: committed(job) == {0, 1, 2})
    for number, sent in enumerate(signals, start=1):
        os.kill(driver.pid, sent)
        if number < len(signals):
            wait_until(lambda: "Ctrl-C again stops now" in job.log.read_text())
    assert driver.wait(30) == ExitCode.INTERRUPTED
    how = "stopped after the units in flight" if signals == [signal.SIGINT] else "interrupted"
    assert job.last_line() == f"imgbatch: {how}; the same command continues"
    assert storage.read_json(job.paths.run_json)["state"] == "interrupted"
    assert committed(job) == units
    assert job.run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_command_whose_time_is_over_and_run_again(job: Job, oracle: Job) -> None:
    """Before its first unit; then, unless the start alone took so long, while its second unit is under way."""
    assert job.run(run__stop_after_s=1e-6) == ExitCode.INTERRUPTED
    assert committed(job) == set()
    assert job.run("classify.unit[16]=delay:2.5", run__stop_after_s=2) == ExitCode.INTERRUPTED
    assert committed(job) <= {0, 1}
    assert "s (run.stop_after_s) are over; the same command continues" in job.last_line()
    assert job.run() == ExitCode.DONE
    assert_exactly_once(job, oracle)


def test_a_run_that_was_copied_is_whole(job: Job, oracle: Job) -> None:
    """Nothing in an output depends on where it stands."""
    assert job.run() == ExitCode.DONE
    moved = replace(job, out=job.folder / "moved")
    shutil.move(job.out, moved.out)
    assert_exactly_once(moved, oracle)
