"""A unit that keeps killing whoever touches it ends here: one row at a time, each in a process that may die.

Decoding is safe already (it runs in a child process); what can still take a process down is the forward pass.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import numpy as np
import pyarrow as pa

from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt, unit_table
from imgbatch.core.stages import DECODE_COLUMNS, ClassifyStage, CommitStage, DecodeStage
from imgbatch.errors import ImgbatchError, RowError, Stage, Status, row_error
from imgbatch.schema import ROW_ID, UNIT_SCHEMA

FORWARD_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 300.0
_START_TRIES = 2
"""A process that is killed while it loads the model, or a store that is away, says nothing about the model, once."""
LONGEST_STEP_S = FORWARD_TIMEOUT_S + _START_TRIES * _START_TIMEOUT_S
"""Between two rows of a unit, at most."""
_PR_SET_PDEATHSIG = 1

_classify: ClassifyStage | None = None


def classify_isolated(run: Run, unit_index: int) -> Receipt:
    """Decode, classify row by row in a process of its own, and commit; always ends with every row's outcome.

    Raises:
        ImgbatchError: the model does not load even in a fresh process; that very error, where loading raised one.
    """
    *_, receipt = classify_row_by_row(run, unit_index, watched=False)
    assert receipt is not None
    return receipt


def classify_row_by_row(run: Run, unit_index: int, *, watched: bool = True) -> Iterator[Receipt | None]:
    """As :func:`classify_isolated`: nothing for each step that is done, and the receipt at the end."""
    with DecodeStage(run, on_cpu=True, watched=watched) as decode:
        block = decode(unit_index)
    yield None
    tables = []
    for table in _classify_rows(run, block):
        tables.append(table)
        yield None
    classified = pa.concat_tables(tables)
    for name in DECODE_COLUMNS:
        classified = classified.append_column(name, block[name])
    seconds = pa.nulls(block.num_rows, pa.float64()).fill_null(0.0)
    commit = CommitStage(run, defer=False)
    try:
        receipt = commit(classified.append_column("classify_s", seconds))
    finally:
        commit.close()
    yield replace(receipt, isolated=True)


def _classify_rows(run: Run, block: pa.Table) -> Iterator[pa.Table]:
    pool = _start(run)
    try:
        for row in range(block.num_rows):
            cell = pa.Table.from_batches([block.slice(row, 1).combine_chunks().to_batches()[0]])
            try:
                yield pool.submit(_classify_one, cell).result(timeout=FORWARD_TIMEOUT_S)
            except Exception as error:
                # Whatever it was, the process may be in a state that only a new one cures.
                _kill(pool)
                unknown = np.zeros(1, np.int32)
                failure = _judge(error)
                yield unit_table(cell[ROW_ID].combine_chunks(), [failure], unknown, unknown, _no_predictions())
                pool = _start(run)
    finally:
        _kill(pool)


def _judge(error: Exception) -> RowError:
    if isinstance(error, TimeoutError):
        return row_error(Status.TIMEOUT, Stage.CLASSIFY, f"no answer in {FORWARD_TIMEOUT_S:g} s")
    died = isinstance(error, BrokenProcessPool)
    message = "the process died in the forward pass" if died else f"{type(error).__name__}: {error}"
    return row_error(Status.CLASSIFY_FAILED, Stage.CLASSIFY, message)


def _start(run: Run) -> ProcessPoolExecutor:
    error: Exception | None = None
    for _ in range(_START_TRIES):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
        try:
            pool.submit(_load, run).result(timeout=_START_TIMEOUT_S)
        except Exception as failure:  # whatever the model's libraries raise, or the process died
            _kill(pool)
            error = failure
        else:
            return pool
    if isinstance(error, ImgbatchError):
        raise error
    raise ImgbatchError(
        f"model {run.bundle.path}: does not load in a fresh process ({type(error).__name__}: {error}); check it with "
        f"`imgbatch model inspect`"
    ) from error


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


def _prepare() -> None:
    if sys.platform == "linux":
        # Who kills the process that looks after this one, as Ray does, does not know of this one.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole process group; what to do about it is the driver's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load(run: Run) -> None:
    global _classify
    _classify = ClassifyStage(run, batch_size=1, num_threads=1)


def _classify_one(cell: pa.Table) -> pa.Table:
    if _classify is None:
        raise RuntimeError("the process was not initialised")
    return _classify(cell).select(UNIT_SCHEMA.names)


def _no_predictions() -> dict[str, pa.Array]:
    outcome = {ROW_ID, "status", "error_stage", "error_message", "attempts", "width", "height"}
    return {field.name: pa.array([], field.type) for field in UNIT_SCHEMA if field.name not in outcome}
