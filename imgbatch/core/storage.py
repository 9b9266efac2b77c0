"""Files, wherever they are: a path or a URI in, fsspec behind, and the two writes that the guarantees rest on.

``create_if_absent`` lets exactly one of many writers win and never shows a half-written file;
``replace`` shows the old file or the new one, never a mixture.

Where an object store is and how to reach it (:class:`StorageConfig`) is a setting of the process: every process
that reads or writes calls :func:`configure` first. Nothing here sees credentials.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from imgbatch.config import StorageConfig
from imgbatch.core import local_disk
from imgbatch.errors import UsageError, normalise_message

_CHUNK_BYTES = 1 << 20
_STALE_UPLOAD_S = 86_400.0

_log = logging.getLogger("imgbatch")
_settings = StorageConfig()
_filesystems: dict[tuple[str, StorageConfig, int], Any] = {}
_filesystems_lock = threading.Lock()


def configure(settings: StorageConfig) -> None:
    """From here on, this process reaches object stores in this way."""
    global _settings
    _settings = settings


def settings() -> StorageConfig:
    """What :func:`configure` was given last."""
    return _settings


def is_s3(uri: str) -> bool:
    """Whether ``uri`` names an object of S3, or of a server that speaks it."""
    return uri.startswith(("s3://", "s3a://"))


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a plain path or a ``file://`` URI."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path of a local ``uri``."""
    return Path(uri[len("file://") :] if uri.startswith("file://") else uri)


def join(base: str, *parts: str) -> str:
    """``base`` and ``parts`` with one slash between them."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)]) or "/"


def absolute(uri: str) -> str:
    """What means the same in another process and to every reader: local paths absolute, ``s3a://`` as ``s3://``."""
    if is_local(uri):
        return str(local_path(uri).expanduser().absolute())
    uri = uri.replace("s3a://", "s3://", 1) if uri.startswith("s3a://") else uri
    scheme, separator, path = uri.partition("://")
    return f"{scheme}{separator}{path.rstrip('/')}"


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``uri`` and the path within it; one of each kind in a process, for any thread."""
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    key = (scheme, _settings, os.getpid())
    with _filesystems_lock:
        fs = _filesystems.get(key)
        if fs is None:
            fs = _filesystems[key] = _open_filesystem(scheme, uri)
    return fs, fs._strip_protocol(uri)


def _open_filesystem(scheme: str, uri: str) -> Any:
    try:
        if is_s3(uri):
            from imgbatch.core import s3

            s3.check_profile(_settings)
            return s3.open_filesystem(_settings)
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{uri}: no support for {scheme}:// ({error})") from error


def open_input(uri: str) -> IO[bytes]:
    """``uri`` opened for reading from beginning to end, with some megabytes read ahead."""
    if is_local(uri):
        return local_path(uri).open("rb")
    fs, path = filesystem(uri)
    return fs.open(path, "rb")


def open_ranges(uri: str) -> IO[bytes]:
    """``uri`` opened for whoever knows which ranges to read, like pyarrow: each read is one request, no more."""
    if is_local(uri):
        return local_path(uri).open("rb")
    fs, path = filesystem(uri)
    return fs.open(path, "rb", cache_type="none")


def read_bytes(uri: str) -> bytes:
    """The whole file, which should be small: one request."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = filesystem(uri)
    # s3fs asks for the size first unless it may not split the request.
    return fs.cat_file(path, max_concurrency=1) if is_s3(uri) else fs.cat_file(path)


def read_json(uri: str) -> Any:
    """The file parsed as JSON."""
    return json.loads(read_bytes(uri))


def exists(uri: str) -> bool:
    """Whether a file or directory is there now (listings are not cached)."""
    if is_local(uri):
        return local_path(uri).exists()
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return fs.exists(path)


