from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config import FetchConfig, IfChanged, StorageConfig
from imgbatch.core import fetch, retry, storage
from imgbatch.core.fetch import Fetcher
from imgbatch.errors import RowError, Stage, Status


def fetch_all(uris: list[str | None], **config: float) -> list[bytes | RowError]:
    with Fetcher(FetchConfig(**config)) as fetcher:  # type: ignore[arg-type]
        return list(fetcher.fetch(uris))


def fetch_error(uri: str | None, **config: float) -> RowError:
    (outcome,) = fetch_all([uri], **config)
    assert isinstance(outcome, RowError)
    assert outcome.stage is Stage.FETCH
    return outcome


def test_local_files_come_in_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.bin" for index in range(50)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * index)
    uris = [str(path) if index % 2 else path.as_uri() for index, path in enumerate(paths)]
    with Fetcher(FetchConfig(in_flight=3)) as fetcher:
        assert list(fetcher.fetch(uris)) == [bytes([index]) * index for index in range(50)]
        assert list(fetcher.fetch([])) == []
        assert fetcher.fetch_s > 0


def test_what_is_not_a_file_says_so(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    assert fetch_error(str(tmp_path / "none")).status is Status.NOT_FOUND
    assert fetch_error(str(tmp_path / "file" / "below")).status is Status.NOT_FOUND
    assert fetch_error(str(tmp_path)) == RowError(Status.NOT_FOUND, Stage.FETCH, "a directory, not a file")
    assert fetch_error(str(tmp_path / "pipe")).status is Status.REFUSED
    assert fetch_error("/dev/zero").status is Status.REFUSED
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for no_path in ("nul\0byte", "loop", "x" * 300):
        assert fetch_error(str(tmp_path / no_path)).status is Status.NOT_FOUND
        assert fetch_error(str(tmp_path / no_path), roots=(str(tmp_path),)).status is Status.NOT_FOUND  # type: ignore[arg-type]
    assert fetch_error(None).status is fetch_error("").status is Status.NOT_FOUND


def fail_to_open(monkeypatch: pytest.MonkeyPatch, code: int, name: str, times: int = 99) -> None:
    """Files of that name cannot be opened, for the first few times."""
    open_descriptor, left = os.open, [None] * times

    def refused(path: Any, *arguments: Any, **settings: Any) -> int:
        if Path(path).name == name and left:
            left.pop()
            raise OSError(code, os.strerror(code), str(path))
        return open_descriptor(path, *arguments, **settings)

    monkeypatch.setattr(os, "open", refused)


WITHOUT_DESCRIPTORS = """
import resource, sys
from imgbatch.config import FetchConfig
from imgbatch.core import fetch

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

def others_close_theirs(*_, **__):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return 0.0

fetch.backoff_s = others_close_theirs
with fetch.Fetcher(FetchConfig(retries=1)) as fetcher:
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    found = list(fetcher.fetch(sys.argv[1:]))
print(found)
"""


def test_a_file_is_read_when_there_are_descriptors_again(tmp_path: Path) -> None:
    """In a process of its own: without descriptors, whatever else ran beside it would fail."""
    (tmp_path / "file").write_bytes(b"x")
    command = [sys.executable, "-c", WITHOUT_DESCRIPTORS, str(tmp_path / "file")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[b'x']\n"


@pytest.mark.parametrize("code", [errno.ENFILE, errno.ENOMEM])
def test_what_a_machine_ran_out_of_may_be_there_again(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(retry, "FIRST_BACKOFF_S", 0.01)
    fail_to_open(monkeypatch, code, "file", times=2)
    assert fetch_all([str(tmp_path / "file")], retries=2) == [b"x"]


def test_a_file_comes_whole_from_reads_that_bring_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "shard.tar").write_bytes(content)
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: read(descriptor, min(size, 7), offset))
    part = f"{tmp_path}/shard.tar#bytes=50-149"
    assert fetch_all([str(tmp_path / "file"), part], max_bytes=200) == [content, content[50:150]]


def test_a_file_that_grows_while_it_is_read_is_held_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    read = os.pread

    def written_to(descriptor: int, size: int, offset: int) -> bytes:
        with (tmp_path / "file").open("ab") as file:
            file.write(bytes(1000))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", written_to)
    error = fetch_error(str(tmp_path / "file"), max_bytes=5000)
    assert (error.status, error.message) == (
        Status.TOO_LARGE,
        "the file has grown to more than fetch.max_bytes (5000) allows",
    )


def test_a_file_that_may_not_be_read_is_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    if os.access(tmp_path / "secret", os.R_OK):  # by root, who is refused nothing: as it is for others
        fail_to_open(monkeypatch, errno.EACCES, "secret")
    error = fetch_error(str(tmp_path / "secret"))
    assert (error.status, error.attempts) == (Status.FORBIDDEN, 1)


def test_a_file_over_the_limit_is_too_large(tmp_path: Path) -> None:
    (tmp_path / "ten").write_bytes(bytes(10))
    assert fetch_all([str(tmp_path / "ten")], max_bytes=10) == [bytes(10)]
    error = fetch_error(str(tmp_path / "ten"), max_bytes=9)
    assert error.status is Status.TOO_LARGE
    assert "fetch.max_bytes" in error.message


@pytest.mark.parametrize(
    "uri", ["https://example.com/a.jpg?token=x", "http://169.254.169.254/", "memory://a", "zip://a::s3://b/c"]
)
def test_other_schemes_are_refused(uri: str) -> None:
    error = fetch_error(uri)
    assert (error.status, error.attempts) == (Status.REFUSED, 1)
    assert "file, s3" in error.message


class ObjectServer(ThreadingHTTPServer):
    """As much of S3 as reading takes; a key like ``503x2`` answers that status so many times before its content.

    ``503x2then500``: that status from then on.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ObjectHandler)
        self.requests: Counter[str] = Counter()
        self.paths: list[str] = []
        """Of the requests as they came, without their queries."""
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.stalled = threading.Event()
        """Set: the requests that stall go on."""


class ObjectHandler(BaseHTTPRequestHandler):
    server: ObjectServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        key = path.rpartition("/")[2]
        with self.server.lock:
            self.server.paths.append(path)
            self.server.requests[key] += 1
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
            seen = self.server.requests[key]
        status, _, times = key.partition("x")
        times, _, then = times.partition("then")
        if key.startswith("slow"):
            time.sleep(0.05)
        if key.startswith("stuck"):
            time.sleep(2)
        if key.startswith("stalls") and seen <= int(key[6:]):
            self.server.stalled.wait(30)
        # Before the answer, upon which the client may send its next request at once.
        with self.server.lock:
            self.server.busy -= 1
        if times and seen <= int(times):
            self.refuse(status)
        elif then:
            self.refuse(then)
        elif key == "reset":
            self.connection.close()
        else:
            content = b"" if key == "empty" else key.encode() * 10
            self.answer(200, content, length=len(content) + (key == "short"))

    def refuse(self, status: str) -> None:
        self.answer(int(status), b"<Error><Code>%s</Code><Message>no</Message></Error>" % status.encode())

    def answer(self, status: int, body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", '"etag-1"')
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # whoever gave up waiting has gone
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(params=["s3fs", "obstore"])
def objects(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    """The server, and each of the clients in turn as the one that ``auto`` means."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(fetch, "choose_client", lambda _: request.param)
    with ObjectServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        storage.configure(StorageConfig(endpoint_url=f"http://127.0.0.1:{server.server_port}"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(retry, "FIRST_BACKOFF_S", 0.01)
        monkeypatch.setattr(retry, "MAX_BACKOFF_S", 0.02)
        yield server
        server.stalled.set()
        server.shutdown()
        storage.configure(StorageConfig())


def test_objects_come_in_order_with_many_requests_in_flight(objects: ObjectServer) -> None:
    uris = [f"s3://bucket/slow{index}" for index in range(40)]
    assert fetch_all(uris, in_flight=8) == [f"slow{index}".encode() * 10 for index in range(40)]  # type: ignore[arg-type]
    assert 2 <= objects.most_busy <= 8
    assert set(objects.requests.values()) == {1}


@pytest.mark.usefixtures("objects")
def test_failures_that_may_pass_are_tried_again() -> None:
    statuses = (429, 500, 503)
    uris = [f"s3://bucket/{status}x2" for status in statuses]
    assert fetch_all(uris, retries=2) == [f"{status}x2".encode() * 10 for status in statuses]  # type: ignore[arg-type]


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("http_status", [500, 503])
def test_failures_that_go_on_give_up_after_the_retries(http_status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "THROTTLED_PATIENCE_S", 0.0)
    error = fetch_error(f"s3://bucket/{http_status}x99", retries=3)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 4)


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("http_status", [429, 503])
def test_what_is_turned_away_for_its_number_is_asked_for_with_patience(http_status: int) -> None:
    """As S3 does for minutes, until it has spread a prefix; other failures have their own tries."""
    assert fetch_all([f"s3://bucket/{http_status}x9"], retries=2) == [f"{http_status}x9".encode() * 10]
    error = fetch_error(f"s3://bucket/{http_status}x9then500", retries=2)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 12)


@pytest.mark.usefixtures("objects")
def test_without_retries_there_is_no_patience_either() -> None:
    assert fetch_error("s3://bucket/503x1", retries=0).attempts == 1


@pytest.mark.parametrize(("http_status", "expected"), [(404, Status.NOT_FOUND), (403, Status.FORBIDDEN)])
def test_failures_that_will_not_pass_are_tried_once(objects: ObjectServer, http_status: int, expected: Status) -> None:
    error = fetch_error(f"s3://bucket/{http_status}x9")
    assert (error.status, error.attempts) == (expected, 1)
    assert objects.requests[f"{http_status}x9"] == 1


@pytest.mark.usefixtures("objects")
def test_a_request_that_takes_too_long_may_pass() -> None:
    error = fetch_error("s3://bucket/stuck", timeout_s=0.2, retries=1)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 2)


