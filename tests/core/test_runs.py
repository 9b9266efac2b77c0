from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from imgbatch.core import storage
from imgbatch.core.runs import RunPaths, choose_run_id, differing_fields, find_run, heartbeat, is_alive, list_runs
from imgbatch.errors import UsageError

FIRST, SECOND = "a" * 64, "b" * 64


def plan(out: Path, run_id: str, fingerprint: str, *, finished: bool, parent: str | None = None) -> RunPaths:
    paths = RunPaths(str(out), run_id)
    predicted_at = f"2026-01-01T00:00:{len(list_runs(str(out))):02d}"
    record = {"fingerprint": fingerprint, "fields": {"model": fingerprint}, "predicted_at": predicted_at}
    storage.write_json(paths.plan, {**record, "parent": parent})
    if finished:
        storage.create_if_absent(paths.success, b"")
    return paths


def choose(out: Path, fingerprint: str, *, new_run: bool = False, abandon: bool = False) -> str:
    return choose_run_id(str(out), fingerprint, {"model": fingerprint}, new_run=new_run, abandon=abandon)


def wait_for(uri: str) -> None:
    """Until there is such a file."""
    deadline = time.monotonic() + 60
    while not storage.exists(uri):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_empty_output_gets_the_fingerprints_run(tmp_path: Path) -> None:
    assert choose(tmp_path, FIRST) == "r" + "a" * 12


def test_the_same_fingerprint_is_the_same_run_finished_or_not(tmp_path: Path) -> None:
    run_id = choose(tmp_path, FIRST)
    paths = plan(tmp_path, run_id, FIRST, finished=False)
    assert choose(tmp_path, FIRST) == run_id
    assert choose(tmp_path, FIRST, new_run=True) == run_id  # an unfinished one is continued all the same
    storage.create_if_absent(paths.success, b"")
    assert choose(tmp_path, FIRST) == run_id
    assert choose(tmp_path, FIRST, new_run=True) == run_id + "-2"


def test_an_unfinished_second_run_is_continued_without_being_named(tmp_path: Path) -> None:
    run_id = choose(tmp_path, FIRST)
    plan(tmp_path, run_id, FIRST, finished=True)
    plan(tmp_path, run_id + "-2", FIRST, finished=False)
    assert choose(tmp_path, FIRST) == run_id + "-2"


def test_another_unfinished_run_is_in_the_way_until_it_is_given_up(tmp_path: Path) -> None:
    paths = plan(tmp_path, choose(tmp_path, FIRST), FIRST, finished=False)
    with pytest.raises(UsageError, match=r"run ra+ is unfinished .* \(model: a+… -> b+…\)"):
        choose(tmp_path, SECOND)
    assert choose(tmp_path, SECOND, abandon=True) == "r" + "b" * 12
    assert find_run(str(tmp_path), paths.run_id).abandoned
    assert choose(tmp_path, SECOND) == "r" + "b" * 12
    # Given up means given up: its settings again are another run.
    assert choose(tmp_path, FIRST) == paths.run_id + "-2"


def test_retries_do_not_stand_in_the_way_of_their_parents(tmp_path: Path) -> None:
    run_id = choose(tmp_path, FIRST)
    plan(tmp_path, run_id, FIRST, finished=True)
    plan(tmp_path, "rchild", SECOND, finished=False, parent=run_id)
    assert choose(tmp_path, FIRST) == run_id


def test_find_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run there"):
        find_run(str(tmp_path))
    plan(tmp_path, "r1", FIRST, finished=True)
    plan(tmp_path, "r2", SECOND, finished=True)
    assert find_run(str(tmp_path)).run_id == "r2"
    with pytest.raises(UsageError, match=r"--run r3: no such run .* r1, r2"):
        find_run(str(tmp_path), "r3")


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    paths = plan(tmp_path, "r1", FIRST, finished=False)
    Path(paths.plan).write_text("{")
    with pytest.raises(UsageError, match=r"plan\.json: not a readable plan"):
        list_runs(str(tmp_path))


def test_the_runs_of_an_object_store_take_two_requests_each(s3_bucket: str, tmp_path: Path) -> None:
    """And are those that a disk with the same files has; what is no run is none."""
    paths = [RunPaths(s3_bucket, f"r{number}") for number in range(4)]
    for number, run in enumerate(paths):
        predicted_at = f"2026-01-0{4 - number}"
        storage.write_json(run.plan, {"fingerprint": FIRST, "fields": {}, "predicted_at": predicted_at, "parent": None})
    storage.create_if_absent(paths[1].success, b"")
    storage.create_if_absent(paths[2].abandoned, b"")
    storage.replace(storage.join(s3_bucket, "runs", "rlost", "units", "unit-00000000.parquet"), b"")
    storage.replace(storage.join(s3_bucket, "runs", "notes.txt"), b"")
    for info in storage.list_files(s3_bucket):
        storage.replace(storage.join(str(tmp_path), info.uri.removeprefix(s3_bucket)), storage.read_bytes(info.uri))
    fs, _ = storage.filesystem(s3_bucket)
    sent: list[str] = []
    fs.s3.meta.events.register("before-send.s3", lambda event_name, **_: sent.append(event_name.rsplit(".", 1)[1]))
    found = list_runs(s3_bucket)
    assert [entry.run_id for entry in found] == ["r3", "r2", "r1", "r0"]
    assert [(entry.finished, entry.abandoned) for entry in found[1:3]] == [(False, True), (True, False)]
    of_disk = list_runs(str(tmp_path))
    assert [(run.run_id, run.plan, run.finished, run.abandoned) for run in found] == [
        (run.run_id, run.plan, run.finished, run.abandoned) for run in of_disk
    ]
    assert sent.count("GetObject") == len(paths)
    # One listing of `runs`, and one of each of the six names there.
    assert sent.count("ListObjectsV2") == len(sent) - len(paths) == 1 + len(paths) + 2


