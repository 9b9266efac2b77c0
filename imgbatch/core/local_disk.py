"""The two writes of :mod:`imgbatch.core.storage` on a local disk."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from imgbatch.core.failpoints import failpoint


def create_if_absent(path: Path, data: bytes) -> bool:
    """Temporary file, fsync, ``link`` (which fails if the name exists), fsync of the directory. True: created."""
    if path.exists():
        return False
    with temporary_beside(path, data) as temporary:
        failpoint("storage.create", path.name)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            return create_without_links(path, data)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    return True


def create_without_links(path: Path, data: bytes) -> bool:
    """For disks without hard links (some FUSE and SMB mounts): exclusive open.

    A crash half-way leaves a short file, which readers of unit files detect: short Parquet has no footer.
    """
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    sync_directory(path.parent)
    return True


@contextlib.contextmanager
def temporary_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A file with ``data``, on the disk for good, in the directory of ``path``; gone after the block."""
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


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