def is_file(uri: str) -> bool:
    """Whether there is a file, not a directory, now."""
    if is_local(uri):
        return local_path(uri).is_file()
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    return fs.isfile(path)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file found by a listing: ``uri``, ``size`` in bytes, and ``version`` (etag, or mtime in ns)."""

    uri: str
    size: int
    version: str


def file_info(uri: str) -> FileInfo:
    """Raises ``FileNotFoundError``."""
    if is_local(uri):
        stat = local_path(uri).stat()
        return FileInfo(uri, stat.st_size, str(stat.st_mtime_ns))
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    info = fs.info(path)
    return FileInfo(uri, int(info["size"]), _version(info))


def list_files(uri: str, suffix: str = "") -> list[FileInfo]:
    """Files under a directory, at any depth, by name; empty where there is none."""
    return sorted(iter_files(uri, suffix), key=lambda info: info.uri)


def iter_files(uri: str, suffix: str = "", *, follow_links: bool = False) -> Iterator[FileInfo]:
    """As :func:`list_files`, in the order of a walk, without holding the listing.

    Raises ``OSError`` for a directory that may not be read; one that vanishes meanwhile is left out.

    Args:
        follow_links: go into linked directories of a local disk too, but for those that lead back.
    """
    if is_local(uri):
        walk = os.walk(local_path(uri), onerror=_raise_unless_gone, followlinks=follow_links)
        for directory, subdirectories, names in walk:
            here = Path(directory)
            if follow_links and here.is_symlink() and any(here.samefile(parent) for parent in here.parents):
                subdirectories.clear()
                continue
            subdirectories.sort()
            for name in sorted(names):
                if name.endswith(suffix):
                    path = here / name
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield FileInfo(str(path), stat.st_size, str(stat.st_mtime_ns))
        return
    fs, prefix = filesystem(uri)
    if is_s3(uri):
        from imgbatch.core import s3

        for found in s3.iter_objects(fs, prefix):
            if found.name.endswith(suffix):
                yield FileInfo(fs.unstrip_protocol(found.name), found.size, found.etag)
        return
    fs.invalidate_cache()
    for _, _, files in fs.walk(prefix, detail=True):
        for name in sorted(files):
            info = files[name]
            if name.endswith(suffix):
                yield FileInfo(fs.unstrip_protocol(info["name"]), int(info["size"]), _version(info))


def list_stems(directory: str, stems: Iterable[str]) -> list[str]:
    """Names of the files directly in a directory that begin with one of ``stems``, in no order; empty where none is.

    On an object store each stem is a listing of its own, many of them at once: 200,000 names take seconds.
    """
    stems = tuple(stems)
    if is_s3(directory):
        from imgbatch.core import s3

        fs, path = filesystem(directory)
        return [found.name.rsplit("/", 1)[1] for found in s3.iter_stems(fs, path, stems)]
    if is_local(directory):
        with contextlib.suppress(FileNotFoundError), os.scandir(local_path(directory)) as entries:
            return [entry.name for entry in entries if entry.name.startswith(stems)]
        return []
    names = (info.uri.rsplit("/", 1)[1] for info in iter_files(directory))
    return [name for name in names if name.startswith(stems)]


def list_names(directory: str) -> set[str]:
    """Names of the files and directories directly in a directory now; empty where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if is_local(directory):
            return {path.name for path in local_path(directory).iterdir()}
        fs, path = filesystem(directory)
        if is_s3(directory):
            from imgbatch.core import s3

            return s3.list_names(fs, path)
        fs.invalidate_cache()
        return {name.rstrip("/").rsplit("/", 1)[1] for name in fs.ls(path, detail=False)}
    return set()


