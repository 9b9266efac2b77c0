"""Decoding in a child process that can be killed: a poison image costs one row, not the unit.

Encoded bytes, or which part of which raster to read, go to the child through a socket, whose buffer keeps it busy
while the parent fetches; pixels come back through memory that both map, so none is copied between processes. The
child is a plain new interpreter: a fork would inherit the threads and locks of the worker, and ``multiprocessing``
would re-run its ``__main__``.

Legend of shape suffixes: N rows of the unit, H height, W width, C channel.
"""

from __future__ import annotations

import contextlib
import os
import queue
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from imgbatch.config import DecodeConfig
from imgbatch.core import storage
from imgbatch.core.decode_process import ChildGone, ChildProcess
from imgbatch.core.decode_protocol import ChildSettings, RowState, UnitBuffer, create_unit_file
from imgbatch.core.raster_request import RasterRequest
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import ImgbatchError, RowError, Stage, Status, row_error

# A row that the child died of gets a second try in a fresh child, so that neither a stray kill nor memory that
# earlier images left behind becomes the row's fault. A timeout is the row's own, and would cost as long again.
_MAX_ATTEMPTS = {Status.TIMEOUT: 1, Status.OUT_OF_MEMORY: 2, Status.DECODER_CRASH: 2}
_MAX_IDLE_DEATHS = 3
_SPARE_UNITS = 1
"""Whose memory is kept for the next unit, while another's pixels are handed on."""

Payload = bytes | RasterRequest | RowError | None
"""An encoded image, where to read one, why there is none; or none, where someone else decodes it."""


@dataclass(frozen=True, slots=True)
class DecodedUnit:
    """What became of the rows of a unit, in their order."""

    pixels_NHWC: np.ndarray
    """uint8, zeros where a row failed or was left to someone else."""
    widths: np.ndarray
    """int32, px of the source after orientation, 0 where pixels are zeros."""
    heights: np.ndarray
    """int32, px of the source after orientation, 0 where pixels are zeros."""
    errors: list[RowError | None]
    decode_s: float
    """Seconds that the child was busy."""


class Decoder:
    """Decodes units in a child process; a context manager, for one thread.

    An image that takes longer than ``config.timeout_s`` is ``TIMEOUT``, or ``FETCH_FAILED`` where it is part of a
    raster in an object store, whose server may have stalled. One that needs more than ``config.memory_mb`` is
    ``OUT_OF_MEMORY``, and one that the child dies of is ``DECODER_CRASH``, both only after a second try in a fresh
    child.
    """

    def __init__(self, spec: PreprocessSpec, config: DecodeConfig, *, max_nodata: float | None = None) -> None:
        """``max_nodata``: rasters will be asked for; see ``config.GeoConfig.max_nodata``."""
        self._spec = spec
        memory_bytes = config.memory_mb * 2**20
        settings = storage.settings() if max_nodata is not None else None
        self._settings = ChildSettings(spec, config.max_pixels, config.timeout_s, memory_bytes, max_nodata, settings)
        self._child: ChildProcess | None = None
        self._spare: queue.SimpleQueue[_UnitMemory] = queue.SimpleQueue()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def child_pid(self) -> int | None:
        """Process id of the child, which is started when it is first needed."""
        return self._child.pid if self._child else None

    def close(self) -> None:
        """End the child; another :meth:`decode` starts a new one."""
        if self._child:
            self._child.kill()
            self._child = None
        with contextlib.suppress(queue.Empty):
            while True:
                self._spare.get_nowait()

    def decode(self, payloads: Iterable[Payload], num_rows: int) -> DecodedUnit:
        """Decode a unit of ``num_rows`` images; a payload that is an error already stays that error.

        Payloads are taken one by one, a little ahead of the child: as many as the socket holds.

        Raises:
            ValueError: ``payloads`` yields more or fewer than ``num_rows``.
            ImgbatchError: the child cannot be started, or keeps dying without touching an image.
        """
        memory = self._memory(num_rows)
        try:
            unit = _UnitInFlight(memory)
            numbered = zip(range(num_rows), payloads, strict=True)
            idle_deaths = 0
            while not self._converse(unit, numbered):
                idle_deaths = 0 if self._bury_child(unit) else idle_deaths + 1
                if idle_deaths == _MAX_IDLE_DEATHS:
                    raise ImgbatchError(f"the decoding process died {idle_deaths} times without an image at work")
            decoded = unit.result()
        except BaseException:
            # The child may hold half a frame: it cannot be talked to any more.
            self.close()
            raise
        weakref.finalize(decoded.pixels_NHWC, _keep_spare, self._spare, memory).atexit = False
        return decoded

    def _memory(self, num_rows: int) -> _UnitMemory:
        """That of an earlier unit whose pixels nobody uses any more, or else new memory."""
        with contextlib.suppress(queue.Empty):
            while True:
                spare = self._spare.get_nowait()
                if spare.buffer.num_rows == num_rows:
                    spare.start_anew()
                    return spare
        return _UnitMemory(self._spec, num_rows)

    def _converse(self, unit: _UnitInFlight, payloads: Iterator[tuple[int, Payload]]) -> bool:
        """Send a child all that is still to decode and wait until it is through; false: it died."""
        child = self._child = self._child or ChildProcess(self._settings)
        try:
            child.open_unit(unit.memory.descriptor, unit.num_rows)
            for row, image in unit.unfinished():
                child.send_image(row, image, unit.progress)
            for row, payload in payloads:
                if isinstance(payload, RowError):
                    unit.errors[row] = payload
                elif payload is not None:
                    unit.add(row, payload)
                    child.send_image(row, payload, unit.progress)
            child.end_unit(unit.progress)
        except ChildGone:
            return False
        return True

    def _bury_child(self, unit: _UnitInFlight) -> bool:
        """Reap the dead child and settle the row it was working on; false if there was none."""
        assert self._child is not None
        status, message = self._child.cause_of_death()
        self._child = None
        return unit.blame_started_row(status, message)


