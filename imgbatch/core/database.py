"""DuckDB as we use it: quiet, in UTC, within a memory limit and spilling beyond it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import duckdb

from imgbatch.core import storage


def connect(out: str | None = None, *, memory_limit: str | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory database; close it when done.

    Args:
        out: a directory or file that queries will read, wherever it is.
        memory_limit: as DuckDB's setting, ``2GB``; none: DuckDB's default.
    """
    connection = duckdb.connect()
    connection.execute("set timezone = 'UTC'")
    # Its progress bar would be printed into whatever the command prints. Where it is off, as in a notebook without
    # ipywidgets, DuckDB refuses to set it at all.
    if connection.execute("select current_setting('enable_progress_bar')").fetchall() == [(True,)]:
        connection.execute("set enable_progress_bar = false")
    if memory_limit is not None:
        connection.execute(f"set memory_limit='{memory_limit}'")
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
def spilling(out: str | None = None, *, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """As :func:`connect`, for the block, with a temporary directory for what exceeds the limit."""
    with (
        tempfile.TemporaryDirectory() as spill,
        contextlib.closing(connect(out, memory_limit=memory_limit)) as database,
    ):
        database.execute("set temp_directory = ?", [spill])
        database.execute("set preserve_insertion_order = false")
        yield database
