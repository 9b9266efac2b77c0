"""Pixels to probabilities in MNN, without torch.

Shape suffixes: B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.failpoints import failpoint
from imgbatch.core.machine import num_cpus
from imgbatch.core.model import ModelBundle
from imgbatch.core.predictions import BatchedPredictor, BatchOutput, probabilities
from imgbatch.core.variants import MNN_FILE
from imgbatch.errors import Status, UsageError

_MAX_THREADS = 8
_importing = threading.Lock()


class MnnPredictor(BatchedPredictor):
    """A variant of a bundle on the CPU, in float32.

    MNN computes 3 x 3 convolutions by Winograd's method (Lavin and Gray, arXiv:1509.09308), with less than half of the
    multiplications of a direct one. Batches are of exactly ``batch_size``; smaller ones are filled up.

    Args:
        contents: the files of MNN's format; uint8 ``images_BHWC`` in, ``logits_BK`` out.
        num_threads: of one unit, each with weights of its own; eight at most, or none for as many
            as there are cores.
        streams: threads that may call it at once.

    Raises:
        UsageError: MNN is not installed.
        RuntimeError: it cannot run the network, for lack of memory as a rule.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        contents: Mapping[str, bytes],
        *,
        batch_size: int,
        num_threads: int | None,
        streams: int = 1,
    ) -> None:
        super().__init__(bundle, batch_size=batch_size)
        spec = bundle.preprocess
        shape = (batch_size, spec.crop_size, spec.crop_size, spec.num_channels)
        # MNN's own threads serve two callers at most, so each batch has one thread, and a unit several batches at once.
        parallel = streams * min(_MAX_THREADS, num_threads or num_cpus())
        self._idle: SimpleQueue[_Session] = SimpleQueue()
        with tempfile.TemporaryDirectory() as name:
            for file, data in contents.items():
                Path(name, file).write_bytes(data)
            for _ in range(parallel):
                self._idle.put(_Session(Path(name, MNN_FILE), shape))
        self._threads = ThreadPoolExecutor(parallel, thread_name_prefix="mnn")

    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> Future[npt.NDArray[np.float32]]:
        failpoint("classify.forward")
        try:
            return self._threads.submit(self._run, images_BHWC)
        except RuntimeError as error:  # the process is ending, or may have no more threads
            raise _CannotStart(str(error)) from error

    def _run(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        session = self._idle.get()
        try:
            return session.run(images_BHWC)
        finally:
            self._idle.put(session)

    def _status_of(self, error: Exception) -> Status:
        if isinstance(error, _CannotStart):
            raise error
        return super()._status_of(error)

    def _collect(self, output: Future[npt.NDArray[np.float32]]) -> BatchOutput:
        return probabilities(output.result(), self.bundle.task, self.bundle.temperature)


class _CannotStart(Exception):
    """No fault of an image."""


class _Session:
    """A network of its own, because MNN runs one session of each at a time."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self._mnn, self._shape = import_mnn(), shape
        self._network = self._mnn.Interpreter(str(path))
        self._session = self._network.createSession({"backend": "CPU", "precision": "normal", "numThread": 1})
        self._input = self._network.getSessionInput(self._session)
        self._network.resizeTensor(self._input, shape)
        self._network.resizeSession(self._session)
        self._output = self._network.getSessionOutput(self._session)
        self._batch_BHWC = np.zeros(shape, np.uint8)
        # Only a batch shows whether all of it could be set up.
        self.run(self._batch_BHWC)

    def run(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """``logits_BK`` of up to a batch."""
        mnn = self._mnn
        self._batch_BHWC[: len(images_BHWC)] = images_BHWC
        # "Caffe" leaves dimensions in their order; "Tensorflow" would have MNN turn NHWC into what it takes for NCHW.
        images = mnn.Tensor(self._shape, mnn.Halide_Type_Uint8, self._batch_BHWC, mnn.Tensor_DimensionType_Caffe)
        if not self._input.copyFrom(images):
            raise RuntimeError("MNN did not take the images")
        if code := self._network.runSession(self._session):
            raise RuntimeError(f"MNN's error code {code}")
        logits_BK = np.zeros(self._output.getShape(), np.float32)
        logits = mnn.Tensor(logits_BK.shape, mnn.Halide_Type_Float, logits_BK, mnn.Tensor_DimensionType_Caffe)
        if not self._output.copyToHostTensor(logits):
            raise RuntimeError("MNN gave no output")
        given_BK: npt.NDArray[np.float32] = logits.getNumpyData()[: len(images_BHWC)].copy()
        return given_BK


def import_mnn() -> Any:
    """The package; raises :class:`UsageError` where it is not installed."""
    try:
        with _importing, _silent_stdout() if "MNN" not in sys.modules else contextlib.nullcontext():
            import MNN
    except ImportError as error:
        raise UsageError("MNN is not installed; pip install 'imgbatch[mnn]'") from error
    return MNN


@contextlib.contextmanager
def _silent_stdout() -> Iterator[None]:
    """MNN's library prints the processor's features where commands print their results."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
