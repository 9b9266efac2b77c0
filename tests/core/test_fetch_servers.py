"""What the clients that get objects send, and to whom; against a server of the test."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config import FetchConfig, StorageConfig
from imgbatch.core import s3, storage
from imgbatch.core.fetch import Fetcher
from imgbatch.core.fetch_objects import ClientName
from imgbatch.errors import RowError, Status
from tests.core.answering import Answer, Asked, answering

ACCESS_POINT = "arn:aws:s3:us-east-1:123456789012:accesspoint/nights"
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
SESSION = (
    b"<CreateSessionResult><Credentials><SessionToken>token</SessionToken><SecretAccessKey>key</SecretAccessKey>"
    b"<AccessKeyId>id</AccessKeyId><Expiration>2100-01-01T00:00:00Z</Expiration></Credentials></CreateSessionResult>"
)


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ClientName:
    """Each in turn; both have a key."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def server() -> Iterator[tuple[str, list[Asked]]]:
    """Its port, and what it was asked: it has every object, all buckets are empty, and *.test is its name too."""

    def answer(asked: Asked) -> Answer:
        if "list-type" in asked.path:
            return Answer(body=LISTING)
        return Answer(body=SESSION if "session" in asked.path.partition("?")[2] else b"image")

    with answering(answer) as (url, requests):
        yield url.rpartition(":")[2], requests
    storage.configure(StorageConfig())


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name below store.test is this machine's, for whatever of Python asks."""
    resolve: Callable[..., Any] = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        is_ours = isinstance(host, str) and host.endswith("store.test")
        return resolve("127.0.0.1" if is_ours else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def fetch(uri: str, **config: Any) -> bytes | RowError:
    with Fetcher(FetchConfig.model_validate({"retries": 0, **config})) as fetcher:
        (fetched,) = fetcher.fetch([uri])
    return fetched


def was_asked_by(asked: Asked) -> str:
    return "obstore" if asked.headers["user-agent"].startswith("object_store") else "s3fs"


@pytest.mark.parametrize("requester_pays", [True, False])
def test_who_pays_is_said_in_every_request(
    requester_pays: bool, client: ClientName, server: tuple[str, list[Asked]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, requests = server
    storage.configure(StorageConfig(endpoint_url=f"http://127.0.0.1:{port}", requester_pays=requester_pays))
    monkeypatch.setattr(storage, "_filesystems", {})
    opened: list[Any] = []

    def open_filesystem(*arguments: Any, **options: Any) -> Any:
        fs = open_s3(*arguments, **options)
        fs.req_kw = {}  # which versions of s3fs before 2026.9 leave out of most requests
        opened.append(fs)
        return fs

    open_s3 = s3.open_filesystem
    monkeypatch.setattr(s3, "open_filesystem", open_filesystem)
    assert fetch("s3://images/a.jpg", client=client) == b"image"
    assert storage.list_files("s3://images/night") == []
    assert len(opened) == 2
    assert [was_asked_by(asked) for asked in requests] == [client, "s3fs"]
    expected = "requester" if requester_pays else None
    assert [asked.headers.get("x-amz-request-payer") for asked in requests] == [expected] * 2


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("bucket", "host"),
    [
        (ACCESS_POINT, "nights-123456789012.store.test"),
        ("nights-a1b2c3-s3alias", None),
        ("nights-a1b2c3--ol-s3", None),
        ("nights--use1-az4--x-s3", None),
        ("nights--use1-az4--xa-s3", None),
    ],
)
def test_buckets_that_are_a_part_of_a_hosts_name_are_for_s3fs(
    bucket: str, host: str | None, client: ClientName, server: tuple[str, list[Asked]]
) -> None:
    port, requests = server
    storage.configure(StorageConfig(endpoint_url=f"http://store.test:{port}"))
    assert fetch(f"s3://{bucket}/folder/a.jpg", client=client) == b"image"
    asked = requests[-1]
    assert was_asked_by(asked) == "s3fs"
    assert asked.path.endswith("/folder/a.jpg")
    assert host is None or asked.headers["host"] == f"{host}:{port}"


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize("style", ["virtual", "path"])
def test_a_server_that_wants_buckets_in_hosts_names_gets_them(
    style: str,
    client: ClientName,
    server: tuple[str, list[Asked]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, requests = server
    config = tmp_path / "config"
    config.write_text(f"[default]\ns3 =\n  addressing_style = {style}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    host = "store.test" if style == "virtual" else "127.0.0.1"
    storage.configure(StorageConfig(endpoint_url=f"http://{host}:{port}"))
    assert fetch("s3://images/a.jpg", client=client) == b"image"
    (asked,) = requests
    if style == "virtual":
        assert (asked.headers["host"], asked.path) == (f"images.{host}:{port}", "/a.jpg")
    else:
        assert (was_asked_by(asked), asked.path) == (client, "/images/a.jpg")


@pytest.mark.parametrize("hedge_after_s", [None, 0.05])
def test_what_took_too_long_says_which_setting_says_so(client: ClientName, hedge_after_s: float | None) -> None:
    go_on = threading.Event()
    with answering(lambda _: Answer(wait=go_on)) as (url, _):
        storage.configure(StorageConfig(endpoint_url=url))
        error = fetch("s3://images/a.jpg", client=client, timeout_s=0.2, hedge_after_s=hedge_after_s)
        go_on.set()
    storage.configure(StorageConfig())
    assert isinstance(error, RowError)
    assert error.status is Status.FETCH_FAILED
    assert re.match(r"TimeoutError: no whole answer in 0\.2 s \(fetch\.timeout_s\)", error.message)


def test_a_connection_that_does_not_come_about_is_told_from_an_answer(client: ClientName) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        # Once its queue is full, Linux leaves further connections waiting.
        queued = [socket.socket() for _ in range(4)]
        for waiting in queued:
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        storage.configure(
            StorageConfig(endpoint_url=f"http://127.0.0.1:{listening.getsockname()[1]}", connect_timeout_s=0.2)
        )
        error = fetch("s3://images/a.jpg", client=client, timeout_s=20)
        for waiting in queued:
            waiting.close()
    storage.configure(StorageConfig())
    assert isinstance(error, RowError)
    assert error.status is Status.FETCH_FAILED
    assert re.search("storage.connect_timeout_s" if client == "obstore" else "Connect timeout", error.message)
