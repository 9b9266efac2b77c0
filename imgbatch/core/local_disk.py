"""What :mod:`imgbatch.core.storage` writes and removes on a local disk."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from imgbatch.core.failpoints import failpoint

_REMOVALS = 1000
"""Tries to remove a directory that somebody writes to."""
_SOMEBODY_WRITES = {errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, None}
"""Without a number: ``shutil.rmtree`` found that another directory has taken the place of the one it looked at."""


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
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS):
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
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # as on a full disk: the next try must not take what is there for a whole file
        path.unlink(missing_ok=True)
        raise
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


def remove(path: Path) -> None:
    """Remove a file or a whole directory, whoever else removes it or still writes to it; there may be none.

    A driver that is behind another writes a temporary file into the directory that the other removes: the removal
    is tried again until it meets no such file, and each of them is one that the other driver writes only once.
    """
    tries = _REMOVALS
    while True:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            return
        except FileNotFoundError:
            if not os.path.lexists(path):
                return
        except OSError as error:
            tries -= 1
            if error.errno not in _SOMEBODY_WRITES or not tries:
                raise


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
