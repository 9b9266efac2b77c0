"""Storage against a real S3 server, and the answers of servers that are odd."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from imgbatch.config import StorageConfig
from imgbatch.core import retry, s3, storage
from imgbatch.errors import UsageError
from tests.faults.proxy import Fault, FaultyServer, faulty_server

YEAR_S = 365 * 86_400.0


def put(uri: str, data: bytes = b"x") -> None:
    storage.replace(uri, data)


def test_the_first_of_many_writers_at_once_wins(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "runs", "unit.bin")
    contents = [str(number).encode() * 1000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(lambda data: storage.create_if_absent(uri, data), contents))
    assert created.count(True) == 1
    assert storage.read_bytes(uri) == contents[created.index(True)]
    assert not storage.create_if_absent(uri, b"late")


def test_a_large_commit_is_one_request(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "large")
    assert storage.create_if_absent(uri, bytes(120 * 2**20))
    info = storage.file_info(uri)
    assert info.size == 120 * 2**20
    assert "-" not in info.version  # the ETag of an upload in parts says in how many


def test_a_staged_file_is_an_object_and_a_failed_one_is_none(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "deep", "part.parquet")
    with storage.staged_file(uri) as path:
        path.write_bytes(b"whole")
    assert storage.read_bytes(uri) == b"whole"
    assert not path.exists()

    def fail() -> None:
        with storage.staged_file(storage.join(s3_bucket, "half")) as path:
            path.write_bytes(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert [info.uri for info in storage.list_files(s3_bucket)] == [uri]


def test_readers_see_the_same_bytes(s3_bucket: str) -> None:
    uri, data = storage.join(s3_bucket, "file"), bytes(range(256)) * 40_000
    put(uri, data)
    with storage.open_input(uri) as file:
        assert file.read(1000) + file.read() == data
    with storage.open_ranges(uri) as file:
        file.seek(5_000_000)
        assert file.read(300) == data[5_000_000:5_000_300]
    assert storage.read_bytes(uri) == data
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)


def test_an_upload_that_fails_is_aborted(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, path = storage.filesystem(s3_bucket)

    async def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset")

    monkeypatch.setattr(fs, "_upload_file_part_concurrent", fail)

    def upload() -> None:
        with storage.staged_file(storage.join(s3_bucket, "large")) as staged:
            staged.write_bytes(bytes(101 * 2**20))

    with pytest.raises(ConnectionResetError):
        upload()
    assert "Uploads" not in fs.call_s3("list_multipart_uploads", Bucket=path)
    assert storage.list_files(s3_bucket) == []


def test_uploads_of_writers_that_died_are_removed(s3_bucket: str) -> None:
    fs, bucket = storage.filesystem(s3_bucket)
    for key in ("out/predictions/a", "out/predictions/b", "other/c"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    storage.remove_left_uploads(storage.join(s3_bucket, "out"), older_than_s=100 * YEAR_S)  # they may be under way
    assert len(fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]) == 3
    storage.remove_left_uploads(storage.join(s3_bucket, "out"), older_than_s=0)
    (left,) = fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert left["Key"] == "other/c"


def test_listings_are_in_order_whatever_the_tree(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.filesystem(s3_bucket)
    ask = fs.call_s3
    pages: list[str] = []

    def in_small_pages(method: str, **arguments: Any) -> Any:
        pages.append(method)
        return ask(method, **arguments, **({"MaxKeys": 3} if method.startswith("list_objects") else {}))

    names = [f"{letter}/{sub}/{number}.jpg" for letter in "abc" for sub in ("x", "y") for number in range(5)]
    names += ["a.jpg", "b/1.jpg", "b-1.jpg", "ü.png", "z/0/1/2/3/4.jpg", *(f"{n:03d}.txt" for n in range(20))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: put(storage.join(s3_bucket, "tree", name)), names))
    put(storage.join(s3_bucket, "treehouse"))
    monkeypatch.setattr(fs, "call_s3", in_small_pages)
    found = [
        info.uri.removeprefix(f"{s3_bucket}/tree/") for info in storage.iter_files(storage.join(s3_bucket, "tree"))
    ]
    assert found == sorted(names, key=str.encode)
    assert len(pages) > len(names) / 3
    assert len(storage.list_files(storage.join(s3_bucket, "tree"), ".txt")) == 20
    half_way = storage.iter_files(storage.join(s3_bucket, "tree"))
    assert next(half_way).uri.endswith("/000.txt")


def test_names_are_listed_by_their_beginnings(s3_bucket: str, tmp_path: Path) -> None:
    for base in (s3_bucket, str(tmp_path)):
        for name in ("unit-01", "unit-02", "unit-11", "unit-21", "other"):
            put(storage.join(base, "units", name))
        found = storage.list_stems(storage.join(base, "units"), ["unit-0", "unit-1"])
        assert sorted(found) == ["unit-01", "unit-02", "unit-11"]
        assert storage.list_stems(storage.join(base, "nowhere"), ["unit-0"]) == []


def test_an_error_in_a_listing_arrives(s3_bucket: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.list_stems(s3_bucket + "-none", ["a"])


def client_error(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")


def caused(error: OSError, cause: Exception) -> OSError:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "lost_race",
    [
        FileExistsError("exists"),
        client_error(412, "PreconditionFailed"),
        caused(OSError(errno.EINVAL, "PreconditionFailed"), client_error(412, "PreconditionFailed")),
        OSError(errno.EINVAL, "PreconditionFailed"),
    ],
    ids=repr,
)
def test_a_lost_race_in_any_disguise_is_a_lost_race(
    lost_race: Exception, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(s3_bucket, "unit")
    put(uri)
    answer_puts(monkeypatch, s3_bucket, [lost_race])
    assert not storage.create_if_absent(uri, b"late")


def answer_puts(monkeypatch: pytest.MonkeyPatch, bucket: str, answers: list[Exception]) -> list[dict[str, Any]]:
    """The next conditional PUTs fail with these; returns the arguments of all PUTs."""
    fs, _ = storage.filesystem(bucket)
    ask: Callable[..., Any] = fs.call_s3
    seen: list[dict[str, Any]] = []

    def call_s3(method: str, **arguments: Any) -> Any:
        if method == "put_object":
            seen.append(arguments)
            if "IfNoneMatch" in arguments and answers:
                raise answers.pop(0)
        return ask(method, **arguments)

    monkeypatch.setattr(fs, "call_s3", call_s3)
    return seen


def test_a_conflict_is_tried_again(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_BACKOFF_S", 0.001)
    conflict = client_error(409, "ConditionalRequestConflict")
    puts = answer_puts(monkeypatch, s3_bucket, [conflict, caused(OSError(errno.EBUSY, "conflict"), conflict)])
    assert storage.create_if_absent(storage.join(s3_bucket, "unit"), b"first")
    assert len(puts) == 3


def test_a_server_without_the_condition_gets_plain_puts(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(s3_bucket, "unit")
    unknown = [client_error(501, "NotImplemented") for _ in range(2)]
    answer_puts(monkeypatch, s3_bucket, unknown)
    assert storage.create_if_absent(uri, b"first")
    assert not storage.create_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_a_server_that_ignores_the_condition_is_told_about(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = storage.join(s3_bucket, "out")
    # Libraries that other tests load configure logging for the whole process, and may silence what was there before.
    monkeypatch.setattr(logging.getLogger("imgbatch"), "disabled", False)
    monkeypatch.setattr(logging.getLogger("imgbatch"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="imgbatch"):
        storage.check_writable(out)
        assert not caplog.records
        monkeypatch.setattr(s3, "put_if_absent", lambda fs, path, data: s3.put(fs, path, data) or True)
        storage.check_writable(out)
    assert "ignores If-None-Match" in caplog.text
    assert storage.list_files(s3_bucket) == []


def test_what_cannot_be_written_is_one_line(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot write there"):
        storage.check_writable("s3://bucket-that-is-not-there/out")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(storage, "_filesystems", {})
    with pytest.raises(UsageError, match="credentials") as caught:
        storage.check_writable(storage.join(s3_bucket, "out"))
    assert "\n" not in str(caught.value)


def test_settings_reach_the_client(s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(storage.join(s3_bucket, "file"), b"here")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    settings = StorageConfig(endpoint_url=s3_server, region="eu-central-1", requester_pays=True, read_timeout_s=7)
    storage.configure(settings)
    assert storage.settings() is settings
    assert storage.read_bytes(storage.join(s3_bucket, "file")) == b"here"
    fs, _ = storage.filesystem(s3_bucket)
    assert fs is storage.filesystem("s3://other/key")[0]
    assert fs.s3.meta.region_name == "eu-central-1"
    assert fs.s3.meta.config.read_timeout == 7
    assert fs.requester_pays
    storage.configure(StorageConfig(endpoint_url=s3_server, anonymous=True))
    assert storage.filesystem(s3_bucket)[0].anon


@pytest.mark.parametrize(
    ("by", "configuration", "message"),
    [
        ("storage.profile", "", r"storage\.profile: .*\(nights\) could not be found on this machine"),
        ("AWS_PROFILE", "", r"AWS_PROFILE: .*\(nights\) could not be found on this machine"),
        ("storage.profile", "[profile nights", r"the AWS configuration of this machine: Unable to parse config file"),
    ],
)
def test_a_profile_that_is_not_there_is_one_line(
    by: str, configuration: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(configuration)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    if by == "AWS_PROFILE":
        monkeypatch.setenv("AWS_PROFILE", "nights")
    settings = StorageConfig(profile="nights" if by == "storage.profile" else None)
    monkeypatch.setattr(storage, "_settings", settings)
    monkeypatch.setattr(storage, "_filesystems", {})
    with pytest.raises(UsageError, match=message) as caught:
        storage.exists("s3://bucket/manifest.parquet")
    assert "\n" not in str(caught.value)
    config.write_text("[profile nights]\nregion = eu-west-1\n")
    assert storage.filesystem("s3://bucket/manifest.parquet")[1] == "bucket/manifest.parquet"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://shop/a/b.jpg", ("shop", "a/b.jpg")),
        ("s3a://shop//a?versionId=1#x\n/", ("shop", "/a?versionId=1#x\n/")),
        ("s3://shop", ("shop", "")),
        *(
            (f"s3://{arn}{rest}", (arn, key))
            for arn in (
                "arn:aws:s3:eu-west-1:123456789012:accesspoint/nights",
                "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint:nights",
                "arn:aws:s3::123456789012:accesspoint/m1a2b3.mrap",
                "arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint/nights",
                "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/nights",
            )
            for rest, key in (("/a/b.jpg", "a/b.jpg"), ("", ""))
        ),
    ],
)
def test_a_uri_is_bucket_or_access_point_and_key(uri: str, expected: tuple[str, str]) -> None:
    assert s3.split_uri(uri) == expected
    if expected[1] == "a/b.jpg":
        assert s3.open_filesystem(StorageConfig()).split_path(uri)[:2] == expected  # as listings have it


def test_what_looks_like_a_pattern_is_removed_by_its_name(s3_bucket: str) -> None:
    names = ["part-00000.parquet", "part-0000?.parquet", "part-*.parquet", "labels [v2]/a", "labels v/a"]
    for name in names:
        put(storage.join(s3_bucket, "out", name))
    for name in ("part-0000?.parquet", "part-*.parquet", "labels [v2]"):
        storage.remove(storage.join(s3_bucket, "out", name))
    left = [info.uri.rsplit("/out/")[1] for info in storage.list_files(storage.join(s3_bucket, "out"))]
    assert left == ["labels v/a", "part-00000.parquet"]


@pytest.fixture
def deletions(s3_bucket: str, s3_server: str) -> Iterator[FaultyServer]:
    """Goes between this process and the server with the bucket."""
    assert s3_bucket
    with faulty_server(s3_server) as (url, server):
        storage.configure(StorageConfig(endpoint_url=url))
        yield server


def put_some(bucket: str) -> None:
    fs, name = storage.filesystem(bucket)
    for key in ("unit", "units", "units-2/a", "units/a", "units/b/c", "units/d/"):
        s3.put(fs, f"{name}/{key}", b"x")


def keys_of(bucket: str) -> list[str]:
    fs, name = storage.filesystem(bucket)
    return [entry["Key"] for entry in fs.call_s3("list_objects_v2", Bucket=name).get("Contents", ())]


def test_a_directory_is_removed_and_what_is_called_alike_stays(
    s3_bucket: str, deletions: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_REMOVED_AT_ONCE", 2)
    put_some(s3_bucket)
    storage.remove(storage.join(s3_bucket, "units"))
    assert keys_of(s3_bucket) == ["unit", "units-2/a"]
    assert sum(method == "POST" for method, _, _ in deletions.passed) == 2
    storage.remove(storage.join(s3_bucket, "units"))
    storage.remove("s3://no-such-bucket/units")
    assert sum(method == "POST" for method, _, _ in deletions.passed) == 2


@pytest.mark.parametrize(
    ("code", "expected"), [("AccessDenied", PermissionError), ("InvalidObjectState", OSError), ("SlowDown", OSError)]
)
def test_what_a_server_does_not_delete_is_said(
    code: str,
    expected: type[Exception],
    s3_bucket: str,
    deletions: FaultyServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3, "_REMOVAL_PATIENCE_S", 0.0)
    put_some(s3_bucket)
    deletions.faults = [Fault("POST", r"\?delete", f"undeleted:{code}")]
    with pytest.raises(expected, match=rf"not deleted: {code} as told: 's3://bucket-\w+/units'") as caught:
        storage.remove(storage.join(s3_bucket, "units"))
    assert "\n" not in str(caught.value)
    assert len(deletions.acted) == 1
    assert len(keys_of(s3_bucket)) == 6


def test_what_a_server_does_not_delete_at_once_is_deleted_in_time(
    s3_bucket: str, deletions: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_BACKOFF_S", 0.001)
    put_some(s3_bucket)
    codes = ("InternalError", "SlowDown")
    deletions.faults = [Fault("POST", r"\?delete", f"undeleted:{code}", 1, i) for i, code in enumerate(codes)]
    storage.remove(storage.join(s3_bucket, "units"))
    assert keys_of(s3_bucket) == ["unit", "units-2/a"]
    assert [action for _, _, action in deletions.acted] == [f"undeleted:{code}" for code in codes]


def test_a_place_where_nothing_may_be_deleted_is_refused(s3_bucket: str, deletions: FaultyServer) -> None:
    deletions.faults = [Fault("POST", r"\?delete", "undeleted:AccessDenied")]
    with pytest.raises(UsageError, match=r"files cannot be removed there, as units must be .*AccessDenied") as caught:
        storage.check_writable(storage.join(s3_bucket, "out"))
    assert "\n" not in str(caught.value)