class _UnitMemory:
    """What a unit is decoded into, and the descriptor by which the child finds it; used again and again."""

    def __init__(self, spec: PreprocessSpec, num_rows: int) -> None:
        self.descriptor = create_unit_file(spec, num_rows)
        weakref.finalize(self, os.close, self.descriptor)
        self.buffer = UnitBuffer(self.descriptor, spec, num_rows)
        self.is_fresh = True
        """Every pixel is zero but those of decoded rows."""

    def start_anew(self) -> None:
        self.buffer.start_anew()
        self.is_fresh = False


def _keep_spare(spare: queue.SimpleQueue[_UnitMemory], memory: _UnitMemory) -> None:
    if spare.qsize() < _SPARE_UNITS:
        spare.put(memory)


class _UnitInFlight:
    """A unit while it is decoded: its memory, the errors so far, and the payloads that the child may not have read.

    The child works in the order in which payloads were added.
    """

    def __init__(self, memory: _UnitMemory) -> None:
        self.memory = memory
        self.num_rows = memory.buffer.num_rows
        self.errors: list[RowError | None] = [None] * self.num_rows
        self._buffer = memory.buffer
        self._pending: deque[tuple[int, bytes | RasterRequest]] = deque()
        self._deaths: Counter[int] = Counter()

    def add(self, row: int, image: bytes | RasterRequest) -> None:
        """Keep ``image`` until the child is through with it."""
        self._forget_finished()
        self._pending.append((row, image))

    def unfinished(self) -> list[tuple[int, bytes | RasterRequest]]:
        """What a fresh child has to be sent again."""
        self._forget_finished()
        return list(self._pending)

    def progress(self) -> int:
        """Grows while the child works."""
        return sum(self._buffer.states_N)

    def blame_started_row(self, status: Status, message: str) -> bool:
        """Settle the row that the child was working on when it died, or give it another try; false: there was none."""
        self._forget_finished()
        if not self._pending or self._buffer.states_N[self._pending[0][0]] != RowState.STARTED:
            return False
        row, image = self._pending[0]
        self._deaths[row] += 1
        self._buffer.states_N[row] = RowState.WAITING
        if self._deaths[row] >= _MAX_ATTEMPTS[status]:
            if status is Status.TIMEOUT and _is_remote(image):
                # The child waited for a server, more likely than not; that may pass.
                status = Status.FETCH_FAILED
            self.errors[row] = row_error(status, Stage.DECODE, message, self._deaths[row])
            self._buffer.pixels_NHWC[row] = 0
            self._buffer.widths_N[row] = self._buffer.heights_N[row] = 0
            self._pending.popleft()
        return True

    def result(self) -> DecodedUnit:
        buffer = self._buffer
        for row, state in enumerate(buffer.states_N):
            if state == RowState.FAILED:
                self.errors[row] = buffer.get_error(row, attempts=self._deaths[row] + 1)
            if state != RowState.DECODED and not self.memory.is_fresh:
                buffer.pixels_NHWC[row] = 0
        widths, heights = buffer.widths_N.copy(), buffer.heights_N.copy()
        return DecodedUnit(buffer.hand_out_pixels(), widths, heights, self.errors, buffer.busy_s)

    def _forget_finished(self) -> None:
        while self._pending and self._buffer.states_N[self._pending[0][0]] >= RowState.DECODED:
            self._pending.popleft()


def _is_remote(image: bytes | RasterRequest) -> bool:
    return isinstance(image, RasterRequest) and image.uri is not None and storage.is_s3(image.uri)