def test_a_server_that_is_not_there_may_come_back(objects: ObjectServer) -> None:
    storage.configure(StorageConfig(endpoint_url="http://127.0.0.1:9"))
    error = fetch_error("s3://bucket/key", retries=1)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 2)
    assert objects.requests.total() == 0


@pytest.mark.usefixtures("objects")
def test_a_large_object_is_not_read_whole_and_an_empty_one_is_empty() -> None:
    assert fetch_all(["s3://bucket/abcde", "s3://bucket/empty"], max_bytes=50) == [b"abcde" * 10, b""]
    assert fetch_error("s3://bucket/abcde", max_bytes=49).status is Status.TOO_LARGE


@pytest.mark.usefixtures("objects")
def test_a_server_that_ignores_ranges_is_named() -> None:
    for whole in ("s3://bucket/shard.tar#bytes=512-600", "s3://bucket/shard.tar#bytes=0-3"):
        error = fetch_error(whole, max_bytes=100)
        assert (error.status, error.attempts) == (Status.FETCH_FAILED, 1)
        assert "the server ignores Range" in error.message


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("key", ["reset", "short"])
def test_a_connection_that_breaks_may_hold_the_next_time(key: str) -> None:
    error = fetch_error(f"s3://bucket/{key}", retries=1)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 2)