def test_an_output_without_runs_has_none(s3_bucket: str, tmp_path: Path) -> None:
    assert list_runs(storage.join(s3_bucket, "nothing")) == list_runs(str(tmp_path / "nothing")) == []
    assert list_runs("s3://no-such-bucket/out") == list_runs("memory://nothing") == []


def test_differing_fields_name_both_sides() -> None:
    assert differing_fields({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 4, "d": 5}) == [
        "b: 2 -> 4",
        "c: 3 -> None",
        "d: None -> 5",
    ]


@pytest.mark.parametrize(
    ("host", "pid", "age_s", "refused"),
    [
        (socket.gethostname(), os.getppid(), 5.0, True),
        (socket.gethostname(), os.getppid(), 120.0, False),
        (socket.gethostname(), 2**22 + 1, 5.0, False),  # larger than any process id: nobody lives there
    ],
)
def test_a_sign_of_life_is_respected(tmp_path: Path, host: str, pid: int, age_s: float, refused: bool) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    storage.write_json(paths.heartbeat, {"host": host, "pid": pid, "time": time.time() - age_s})
    if refused:
        with pytest.raises(UsageError, match="another driver works on it"), heartbeat(paths):
            pass
        return
    with heartbeat(paths):
        pass
    assert not Path(paths.heartbeat).exists()


@pytest.mark.parametrize("behind_s", [-3600.0, 0.0, 3600.0])
@pytest.mark.parametrize("works", [True, False])
def test_a_sign_from_another_host_is_one_of_life_if_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool, behind_s: float
) -> None:
    """Whatever its clock says."""
    monkeypatch.setattr("imgbatch.core.runs.HEARTBEAT_EVERY_S", 0.2)
    paths = RunPaths(str(tmp_path), "r1")
    ended = threading.Event()

    def beat() -> None:
        while True:
            storage.write_json(paths.heartbeat, {"host": "elsewhere", "pid": 1, "time": time.time() - behind_s})
            if not works or ended.wait(0.01):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        wait_for(paths.heartbeat)
        with pytest.raises(UsageError, match="1 on elsewhere") if works else contextlib.nullcontext(), heartbeat(paths):
            pass
    finally:
        ended.set()
        thread.join()


def test_a_run_that_is_worked_on_is_not_given_up(tmp_path: Path) -> None:
    paths = plan(tmp_path, choose(tmp_path, FIRST), FIRST, finished=False)
    storage.write_json(paths.heartbeat, {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()})
    with pytest.raises(UsageError, match="another driver works on it"):
        choose(tmp_path, SECOND, abandon=True)
    assert not storage.exists(paths.abandoned)
    storage.remove(paths.heartbeat)
    choose(tmp_path, SECOND, abandon=True)
    assert storage.exists(paths.abandoned)


def test_committed_units_are_found_however_many_there_are(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    for index in (0, 9_999, 10_000, 24_999):
        storage.replace(paths.unit_file(index), b"")
    storage.replace(storage.join(paths.units, ".unit-00000007.parquet.tmp"), b"")
    assert paths.committed_units(25_000) == {0, 9_999, 10_000, 24_999}


def test_a_store_that_is_away_does_not_end_the_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgbatch.core.runs.HEARTBEAT_EVERY_S", 0.01)
    paths = RunPaths(str(tmp_path), "r1")
    write, failures = storage.write_json, [OSError("away"), OSError("away")]

    def away_at_first(uri: str, value: object) -> None:
        if failures:
            raise failures.pop()
        write(uri, value)

    monkeypatch.setattr(storage, "write_json", away_at_first)
    with heartbeat(paths):
        wait_for(paths.heartbeat)


def test_a_sign_of_life_goes_stale(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    assert not is_alive(paths)
    with heartbeat(paths):
        wait_for(paths.heartbeat)
        assert is_alive(paths)
    storage.write_json(paths.heartbeat, {"host": "elsewhere", "pid": 1, "time": time.time() - 3600})
    assert not is_alive(paths)


@pytest.mark.parametrize("written", ["{path}", "{path}/", "file://{path}", "{path}//x/.."])
def test_a_run_has_one_name_however_its_directory_is_written(tmp_path: Path, written: str) -> None:
    out = RunPaths(written.format(path=tmp_path), "r1").out
    assert Path(out).resolve() == tmp_path
    assert out.startswith("/")
