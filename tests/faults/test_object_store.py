"""An object store in trouble: the whole job through the local engine, with a server that fails as real ones do.

What passes leaves no trace in the result; what does not is a row's status, or one line and an exit code.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.errors import ExitCode
from tests.faults.conftest import SETTINGS, Job, assert_exactly_once, is_stopped, outcomes, wait_until
from tests.faults.drivers import driver
from tests.faults.proxy import Fault, FaultyServer, faulty_server

IMAGES = r"photo0(10|33|77)\."
"""Three of them, which the sample before the run does not look at."""
UNITS = r"unit-0000000[25]\.parquet"
MANIFEST = r"/manifest\.parquet"


@dataclass(frozen=True)
class ObjectJob(Job):
    """Images, manifest and output are objects; ``manifest`` is a local copy of theirs."""

    base: str = ""
    """``s3://`` and the bucket."""

    def arguments(self, **changed: object) -> list[str]:
        there = {str(self.manifest): f"{self.base}/manifest.parquet", str(self.out): f"{self.base}/out"}
        return [there.get(argument, argument) for argument in super().arguments(**changed)]

    def brought_home(self) -> Job:
        """The job with its output on this machine: nothing in an output depends on where it stands."""
        prefix = storage.listing_prefix(f"{self.base}/out")
        for info in storage.list_files(f"{self.base}/out"):
            path = self.out / info.uri.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read_bytes(info.uri))
        return Job(self.manifest, self.model, self.out, self.folder)

    def units(self) -> list[str]:
        """Unit files that are there."""
        return [info.uri for info in storage.list_files(f"{self.base}/out") if "/units/" in info.uri]


@pytest.fixture
def server(s3_server: str) -> Iterator[tuple[str, FaultyServer]]:
    """URL and the faults of a server that passes on to the test's own."""
    with faulty_server(s3_server) as started:
        yield started


@pytest.fixture
def faults(server: tuple[str, FaultyServer]) -> FaultyServer:
    return server[1]


@pytest.fixture
def object_job(
    photos: list[Path],
    photo_manifest: Path,
    tiny_model: ModelBundle,
    tmp_path: Path,
    s3_bucket: str,
    server: tuple[str, FaultyServer],
) -> ObjectJob:
    """120 photos as objects, in units of 16; every command asks the faulty server."""

    def upload(path: Path) -> str:
        uri = storage.join(s3_bucket, "images", path.name)
        storage.replace(uri, path.read_bytes())
        return uri

    with ThreadPoolExecutor(8) as pool:
        uris = list(pool.map(upload, photos))
    table = pq.read_table(photo_manifest)
    manifest = tmp_path / "objects.parquet"
    pq.write_table(table.set_column(0, "uri", pa.array(uris)).append_column("image_id", table["uri"]), manifest)
    storage.replace(storage.join(s3_bucket, "manifest.parquet"), manifest.read_bytes())
    settings = {
        **SETTINGS,
        "output.keep_units": False,
        "storage.endpoint_url": server[0],
        "storage.read_timeout_s": 2,
        "fetch.timeout_s": 2,
    }
    return ObjectJob(manifest, tiny_model.path, tmp_path / "out", tmp_path, settings, base=s3_bucket)


def assert_no_trace(job: ObjectJob, oracle: Job, faults: FaultyServer, *, at_least: int) -> None:
    """The result is that of a run without faults, although there were some."""
    assert len(faults.acted) >= at_least, faults.acted
    assert_exactly_once(job.brought_home(), oracle)


def test_what_passes_leaves_no_trace(object_job: ObjectJob, oracle: Job, faults: FaultyServer) -> None:
    """The commonest fault of each kind of request; all others, one at a time, are in the soak below."""
    faults.faults = [
        Fault("GET", IMAGES, "503", times=1),
        Fault("GET", MANIFEST, "truncate", times=1),
        Fault("PUT", UNITS, "lost", times=1),
    ]
    assert object_job.run() == ExitCode.DONE, object_job.log.read_text()
    assert_no_trace(object_job, oracle, faults, at_least=6)