@pytest.mark.usefixtures("objects")
def test_an_object_that_changed_is_an_error_or_counted_or_nothing() -> None:
    uris: list[str | None] = ["s3://bucket/a", "s3://bucket/b", "s3://bucket/c", "s3://bucket/d"]
    etags = ['"etag-1"', "other", None, 'W/"etag-1"']
    outcomes: dict[str, tuple[object, int]] = {}
    modes: tuple[IfChanged, ...] = ("error", "warn", "ignore")
    for mode in modes:
        with Fetcher(FetchConfig(), if_changed=mode) as fetcher:
            first, second, third, fourth = fetcher.fetch(uris, etags)
            assert (first, third, fourth) == (b"a" * 10, b"c" * 10, b"d" * 10)
            outcomes[mode] = (second.status if isinstance(second, RowError) else second, fetcher.num_changed)
    assert outcomes == {"error": (Status.CHANGED, 1), "warn": (b"b" * 10, 1), "ignore": (b"b" * 10, 0)}


@pytest.mark.usefixtures("objects")
def test_odd_keys_are_taken_as_they_are(objects: ObjectServer) -> None:
    asked = {
        "a b?c#d%20e": "a%20b%3Fc%23d%2520e",
        "t\ta\x7fb": "t%09a%7Fb",
        "x//y": "x//y",
        "/leading": "/leading",
        "a+b": "a%2Bb",
        "ü/日": "%C3%BC/%E6%97%A5",
        "a/../b": "a/../b",
        "a/./b": "a/./b",
    }
    outcomes = fetch_all([*(f"s3://bucket/{key}" for key in asked), "s3://bucket", "s3://bucket/"])
    assert [type(outcome) for outcome in outcomes[:-2]] == [bytes] * len(asked)
    assert [error.status for error in outcomes[-2:] if isinstance(error, RowError)] == [Status.NOT_FOUND] * 2
    assert Counter(objects.paths) == Counter(f"/bucket/{path}" for path in asked.values())


