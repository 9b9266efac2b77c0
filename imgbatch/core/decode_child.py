"""The process that decodes, so that a hang, a crash or a flood of memory ends here and not in the job.

Started by :mod:`imgbatch.core.decode_process` as ``python -m imgbatch.core.decode_child SETTINGS``; standard input
is a socket to the parent, on which it says ``READY`` and then follows :mod:`imgbatch.core.decode_protocol` until
the socket closes.

Each image is decoded under a timer whose signal is left at its default action: it kills the process even while C
code holds the interpreter's lock, which no handler written in Python could.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from imgbatch.core.decode_protocol import (
    DONE,
    END_UNIT,
    EXIT_OUT_OF_MEMORY,
    FRAME,
    READY,
    ChildSettings,
    RowState,
    UnitBuffer,
)
from imgbatch.core.failpoints import failpoint
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.raster_request import RasterRequest
from imgbatch.errors import RowError, Status

_MAPPED_UNITS = 2
"""One that is decoded, and one whose pixels the parent still hands on."""


class _Decode(Protocol):
    def __call__(self, data: bytes, *, is_request: bool) -> Decoded | RowError: ...


def main(settings: ChildSettings, connection: socket.socket) -> None:
    """Decode until the other end of ``connection`` closes."""
    decode = _prepare(settings)
    connection.sendall(READY)
    _silence_standard_error()
    mapped: dict[tuple[int, int], UnitBuffer] = {}
    while unit := _receive_unit(connection, settings, mapped):
        while True:
            header = _receive(connection, FRAME.size)
            if len(header) < FRAME.size:
                return
            row, size = FRAME.unpack(header)
            if row == END_UNIT:
                break
            # From here on the row is what this process dies of: its bytes alone may be more than the memory holds.
            unit.states_N[row] = RowState.STARTED
            try:
                data = _receive(connection, abs(size))
                if len(data) < abs(size):
                    return
                _decode_row(unit, row, partial(decode, data, is_request=size < 0), settings.timeout_s)
            except MemoryError:
                os._exit(EXIT_OUT_OF_MEMORY)
        connection.sendall(DONE)


def _receive_unit(
    connection: socket.socket, settings: ChildSettings, mapped: dict[tuple[int, int], UnitBuffer]
) -> UnitBuffer | None:
    """The memory of the next unit; none: the connection closed.

    Args:
        mapped: by device and inode, what came last, for it comes again.
    """
    header, descriptors, _, _ = socket.recv_fds(connection, FRAME.size, 1)
    if not header:
        return None
    header += _receive(connection, FRAME.size - len(header))
    status = os.fstat(descriptors[0])
    file = (status.st_dev, status.st_ino)
    if file not in mapped:
        if len(mapped) == _MAPPED_UNITS:
            del mapped[next(iter(mapped))]
        mapped[file] = UnitBuffer(descriptors[0], settings.spec, FRAME.unpack(header)[1])
    os.close(descriptors[0])
    return mapped[file]


def _prepare(settings: ChildSettings) -> _Decode:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    # Ctrl-C reaches the whole process group; what to do about it is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    # max_pixels takes the place of Pillow's own limit.
    Image.MAX_IMAGE_PIXELS = None
    # Otherwise Pillow imports plugins when the first image asks for them, at that image's expense.
    Image.init()
    decode_raster = None if settings.max_nodata is None else _raster_decoder(settings, settings.max_nodata)
    _limit_memory(settings.memory_bytes)

    def decode(data: bytes, *, is_request: bool) -> Decoded | RowError:
        if is_request and decode_raster is not None:
            return decode_raster(RasterRequest.from_bytes(data))
        return decode_image(data, settings.spec, max_pixels=settings.max_pixels)

    return decode


def _raster_decoder(settings: ChildSettings, max_nodata: float) -> Callable[[RasterRequest], Decoded | RowError]:
    # Photographs do without GDAL, and without the tenth of a second that importing it takes.
    from imgbatch.core import storage
    from imgbatch.core.rasters import RasterDecoder, gdal_env

    if settings.storage is not None:
        storage.configure(settings.storage)
    gdal_env().__enter__()
    return RasterDecoder(settings.spec, max_pixels=settings.max_pixels, max_nodata=max_nodata).decode


def _limit_memory(allowance: int) -> None:
    """Let this process grow by ``allowance`` bytes of private memory; the shared pixels do not count."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
        limit = int(line.split()[1]) * 1024 + allowance
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _silence_standard_error() -> None:
    # From now on it carries only the remarks of C libraries about images, thousands of them in some collections.
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stderr.fileno())
    os.close(descriptor)


def _decode_row(unit: UnitBuffer, row: int, decode: Callable[[], Decoded | RowError], timeout_s: float) -> None:
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    outcome = decode()
    failpoint("decode.row", row)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(outcome, Decoded):
        unit.pixels_NHWC[row] = outcome.pixels_HWC
        unit.widths_N[row], unit.heights_N[row] = outcome.width, outcome.height
        unit.states_N[row] = RowState.DECODED
    elif outcome.status is Status.OUT_OF_MEMORY:
        os._exit(EXIT_OUT_OF_MEMORY)
    else:
        unit.put_error(row, outcome)
    unit.add_busy(time.perf_counter() - started)


def _receive(connection: socket.socket, size: int) -> bytes:
    """``size`` bytes, or fewer where the connection closed."""
    parts: list[bytes] = []
    while size and (data := connection.recv(size, socket.MSG_WAITALL)):
        parts.append(data)
        size -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


if __name__ == "__main__":
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as parent:
        main(ChildSettings.from_json(sys.argv[1]), parent)
