"""Files, wherever they are: a path or a URI in, fsspec behind, and the two writes that the guarantees rest on.

``create_if_absent`` lets exactly one of many writers win and never shows a half-written file;
``replace`` shows the old file or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import fsspec

from imgbatch.errors import UsageError

_CHUNK_BYTES = 1 << 20


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
    """Local paths made absolute, so that they mean the same in another process; other URIs unchanged."""
    return str(local_path(uri).expanduser().absolute()) if is_local(uri) else uri


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``uri`` and the path within it."""
    scheme = urlsplit(uri).scheme if "://" in uri else "file"
    try:
        fs = fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{uri}: no support for {scheme}:// ({error})") from error
    return fs, fs._strip_protocol(uri)


def open_input(uri: str) -> IO[bytes]:
    """``uri`` opened for reading; pyarrow takes it as it is."""
    if is_local(uri):
        return local_path(uri).open("rb")
    fs, path = filesystem(uri)
    return fs.open(path, "rb")


def read_bytes(uri: str) -> bytes:
    """The whole file."""
    if is_local(uri):
        return local_path(uri).read_bytes()
    fs, path = filesystem(uri)
    return fs.cat_file(path)


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


def iter_files(uri: str, suffix: str = "") -> Iterator[FileInfo]:
    """As :func:`list_files`, in the order of a walk, without holding the listing.

    Raises ``OSError`` for a directory that may not be read; one that vanishes meanwhile is left out.
    """
    if is_local(uri):
        for directory, subdirectories, names in os.walk(local_path(uri), onerror=_raise_unless_gone):
            subdirectories.sort()
            for name in sorted(names):
                if name.endswith(suffix):
                    path = Path(directory, name)
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        yield FileInfo(str(path), stat.st_size, str(stat.st_mtime_ns))
        return
    fs, prefix = filesystem(uri)
    fs.invalidate_cache()
    for _, _, files in fs.walk(prefix, detail=True):
        for name in sorted(files):
            info = files[name]
            if name.endswith(suffix):
                yield FileInfo(fs.unstrip_protocol(info["name"]), int(info["size"]), _version(info))


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
            return str(info[key])
    return ""


def create_if_absent(uri: str, data: bytes) -> bool:
    """Write ``data`` durably unless ``uri`` exists. True: this call created it; False: it was there.

    Local disk: temporary file, fsync, ``link`` (which fails if the name exists), fsync of the directory.
    Elsewhere: fsspec's exclusive create, which on S3 is one PUT with ``If-None-Match: *``; servers answer a lost
    race in different disguises (``FileExistsError``, ``EINVAL``), so an error counts as "was there" if it is there.
    """
    if is_local(uri):
        return _create_local(local_path(uri), data)
    fs, path = filesystem(uri)
    try:
        fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError:
        fs.invalidate_cache()
        if fs.exists(path):
            return False
        raise
    return True


def replace(uri: str, data: bytes) -> None:
    """Write ``data`` so that readers see the old content or the new, and it survives a crash."""
    if is_local(uri):
        path = local_path(uri)
        with _temporary_beside(path, data) as temporary:
            temporary.replace(path)
            _sync_directory(path.parent)
        return
    fs, remote = filesystem(uri)
    fs.pipe_file(remote, data)


def write_json(uri: str, value: Any) -> None:
    """:func:`replace` with indented JSON."""
    replace(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline, stable for equal values."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


@contextlib.contextmanager
def staged_file(uri: str) -> Iterator[Path]:
    """A local file to write, which takes the place of ``uri`` when the block ends well (rename, or one PUT)."""
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
            _sync_directory(path.parent)
        else:
            fs, remote = filesystem(uri)
            fs.put_file(str(staged), remote)
    finally:
        staged.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove a file or a whole directory; nothing happens where there is none."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def sha256(uri: str) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open_input(uri) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(directory: str) -> None:
    """Raise :class:`UsageError` unless a file can be created under ``directory``, and only once."""
    probe = join(directory, f".probe-{uuid.uuid4().hex}")
    try:
        first, second = create_if_absent(probe, b"probe"), create_if_absent(probe, b"again")
    except OSError as error:
        raise UsageError(f"output {directory}: cannot write there ({error.strerror or error})") from error
    remove(probe)
    if not first or second:
        raise UsageError(
            f"output {directory}: this storage does not honour create-if-absent, on which exactly-once rests"
        )


def _create_local(path: Path, data: bytes) -> bool:
    if path.exists():
        return False
    with _temporary_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            return _create_without_links(path, data)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)
    return True


def _create_without_links(path: Path, data: bytes) -> bool:
    # Disks without hard links (some FUSE and SMB mounts): exclusive open; a crash half-way leaves a short file,
    # which readers of unit files detect because a short Parquet file has no footer.
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    _sync_directory(path.parent)
    return True


@contextlib.contextmanager
def _temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
