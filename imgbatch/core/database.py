"""DuckDB as we use it: quiet, in UTC, within a memory limit and spilling beyond it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imgbatch.core import storage

if TYPE_CHECKING:
    import duckdb

_MB_PER_THREAD = 128
"""Grouping 100,000,000 keys fails at 30 MB a thread, for all that spills, and at 100 MB on more than two threads."""


def connect(out: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory database; close it when done. ``out``: a directory or file that queries will read, anywhere."""
    import duckdb  # actors import what imports this, and ask no database

    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    # Its progress bar would be printed into whatever the command prints. Where it is off, as in a notebook without
    # ipywidgets, DuckDB refuses to set it at all.
    if connection.execute("select current_setting('enable_progress_bar')").fetchall() == [(True,)]:
        connection.execute("set enable_progress_bar = false")
    if out is not None:
        reach(connection, out)
    return connection


def reach(connection: duckdb.DuckDBPyConnection, uri: str) -> None:
    """Let queries read below ``uri``: elsewhere than on a disk, through fsspec."""
    if storage.is_local(uri):
        return
    filesystem = storage.filesystem(uri)[0]
    protocol = filesystem.protocol
    name = protocol if isinstance(protocol, str) else protocol[0]
    if not connection.filesystem_is_registered(name):
        connection.register_filesystem(filesystem)


@contextlib.contextmanager
def bounded_memory(connection: duckdb.DuckDBPyConnection, memory_mb: int = 1000) -> Iterator[None]:
    """``connection`` held to ``memory_mb``, in the block, with a temporary directory for what exceeds it.

    No more threads than that is enough for, as each needs some of it that cannot be spilled; but two also on a single
    core, because one alone keeps its table of groups in one piece, which does not spill either.
    """
    (found,) = connection.execute("select current_setting('threads')").fetchall()
    with tempfile.TemporaryDirectory(prefix="imgbatch-") as spill:
        connection.execute(f"set threads = {min(max(2, found[0]), max(2, memory_mb // _MB_PER_THREAD))}")
        connection.execute(f"set memory_limit = '{memory_mb}MB'")
        connection.execute("set temp_directory = ?", [spill])
        connection.execute("set preserve_insertion_order = false")
        yield


@contextlib.contextmanager
def spilling(out: str | None = None, *, memory_mb: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """As :func:`connect`, for the block, within :func:`bounded_memory`."""
    with contextlib.closing(connect(out)) as database, bounded_memory(database, memory_mb):
        yield database
