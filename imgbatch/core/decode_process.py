"""One decoding child as its parent sees it: starting it, talking to it without ever waiting for ever, its death."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from imgbatch.core.decode_protocol import DONE, END_UNIT, EXIT_OUT_OF_MEMORY, FRAME, OPEN_UNIT, READY, ChildSettings
from imgbatch.core.raster_request import RasterRequest
from imgbatch.errors import ImgbatchError, Status

_STARTUP_TIMEOUT_S = 120.0
_EXIT_TIMEOUT_S = 5.0

_T = TypeVar("_T")


class ChildGone(Exception):
    """The child died, or made no progress for so long that it counts as dead."""


class ChildProcess:
    """A running child that is ready for a unit; ended by :meth:`kill`, and in any case with this object.

    Raises:
        ImgbatchError: the child could not be started.
    """

    def __init__(self, settings: ChildSettings) -> None:
        self._settings = settings
        # The child's own timer comes first; this one is for a child that was stopped, timer and all.
        self._patience_s = settings.timeout_s + 1
        self._stalled = False
        self._oom_kills = _count_oom_kills()
        self._connection, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                # -P: a folder that happens to be current must not shadow modules.
                [sys.executable, "-P", "-m", "imgbatch.core.decode_child", settings.to_json()],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=_environment(),
            )
            self._finalizer = weakref.finalize(self, _end, self._process, self._connection)
            theirs.close()
            _set_timeout(self._connection, _STARTUP_TIMEOUT_S)
            try:
                ready = self._connection.recv(1)
            except OSError:
                ready = b""
            if ready != READY:
                self.kill()
                log.seek(0)
                last_line = (log.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
                raise ImgbatchError(f"the decoding process does not start: {last_line}")
        _set_timeout(self._connection, self._patience_s)

    @property
    def pid(self) -> int:
        return self._process.pid

    def open_unit(self, descriptor: int, num_rows: int) -> None:
        """Hand over the memory behind ``descriptor``; raises :class:`ChildGone`."""
        try:
            socket.send_fds(self._connection, [FRAME.pack(OPEN_UNIT, num_rows)], [descriptor])
        except OSError:
            raise ChildGone from None

    def send_image(self, row: int, image: bytes | RasterRequest, progress: Callable[[], object]) -> None:
        """Send one encoded image, or where to read one, waiting while the socket is full.

        ``progress`` returns something that changes as the child works. Raises :class:`ChildGone`.
        """
        # Header and image in one call: the child wakes once, and finds both.
        data = image.to_bytes() if isinstance(image, RasterRequest) else image
        parts = [FRAME.pack(row, len(data) if data is image else -len(data)), data]
        sent = self._patiently(partial(self._connection.sendmsg, parts), progress)
        if sent < FRAME.size + len(data):
            rest = memoryview(b"".join(parts))[sent:]
            while rest:
                rest = rest[self._patiently(partial(self._connection.send, rest), progress) :]

    def end_unit(self, progress: Callable[[], object]) -> None:
        """Wait until the child is through with what it was sent; ``progress`` and errors as in :meth:`send_image`."""
        header = FRAME.pack(END_UNIT, 0)
        self._patiently(partial(self._connection.send, header), progress)
        if self._patiently(partial(self._connection.recv, 1), progress) != DONE:
            raise ChildGone

    def kill(self) -> None:
        """End the child at once and reap it."""
        self._finalizer()

    def cause_of_death(self) -> tuple[Status, str]:
        """Reap the dead child and say what it died of."""
        if self._stalled:
            self.kill()
            return Status.TIMEOUT, f"decoding made no progress for {self._patience_s:g} s"
        try:
            code = self._process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        self.kill()
        memory_mb = self._settings.memory_bytes >> 20
        if code == -signal.SIGALRM:
            return Status.TIMEOUT, f"decoding took more than {self._settings.timeout_s:g} s (decode.timeout_s)"
        if code == EXIT_OUT_OF_MEMORY:
            return Status.OUT_OF_MEMORY, f"decoding takes more than {memory_mb} MB (decode.memory_mb)"
        if code == -signal.SIGKILL and _count_oom_kills() > self._oom_kills:
            return Status.OUT_OF_MEMORY, "the kernel ended the decoding process for want of memory"
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return Status.DECODER_CRASH, f"the decoding process {ended}"

    def _patiently(self, operation: Callable[[], _T], progress: Callable[[], object]) -> _T:
        before: object = None
        while True:
            try:
                return operation()
            except BlockingIOError:
                now = progress()
                if now == before:
                    self._stalled = True
                    raise ChildGone from None
                before = now
            except OSError:
                raise ChildGone from None


def _set_timeout(connection: socket.socket, seconds: float) -> None:
    # The kernel's timeout, after which calls raise BlockingIOError: Python's own polls before each call.
    whole, rest = divmod(seconds, 1)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(whole), int(rest * 1e6)))


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    """The parent's, finding the same modules, and without a pool of threads that would never have work."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # Arrow's own allocator would take 1 GiB of addresses at its first use, which would count against decode.memory_mb.
    few = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    return dict(os.environ) | few | {"PYTHONPATH": path}


def _count_oom_kills() -> int:
    """Processes that the kernel ended for want of memory since it started; 0 where it does not say."""
    statistics = Path("/proc/vmstat")
    if not statistics.exists():
        return 0
    lines = (line.split() for line in statistics.read_text().splitlines())
    return next((int(value) for name, value in lines if name == "oom_kill"), 0)
