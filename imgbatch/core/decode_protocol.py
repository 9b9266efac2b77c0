"""What the decoding child and its parent share: settings, frames, and the memory of one unit.

The parent sends, through a stream socket:

    OPEN_UNIT, number of rows, with the descriptor of the unit's memory
    row index, number of bytes, followed by the encoded image
    row index, number of bytes as a negative number, followed by a raster request
    END_UNIT, 0, which the child answers with DONE

Everything the child learns about a row stands in the shared memory the moment it is known, so that its death loses
nothing but the row it was working on.

Legend of shape suffixes: N rows of the unit, H height, W width, C channel.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status

if TYPE_CHECKING:
    from imgbatch.config import StorageConfig

FRAME = struct.Struct("<qq")
OPEN_UNIT = -1
END_UNIT = -2
READY = b"r"
DONE = b"d"
EXIT_OUT_OF_MEMORY = 12
"""The child's exit code when an image did not fit into its memory: a fresh child may have room for it."""

_STATUSES = tuple(Status)
# normalise_message allows 300 characters, and one takes up to four bytes in UTF-8.
_MESSAGE_BYTES = 1200
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class ChildSettings:
    """What a child is started with."""

    spec: PreprocessSpec
    max_pixels: int
    timeout_s: float
    """Seconds that one image may take."""
    memory_bytes: int
    """What the process may take beyond what it holds when it is ready."""
    max_nodata: float | None = None
    """Share of a raster's samples that may be missing; none: there will be no rasters."""
    storage: StorageConfig | None = None
    """Where rasters in object stores are."""

    def to_json(self) -> str:
        stored = self.storage.model_dump() if self.storage is not None else None
        return json.dumps(asdict(replace(self, storage=None)) | {"storage": stored})

    @classmethod
    def from_json(cls, text: str) -> ChildSettings:
        values: dict[str, Any] = json.loads(text)
        if values["storage"] is not None:
            # Photographs do without the configuration, which takes longer to import than all else here.
            from imgbatch.config import StorageConfig

            values["storage"] = StorageConfig.model_validate(values["storage"])
        return cls(**(values | {"spec": PreprocessSpec.from_dict(values["spec"])}))


class RowState(IntEnum):
    """How far the child has come with a row."""

    WAITING = 0
    STARTED = 1
    DECODED = 2
    FAILED = 3


class UnitBuffer:
    """Views on one unit's shared memory, all zero at first.

    It may be used for unit after unit: the kernel clears a page before it hands it out, which takes time.
    """

    def __init__(self, descriptor: int, spec: PreprocessSpec, num_rows: int) -> None:
        """Maps the file behind ``descriptor``, which must be of :func:`unit_bytes`; the descriptor may be closed."""
        self.num_rows = num_rows
        self._shape = (num_rows, spec.crop_size, spec.crop_size, spec.num_channels)
        self._mapping = mmap.mmap(descriptor, unit_bytes(spec, num_rows))
        self._offset = 0
        self.pixels_NHWC = self._take(self._shape, np.uint8)
        # Plain integers: comparing a numpy scalar with an IntEnum takes microseconds, and this is done for every row.
        self.states_N = memoryview(self._take((num_rows,), np.uint8).data)
        self.widths_N = self._take((num_rows,), np.int32)
        self.heights_N = self._take((num_rows,), np.int32)
        self._status_N = self._take((num_rows,), np.uint8)
        self._message_N = self._take((num_rows,), np.dtype((np.bytes_, _MESSAGE_BYTES)))
        self._busy_s = self._take((1,), np.float64)

    def start_anew(self) -> None:
        """For the next unit; pixels stay what they were until a row is decoded."""
        for array in (self.states_N, self.widths_N, self.heights_N, self._busy_s):
            np.asarray(array)[:] = 0

    def hand_out_pixels(self) -> np.ndarray:
        """``pixels_NHWC`` as an array of its own, which lives as long as anyone uses the pixels."""
        return np.ndarray(self._shape, np.uint8, buffer=self._mapping)

    @property
    def busy_s(self) -> float:
        """Seconds that decoding took in the child."""
        return float(self._busy_s[0])

    def add_busy(self, seconds: float) -> None:
        self._busy_s[0] += seconds

    def put_error(self, row: int, error: RowError) -> None:
        """Record that decoding ``row`` failed."""
        self._status_N[row] = _STATUSES.index(error.status)
        self._message_N[row] = error.message.encode(errors="replace")
        self.states_N[row] = RowState.FAILED

    def get_error(self, row: int, attempts: int) -> RowError:
        """What :meth:`put_error` recorded of a row in state ``FAILED``."""
        message = bytes(self._message_N[row]).decode(errors="replace")
        return RowError(_STATUSES[self._status_N[row]], Stage.DECODE, message, attempts)

    def _take(self, shape: tuple[int, ...], dtype: type | np.dtype) -> np.ndarray:
        array = np.ndarray(shape, dtype, buffer=self._mapping, offset=self._offset)
        self._offset += _aligned(array.nbytes)
        return array


def unit_bytes(spec: PreprocessSpec, num_rows: int) -> int:
    """Size of the shared memory of a unit."""
    per_row = (spec.pixel_bytes, 1, 4, 4, 1, _MESSAGE_BYTES)
    return sum(_aligned(num_rows * size) for size in per_row) + _ALIGNMENT


def create_unit_file(spec: PreprocessSpec, num_rows: int) -> int:
    """A descriptor of zeroed memory for :class:`UnitBuffer`; the caller closes it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("imgbatch-unit")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, unit_bytes(spec, num_rows))
    return descriptor


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