def listing_prefix(uri: str) -> str:
    """What every URI that a listing of ``uri`` yields starts with; ends in a slash."""
    if is_local(uri):
        return str(local_path(uri)).rstrip("/") + "/"
    fs, path = filesystem(uri)
    return fs.unstrip_protocol(path).rstrip("/") + "/"


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "created"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def create_if_absent(uri: str, data: bytes) -> bool:
    """Write ``data`` durably unless ``uri`` exists. True: this call created it; False: it was there.

    Local disk: temporary file, fsync, ``link`` (which fails if the name exists), fsync of the directory.
    Object store: one PUT with ``If-None-Match: *``, never a multipart upload, for which some servers ignore the
    condition. Where the server ignores it altogether (:func:`check_writable`), the last writer wins.
    """
    if is_local(uri):
        return local_disk.create_if_absent(local_path(uri), data)
    fs, path = filesystem(uri)
    if is_s3(uri):
        from imgbatch.core import s3

        return s3.put_if_absent(fs, path, data)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def replace(uri: str, data: bytes) -> None:
    """Write ``data`` so that readers see the old content or the new, and it survives a crash."""
    if is_local(uri):
        path = local_path(uri)
        with local_disk.temporary_beside(path, data) as temporary:
            temporary.replace(path)
            local_disk.sync_directory(path.parent)
        return
    fs, remote = filesystem(uri)
    if is_s3(uri):
        from imgbatch.core import s3

        s3.put(fs, remote, data)
        return
    fs.pipe_file(remote, data)


def write_json(uri: str, value: Any) -> None:
    """:func:`replace` with indented JSON."""
    replace(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline, stable for equal values."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


@contextlib.contextmanager
def staged_file(uri: str) -> Iterator[Path]:
    """A local file to write, which takes the place of ``uri`` when the block ends well.

    By a rename, or an upload: in parts where it is large, which appear as a whole or are given up.
    """
    if is_local(uri):
        path = local_path(uri)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    else:
        staged = Path(tempfile.gettempdir(), f"imgbatch-{uuid.uuid4().hex}")
    try:
        yield staged
        if is_local(uri):
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            staged.replace(path)
            local_disk.sync_directory(path.parent)
        else:
            fs, remote = filesystem(uri)
            fs.put_file(str(staged), remote)
    finally:
        staged.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove a file or a whole directory; nothing happens where there is none. Raises ``OSError`` for what stays."""
    if is_local(uri):
        local_disk.remove(local_path(uri))
        return
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        if is_s3(uri):
            from imgbatch.core import s3

            s3.remove(fs, path)
            return
        if re.search(r"[*?\[]", path):  # which rm takes for a pattern
            for name in [*fs.find(path), path]:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(name)
            return
        fs.rm(path, recursive=True)


def sha256(uri: str) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remove_left_uploads(uri: str, *, older_than_s: float = _STALE_UPLOAD_S) -> None:
    """End uploads below an object store's directory whose writer died; what they hold is paid for otherwise."""
    if is_s3(uri):
        from imgbatch.core import s3

        fs, path = filesystem(uri)
        s3.abort_uploads(fs, path, older_than_s=older_than_s)


def check_writable(directory: str) -> None:
    """Raise :class:`UsageError` unless a file can be created under ``directory``, and only once.

    An object store that ignores the condition is told about in one line and used all the same: whoever writes a
    unit's file writes the same rows.
    """
    probe = join(directory, f".probe-{uuid.uuid4().hex}")
    try:
        create_if_absent(probe, b"probe")  # whose answer may get lost, which looks as if it had been there
        created_again = create_if_absent(probe, b"again")
    except UsageError:
        raise
    except Exception as error:  # every object store's client has exceptions of its own
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"output {directory}: cannot write there ({normalise_message(reason)})") from error
    try:
        remove(probe)
    except Exception as error:
        raise UsageError(
            f"output {directory}: files cannot be removed there, as units must be ({normalise_message(error)})"
        ) from error
    if not created_again:
        return
    if not is_s3(directory):
        raise UsageError(
            f"output {directory}: this storage does not honour create-if-absent, on which exactly-once rests"
        )
    _log.warning(
        "output %s: this server ignores If-None-Match; of two drivers at once, the last to write a file wins", directory
    )
