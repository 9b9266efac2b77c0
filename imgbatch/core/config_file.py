"""The configuration from a file, wherever it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from imgbatch.config import Config, load_config, parse_sections
from imgbatch.core import storage
from imgbatch.errors import UsageError


def read_config(
    file: str | Path | Mapping[str, Mapping[str, Any]] | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """As :func:`imgbatch.config.load_config`; a file in an object store is reached as ``storage.…`` assignments say.

    Raises:
        UsageError: one line that names the file or the key at fault.
    """
    assignments = list(assignments)
    if not isinstance(file, str):
        return load_config(file, assignments, flags)
    if storage.is_local(file):
        return load_config(storage.local_path(file), assignments, flags)
    before = storage.settings()
    storage.configure(load_config(assignments=assignments).storage)
    try:
        content = storage.read_bytes(file)
    except OSError as error:
        raise UsageError(f"configuration file {file}: {error.strerror or error}") from error
    finally:
        storage.configure(before)
    return load_config(parse_sections(content, where=file), assignments, flags)
