"""A unit that keeps killing whoever touches it ends here: one row at a time, each in a process that may die.

Decoding is safe already (it runs in a child process); what can still take a process down is the forward pass.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pyarrow as pa

from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt, unit_table
from imgbatch.core.stages import DECODE_COLUMNS, ENCODED, PIXELS, ClassifyStage, CommitStage, DecodeStage
from imgbatch.errors import ImgbatchError, RowError, Stage, Status, normalise_message, row_error
from imgbatch.schema import ROW_ID, UNIT_SCHEMA

FORWARD_TIMEOUT_S = 120.0
_START_TIMEOUT_S = 300.0
_START_TRIES = 2
"""A process that is killed while it loads the model, or a store that is away, says nothing about the model, once."""
LONGEST_STEP_S = FORWARD_TIMEOUT_S + _START_TRIES * _START_TIMEOUT_S
"""Between two tries, at most."""
_TRIES = 2
"""Of a row: what the process died of may have been the device's."""
_PR_SET_PDEATHSIG = 1

_classify: Callable[[pa.Table], pa.Table] | None = None


def classify_isolated(run: Run, unit_index: int, *, defer: bool) -> Receipt:
    """Decode, classify row by row in a process of its own, and commit; always ends with every row's outcome.

    Args:
        defer: as for :class:`CommitStage`.

    Raises:
        ImgbatchError: in a fresh process the model does not load, or not even a blank image gets through it; that
            very error, where one was raised.
    """
    *_, receipt = classify_row_by_row(run, unit_index, defer=defer, watched=False)
    assert receipt is not None
    return receipt


def classify_row_by_row(run: Run, unit_index: int, *, defer: bool, watched: bool = True) -> Iterator[Receipt | None]:
    """As :func:`classify_isolated`: nothing for each step that is done, and the receipt at the end."""
    with DecodeStage(run, on_cpu=True, watched=watched) as decode:
        block = decode(unit_index)
    yield None
    tables = []
    for table in _classify_rows(run, block):
        if table is not None:
            tables.append(table)
        yield None
    classified = pa.concat_tables(tables)
    for name in DECODE_COLUMNS:
        classified = classified.append_column(name, block[name])
    seconds = pa.nulls(block.num_rows, pa.float64()).fill_null(0.0)
    commit = CommitStage(run, defer=defer)
    try:
        receipt = commit(classified.append_column("classify_s", seconds))
    finally:
        commit.close()
    yield replace(receipt, isolated=True)


def _classify_rows(run: Run, block: pa.Table) -> Iterator[pa.Table | None]:
    """A table for each row, in order, and nothing for each try that failed."""
    pool = _start(run)
    try:
        for row in range(block.num_rows):
            cell = pa.Table.from_batches([block.slice(row, 1).combine_chunks().to_batches()[0]])
            for attempt in range(1, _TRIES + 1):
                answer = _ask(pool, cell)
                failure = _failure(answer)
                if failure is None:
                    yield answer
                    break
                # Whatever it was, the process may be in a state that only a new one cures.
                _kill(pool)
                pool = _start(run)
                yield None
                if failure.status is Status.TIMEOUT or attempt == _TRIES:
                    _check_device(run, _ask(pool, _blank(run, cell)))
                    yield _error_table(cell, replace(failure, attempts=attempt))
                    break
    finally:
        _kill(pool)


def _ask(pool: ProcessPoolExecutor, cell: pa.Table) -> pa.Table | Exception:
    try:
        return pool.submit(_classify_one, cell).result(timeout=FORWARD_TIMEOUT_S)
    except Exception as error:
        return error


def _failure(answer: pa.Table | Exception) -> RowError | None:
    """What keeps a row from an outcome other than that the model failed; none if it has one."""
    if isinstance(answer, TimeoutError):
        return row_error(Status.TIMEOUT, Stage.CLASSIFY, f"no answer in {FORWARD_TIMEOUT_S:g} s")
    if isinstance(answer, BrokenProcessPool):
        return row_error(Status.CLASSIFY_FAILED, Stage.CLASSIFY, "the process died in the forward pass")
    if isinstance(answer, Exception):
        return row_error(Status.CLASSIFY_FAILED, Stage.CLASSIFY, f"{type(answer).__name__}: {answer}")
    if answer["status"][0].as_py() == Status.CLASSIFY_FAILED.value:
        return row_error(Status.CLASSIFY_FAILED, Stage.CLASSIFY, answer["error_message"][0].as_py())
    return None


def _blank(run: Run, cell: pa.Table) -> pa.Table:
    """The row with a black image of no manifest."""
    blank = {
        ROW_ID: pa.array([-1], pa.int64()),
        PIXELS: pa.array([bytes(run.spec.pixel_bytes)], cell.schema.field(PIXELS).type),
        ENCODED: pa.nulls(1, pa.binary()),
        "status": pa.nulls(1, pa.string()),
    }
    return pa.table({name: blank.get(name, cell[name]) for name in cell.column_names})


def _check_device(run: Run, answer: pa.Table | Exception) -> None:
    """Raise where not even a blank image got an answer: that the one before it got none says nothing of it then."""
    if isinstance(answer, ImgbatchError):
        raise answer
    if isinstance(answer, Exception):
        failure = _failure(answer)
        assert failure is not None
        raise ImgbatchError(
            f"model {run.bundle.path}: in a fresh process on {run.plan.device} of {socket.gethostname()} not even a "
            f"blank image gets through ({normalise_message(failure.message)}); put that right, or leave that machine "
            f"out, and run the same command again to continue"
        ) from answer


def _error_table(cell: pa.Table, failure: RowError) -> pa.Table:
    widths, heights = cell["width"].to_numpy(), cell["height"].to_numpy()
    return unit_table(cell[ROW_ID].combine_chunks(), [failure], widths, heights, _no_predictions())


def _start(run: Run) -> ProcessPoolExecutor:
    error: Exception | None = None
    for _ in range(_START_TRIES):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)
        try:
            # The class goes along, so that a simulation can put another in its place.
            pool.submit(_load, run, ClassifyStage).result(timeout=_START_TIMEOUT_S)
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


def _load(run: Run, classify_stage: Callable[..., Callable[[pa.Table], pa.Table]]) -> None:
    global _classify
    _classify = classify_stage(run, batch_size=1, num_threads=1)


def _classify_one(cell: pa.Table) -> pa.Table:
    if _classify is None:
        raise RuntimeError("the process was not initialised")
    return _classify(cell).select(UNIT_SCHEMA.names)


def _no_predictions() -> dict[str, pa.Array]:
    outcome = {ROW_ID, "status", "error_stage", "error_message", "attempts", "width", "height"}
    return {field.name: pa.array([], field.type) for field in UNIT_SCHEMA if field.name not in outcome}