def test_without_credentials_everything_is_forbidden(
    objects: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    error = fetch_error("s3://bucket/key")
    assert (error.status, error.attempts) == (Status.FORBIDDEN, 1)
    assert objects.requests.total() == 0


SIGNED_IN_ONCE = """
[profile night]
region = us-east-1
sso_account_id = 111122223333
sso_role_name = night
sso_region = us-east-1
sso_start_url = https://127.0.0.1:9/start
"""
WITH_A_SESSION = (
    SIGNED_IN_ONCE.replace("sso_region", "sso_session = night\nsso_region", 1)
    + """
[sso-session night]
sso_region = us-east-1
sso_start_url = https://127.0.0.1:9/start
"""
)


@pytest.mark.parametrize("profile", [SIGNED_IN_ONCE, WITH_A_SESSION], ids=["profile", "session"])
def test_who_has_to_sign_in_again_is_forbidden(
    profile: str, objects: ObjectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(profile)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.configure(StorageConfig(endpoint_url=storage.settings().endpoint_url, profile="night"))
    error = fetch_error("s3://bucket/key", retries=1)
    assert (error.status, error.attempts) == (Status.FORBIDDEN, 1), error.message
    assert objects.requests.total() == 0


def test_giving_up_half_way_leaves_no_thread(objects: ObjectServer) -> None:
    with Fetcher(FetchConfig(in_flight=4)) as fetcher:
        rows = fetcher.fetch([f"s3://bucket/slow{index}" for index in range(1000)])
        assert next(rows) == b"slow0" * 10
        rows.close()  # type: ignore[attr-defined]
    assert objects.requests.total() < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_the_first_requests_leave_before_anybody_asks_for_the_content(objects: ObjectServer) -> None:
    with Fetcher(FetchConfig(in_flight=4)) as fetcher:
        rows = fetcher.fetch([f"s3://bucket/key{index}" for index in range(20)])
        deadline = time.monotonic() + 20
        while objects.requests.total() < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(list(rows)) == 20
    assert objects.requests.total() == 20


def test_several_threads_fetch_at_once_each_its_own(objects: ObjectServer) -> None:
    with Fetcher(FetchConfig(in_flight=4)) as fetcher, ThreadPoolExecutor(3) as pool:
        uris = [[f"s3://bucket/{name}{index}" for index in range(15)] for name in ("a", "b", "c")]
        found = list(pool.map(lambda own: list(fetcher.fetch(own)), uris))
    assert found == [[f"{name}{index}".encode() * 10 for index in range(15)] for name in ("a", "b", "c")]
    assert objects.most_busy <= 4


def fetch_connected(uris: list[str | None], **config: float) -> list[bytes | RowError]:
    """By a client that has fetched before: the start of the first one takes longer than a request."""
    with Fetcher(FetchConfig(retries=0, **config)) as fetcher:  # type: ignore[arg-type]
        assert list(fetcher.fetch(["s3://bucket/first"])) == [b"first" * 10]
        return list(fetcher.fetch(uris))


def test_a_request_that_stalls_is_overtaken_by_a_second(objects: ObjectServer) -> None:
    """The server answers the first only after the test."""
    uris: list[str | None] = [f"s3://bucket/{key}" for key in ("stalls1", "quick", "404x9")]
    stalled, quick, missing = fetch_connected(uris, hedge_after_s=2.0)
    assert (stalled, quick) == (b"stalls1" * 10, b"quick" * 10)
    assert isinstance(missing, RowError)
    assert missing.status is Status.NOT_FOUND
    assert objects.requests["stalls1"] == 2
    assert objects.requests["404x9"] == 1


def test_without_hedging_a_request_is_waited_for(objects: ObjectServer) -> None:
    (error,) = fetch_connected(["s3://bucket/stalls1"], timeout_s=3.0)
    assert isinstance(error, RowError)
    assert (error.status, objects.requests["stalls1"]) == (Status.FETCH_FAILED, 1)


def test_when_both_requests_stall_the_timeout_holds(objects: ObjectServer) -> None:
    (error,) = fetch_connected(["s3://bucket/stalls9"], hedge_after_s=0.2, timeout_s=3.0)
    assert isinstance(error, RowError)
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 1)
    assert objects.requests["stalls9"] == 2
