from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imgbatch.core import local_disk, storage
from imgbatch.errors import UsageError


@pytest.fixture(params=["path", "file-uri", "memory"])
def base(request, tmp_path):
    """A folder on a disk, by path and by URI, and one in fsspec's memory."""
    if request.param == "path":
        yield str(tmp_path)
    elif request.param == "file-uri":
        yield tmp_path.as_uri()
    else:
        folder = f"memory://{uuid.uuid4().hex}"
        yield folder
        storage.remove(folder)


def leftovers(base: str) -> list[str]:
    return [info.uri for info in storage.list_files(base) if ".tmp" in info.uri]


def test_the_first_writer_wins(base):
    uri = storage.join(base, "deep", "unit.bin")
    assert storage.create_if_absent(uri, b"first")
    assert not storage.create_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"
    assert leftovers(base) == []


def test_one_of_many_writers_at_once_wins(tmp_path):
    uri = str(tmp_path / "unit.bin")
    contents = [str(number).encode() * 1000 for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(lambda data: storage.create_if_absent(uri, data), contents))
    assert outcomes.count(True) == 1
    assert storage.read_bytes(uri) == contents[outcomes.index(True)]
    assert [path.name for path in tmp_path.iterdir()] == ["unit.bin"]


def test_on_a_disk_without_links_the_first_writer_still_wins(tmp_path):
    path = tmp_path / "unit.bin"
    assert local_disk.create_without_links(path, b"first")
    assert not local_disk.create_without_links(path, b"second")
    assert path.read_bytes() == b"first"


def test_replace_takes_the_place_of_what_was_there(base):
    uri = storage.join(base, "current.json")
    storage.write_json(uri, {"a": 1})
    storage.write_json(uri, {"b": "ä"})
    assert storage.read_json(uri) == {"b": "ä"}
    assert storage.read_bytes(uri).endswith(b"}\n")
    assert leftovers(base) == []


def test_a_staged_file_appears_when_it_is_whole(base):
    uri = storage.join(base, "deep", "part.parquet")
    with storage.staged_file(uri) as path:
        path.write_bytes(b"whole")
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"whole"
    assert not path.exists()


def test_a_staged_file_that_failed_leaves_nothing(base):
    uri = storage.join(base, "part.parquet")

    def fail() -> None:
        with storage.staged_file(uri) as path:
            path.write_bytes(b"half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert not storage.exists(uri)
    assert storage.list_files(base) == []


def test_listings_go_deep_in_order_and_by_suffix(base):
    for name in ("b/2.txt", "a.txt", "b/1.txt", "c.json"):
        storage.replace(storage.join(base, name), b"12345")
    listed = storage.list_files(base, ".txt")
    assert [info.uri.rpartition(Path(base).name)[2].lstrip("/") for info in listed] == ["a.txt", "b/1.txt", "b/2.txt"]
    assert all(info.size == 5 for info in listed)
    assert storage.list_files(storage.join(base, "nowhere")) == []


def test_the_version_of_a_file_changes_with_it(base):
    uri = storage.join(base, "image.jpg")
    storage.replace(uri, b"1")
    before = storage.file_info(uri)
    storage.replace(uri, b"22")
    after = storage.file_info(uri)
    assert (before.size, after.size) == (1, 2)
    assert before.version != after.version
    with pytest.raises(FileNotFoundError):
        storage.file_info(storage.join(base, "nowhere"))


def test_removing_takes_a_file_or_a_folder_and_minds_no_absence(base):
    storage.replace(storage.join(base, "x", "1"), b"1")
    storage.replace(storage.join(base, "x", "2"), b"2")
    storage.remove(storage.join(base, "x", "1"))
    assert len(storage.list_files(base)) == 1
    storage.remove(storage.join(base, "x"))
    storage.remove(storage.join(base, "x"))
    assert not storage.exists(storage.join(base, "x"))


def test_a_folder_is_removed_while_two_others_write_to_it_and_a_third_removes_it(tmp_path):
    """As when a driver is done with a run that another one still works on."""
    folder = storage.join(str(tmp_path), "units")
    write_until, end = time.monotonic() + 2.0, object()

    def write(name: int) -> object:
        number = 0
        while time.monotonic() < write_until:
            number += 1
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # the folder went or came in between
                storage.create_if_absent(storage.join(folder, f"{name}-{number}"), b"x")
        return end

    def remove() -> object:
        while time.monotonic() < write_until:
            storage.remove(folder)
        return end

    with ThreadPoolExecutor(4) as pool:
        ended = [pool.submit(write, 0), pool.submit(write, 1), pool.submit(remove), pool.submit(remove)]
        assert [task.result() for task in ended] == [end] * 4
    storage.remove(folder)
    assert not Path(folder).exists()


def test_sha256_is_that_of_the_whole_file(base):
    data = bytes(range(256)) * 10_000
    storage.replace(storage.join(base, "big"), data)
    assert storage.sha256(storage.join(base, "big")) == hashlib.sha256(data).hexdigest()


def test_a_writable_folder_passes_and_stays_empty(base):
    storage.check_writable(storage.join(base, "out"))
    assert storage.list_files(base) == []


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write there"):
        storage.check_writable(str(tmp_path / "file" / "out"))


def test_an_unknown_scheme_is_one_line():
    with pytest.raises(UsageError, match="no support for gopher://"):
        storage.exists("gopher://host/file")


def test_paths_join_and_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.join("s3://b/", "/a/", "c") == "s3://b/a/c"
    assert storage.join("/", "a") == "/a"
    assert storage.absolute("m.parquet") == str(tmp_path / "m.parquet")
    assert storage.absolute("s3://b/m") == "s3://b/m"


def test_reading_opens_what_fsspec_opens(base):
    storage.replace(storage.join(base, "x"), b"abc")
    with storage.open_input(storage.join(base, "x")) as file:
        assert file.read() == b"abc"


def test_a_file_that_could_not_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without hard links, where nothing else tells a short file from a whole one."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(local_disk.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        local_disk.create_without_links(tmp_path / "unit", b"unit")
    assert list(tmp_path.iterdir()) == []


def stage(uri: str, data: bytes) -> None:
    with storage.staged_file(uri) as path:
        path.write_bytes(data)


@pytest.mark.parametrize("write", [storage.create_if_absent, storage.replace, stage])
def test_content_is_on_the_disk_before_it_has_a_name_and_the_name_before_the_write_is_done(
    write: Callable[[str, bytes], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    sync = os.fsync

    def synced(descriptor: int) -> None:
        sync(descriptor)
        done.append(("on the disk", os.fstat(descriptor).st_ino))

    def naming(give_name: Callable[..., None]) -> Callable[..., None]:
        def named(source: Path, target: Path) -> None:
            give_name(source, target)
            done.append(("named", target.stat().st_ino))

        return named

    monkeypatch.setattr(os, "fsync", synced)
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, naming(getattr(os, name)))
    path = tmp_path / "unit.bin"
    write(str(path), b"content")
    file, folder = path.stat().st_ino, tmp_path.stat().st_ino
    assert done == [("on the disk", file), ("named", file), ("on the disk", folder)]


def test_a_slash_at_the_end_is_no_other_place() -> None:
    assert storage.absolute("s3a://bucket/model/") == storage.absolute("s3://bucket/model") == "s3://bucket/model"