@pytest.mark.skipif("IMGBATCH_TEST_S3" in os.environ, reason="that server may check signatures, which hold the header")
def test_where_the_server_ignores_the_condition_the_last_writer_wrote_the_same_rows(
    object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    """A driver stands still before a commit, another one finishes, and the first then writes over its units."""
    faults.faults = [Fault("PUT", "", "unconditional")]
    job = replace(object_job, settings=object_job.settings | {"output.keep_units": True})
    with driver(job.arguments(), job.log, job.environment("commit.before[2]=stop")) as zombie:
        wait_until(lambda: is_stopped(zombie.pid))
        (sign_of_life,) = (info.uri for info in storage.list_files(f"{job.base}/out") if "heartbeat" in info.uri)
        storage.remove(sign_of_life)  # a minute without another would do the same
        assert job.run() == ExitCode.DONE, job.log.read_text()
        before = {uri: storage.file_info(uri).version for uri in job.units()}
        faults.acted.clear()
        os.kill(zombie.pid, signal.SIGCONT)
        assert zombie.wait() == ExitCode.DONE, job.log.read_text()
    overwritten = {path.rpartition("/")[2] for _, path, _ in faults.acted if "/units/" in path}
    assert overwritten == {f"unit-{unit:08d}.parquet" for unit in range(2, 8)}
    assert {uri: storage.file_info(uri).version for uri in job.units()} == before
    assert "this server ignores If-None-Match; of two drivers at once, the last to write" in job.log.read_text()
    assert_exactly_once(job.brought_home(), oracle)


@pytest.mark.soak
@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize("action", ["503", "500", "reset", "lost", "truncate", "slow:4"])
def test_an_image_that_comes_at_the_third_attempt(
    action: str, client: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    faults.faults = [Fault("GET", IMAGES, action, times=2)]
    assert object_job.run(fetch__client=client) == ExitCode.DONE, object_job.log.read_text()
    assert_no_trace(object_job, oracle, faults, at_least=6)


@pytest.mark.soak
@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_images_that_do_not_come_are_rows_that_say_why(
    client: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    actions = {10: "404", 11: "403", 12: "500", 13: "reset", 14: "truncate", 15: "slow:4"}
    faults.faults = [Fault("GET", f"photo{row:03d}", action) for row, action in actions.items()]
    assert object_job.run(fetch__client=client, fetch__retries=2) == ExitCode.DONE, object_job.log.read_text()
    statuses = {10: "NOT_FOUND", 11: "FORBIDDEN"} | dict.fromkeys((12, 13, 14, 15), "FETCH_FAILED")
    home = object_job.brought_home()
    assert outcomes(home) == [
        (*row[:2], statuses[row[0]], None, row[4]) if row[0] in statuses else row for row in outcomes(oracle)
    ]
    errors = pa.concat_tables(pq.read_table(path, partitioning=None) for path in home.out.glob("errors/*/*.parquet"))
    rows = {row["row_id"]: row for row in errors.to_pylist()}
    assert {row: (rows[row]["error_stage"], rows[row]["attempts"]) for row in statuses} == {
        row: ("fetch", 1 if row < 12 else 3) for row in statuses
    }


@pytest.mark.soak
def test_images_forbidden_for_a_moment_are_asked_for_again(
    object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    """As while a policy or a role is being changed: units with them wait for another pass."""
    faults.faults = [Fault("GET", IMAGES, "403", times=1)]
    assert object_job.run(errors__max_rate=0.05) == ExitCode.DONE, object_job.log.read_text()
    assert_no_trace(object_job, oracle, faults, at_least=3)


@pytest.mark.soak
@pytest.mark.parametrize("action", ["403", "reset"])
def test_a_store_that_is_lost_in_the_middle_stops_the_run(
    action: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    """Credentials that expire, a network that goes down; once that is put right the same command labels everything."""
    asked: list[str] = []

    def choose(method: str, path: str) -> str | None:
        if method != "GET" or "/images/" not in path:
            return None
        asked.append(path)
        return action if len(asked) > 60 else None

    faults.choose = choose
    patience = {"errors__max_rate": 0.2, "errors__min_rows": 32, "fetch__retries": 1}
    assert object_job.run(**patience) == ExitCode.ERROR_BUDGET, object_job.log.read_text()
    assert ("FORBIDDEN" if action == "403" else "FETCH_FAILED") in object_job.last_line()
    assert 0 < len(object_job.units()) < 5
    faults.choose = lambda *_: None
    assert object_job.run(**patience) == ExitCode.DONE
    assert_no_trace(object_job, oracle, faults, at_least=20)


@pytest.mark.soak
@pytest.mark.parametrize("action", ["503", "500", "409", "reset", "lost", "slow:4"])
def test_a_units_write_that_succeeds_at_the_third_attempt(
    action: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    """``lost``, and ``slow`` beyond the client's patience: it was written, and who wrote it does not know."""
    faults.faults = [Fault("PUT", UNITS, action, times=2)]
    assert object_job.run() == ExitCode.DONE, object_job.log.read_text()
    # Once the object is there, the second attempt hears that it is.
    assert_no_trace(object_job, oracle, faults, at_least=2 if action in ("lost", "slow:4") else 4)


@pytest.mark.soak
@pytest.mark.parametrize("action", ["403", "503", "reset"])
def test_a_unit_that_cannot_be_written_is_one_line(
    action: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    faults.faults = [Fault("PUT", UNITS, action)]
    assert object_job.run() == ExitCode.FAILED, object_job.log.read_text()
    assert "unit-00000002.parquet" in object_job.last_line()
    assert "Traceback" not in object_job.log.read_text()
    assert len(object_job.units()) < 8
    faults.faults = []
    assert object_job.run() == ExitCode.DONE
    assert_no_trace(object_job, oracle, faults, at_least=1)


@pytest.mark.soak
@pytest.mark.parametrize("action", ["503", "reset", "lost", "truncate", "slow:4"])
def test_a_manifest_that_comes_at_the_third_attempt(
    action: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    faults.faults = [Fault("GET", MANIFEST, action, times=2), Fault("HEAD", MANIFEST, action, times=1)]
    assert object_job.run() == ExitCode.DONE, object_job.log.read_text()
    assert_no_trace(object_job, oracle, faults, at_least=2)


@pytest.mark.soak
@pytest.mark.parametrize("action", ["404", "403", "503", "reset", "truncate"])
def test_a_manifest_that_does_not_come_is_one_line(
    action: str, object_job: ObjectJob, oracle: Job, faults: FaultyServer
) -> None:
    faults.faults = [Fault(method, MANIFEST, action) for method in ("GET", "HEAD")]
    assert object_job.run() == ExitCode.USAGE, object_job.log.read_text()
    assert f"{object_job.base}/manifest.parquet: " in object_job.last_line()
    assert "Traceback" not in object_job.log.read_text()
    faults.faults = []
    assert object_job.run() == ExitCode.DONE
    assert_no_trace(object_job, oracle, faults, at_least=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_any_request_may_fail_now_and_then(seed: int, object_job: ObjectJob, oracle: Job, faults: FaultyServer) -> None:
    """Whatever it is for: listings, plans, rows, units, output files. One request in ten."""
    draw = random.Random(seed)

    def choose(method: str, _path: str) -> str | None:
        if draw.random() > 0.1:
            return None
        return draw.choice(["503", "500", "reset", "lost", *(["truncate"] if method == "GET" else [])])

    faults.choose = choose
    assert object_job.run() == ExitCode.DONE, object_job.log.read_text()
    assert_no_trace(object_job, oracle, faults, at_least=15)


@pytest.mark.soak
def test_a_wrong_endpoint_and_then_the_right_one(object_job: ObjectJob, oracle: Job, faults: FaultyServer) -> None:
    """Nobody listens there, so not even the manifest can be had; the same command with the right one does it all."""
    wrong = replace(object_job, settings=object_job.settings | {"storage.endpoint_url": "http://127.0.0.1:1"})
    assert wrong.run() == ExitCode.USAGE
    assert f"{object_job.base}/manifest.parquet: " in object_job.last_line()
    assert object_job.run() == ExitCode.DONE
    assert_no_trace(object_job, oracle, faults, at_least=0)
