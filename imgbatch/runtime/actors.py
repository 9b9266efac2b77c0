"""The stages as Ray Data calls them: one block of one unit in, one block out."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pyarrow as pa

from imgbatch.core.plan import Run
from imgbatch.core.results import Receipt
from imgbatch.core.stages import UNIT, ClassifyStage, CommitStage, DecodeStage
from imgbatch.errors import CannotWrite
from imgbatch.runtime.metrics import WaitMetric

RECEIPT = "receipt"
_CANNOT_WRITE = "cannot_write"


def _dies_visibly(call: Callable[[Any, pa.Table], pa.Table]) -> Callable[[Any, pa.Table], pa.Table]:
    """``sys.exit`` counts as a wish of the actor, after which Ray waits for it for ever; a death is tried again."""

    @functools.wraps(call)
    def called(self: Any, block: pa.Table) -> pa.Table:
        try:
            return call(self, block)
        except SystemExit:
            os._exit(1)

    return called


class DecodeActor:
    """CPU pool: fetches and decodes, several units at once. Does not import torch."""

    decode_stage: ClassVar[type[DecodeStage]] = DecodeStage
    """A simulation puts another in its place, as it does with the other actor's stages."""

    def __init__(self, run: Run, processes: int) -> None:
        self._decode = self.decode_stage(run, processes=processes)

    @_dies_visibly
    def __call__(self, block: pa.Table) -> pa.Table:
        return self._decode(block[UNIT][0].as_py())


class ClassifyActor:
    """GPU pool, or the cores: runs the model over ``streams`` units at once, and writes the unit files.

    Any more threads that call are those that write: the model need not wait for the storage. It has threads of its
    own, because torch and OpenVINO keep buffers for each thread that ever ran it. What goes on to the driver is one
    small row; that nothing can be written is told in the same way, as Ray Data keeps little of an exception.
    """

    classify_stage: ClassVar[Callable[..., Callable[[pa.Table], pa.Table]]] = ClassifyStage
    commit_stage: ClassVar[Callable[..., Callable[[pa.Table], Receipt]]] = CommitStage

    def __init__(self, run: Run, *, batch_size: int, num_threads: int | None, streams: int, defer: bool) -> None:
        self._classify = self.classify_stage(run, batch_size=batch_size, num_threads=num_threads, streams=streams)
        self._commit = self.commit_stage(run, defer=defer)
        self._streams = ThreadPoolExecutor(streams, thread_name_prefix="stream")
        self._waiting = WaitMetric(run.run_id)

    @_dies_visibly
    def __call__(self, block: pa.Table) -> pa.Table:
        classified = self._streams.submit(self._run_model, block).result()
        try:
            told = self._commit(classified).to_dict()
        except CannotWrite as error:
            told = {_CANNOT_WRITE: str(error)}
        return pa.table({RECEIPT: [json.dumps(told)]})

    def _run_model(self, block: pa.Table) -> pa.Table:
        with self._waiting:
            return self._classify(block)


def read_receipts(block: pa.Table) -> list[Receipt]:
    """The receipts of a block of :class:`ClassifyActor`; raises :class:`CannotWrite` where that is what it tells."""
    told = [json.loads(text) for text in block[RECEIPT].to_pylist()]
    for values in told:
        if _CANNOT_WRITE in values:
            raise CannotWrite(values[_CANNOT_WRITE])
    return [Receipt(**values) for values in told]
