"""The command line in processes of its own, quickly: a fork server has torch, pyarrow and duckdb loaded already.

Nothing of imgbatch is imported before the environment of the process is set: failpoints are bound on import.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = [
    "torch",
    "torchvision",
    "pyarrow.parquet",
    "pyarrow.compute",
    "pandas",
    "duckdb",
    "PIL.Image",
    "s3fs",
    "safetensors.torch",
    "pydantic",
    "typer",
    "rich.table",
]
TIMEOUT_S = 120.0
KILLED = -9

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Driver:
    """A running command."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, negative for a signal."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s: {self.log.read_text()}"
        return self.process.exitcode


@contextmanager
def driver(arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Driver]:
    """``imgbatch ARGUMENTS``, what it prints going to ``log``; ended with the block."""
    process = _context.Process(target=_run, args=(arguments, str(log), dict(environment or {})))
    process.start()
    try:
        yield Driver(process, log)
    finally:
        process.kill()
        process.join()


def _run(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    # The page on the run takes seconds to draw, and is not what is tested; the command does without it.
    from imgbatch.cli import run
    from imgbatch.commands import classify

    classify.report_after_run = lambda *_, **__: None
    sys.exit(run(arguments))
