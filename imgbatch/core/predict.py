"""Pixels to probabilities in torch, the same for every engine.

Shape suffixes: B image of the batch, H height, W width, C channel, K class, D feature.
"""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from imgbatch.core.architectures import head_module_name, pooled
from imgbatch.core.failpoints import failpoint
from imgbatch.core.machine import keep_freed_memory
from imgbatch.core.model import ModelBundle, load_network
from imgbatch.core.predictions import BatchedPredictor, BatchOutput
from imgbatch.errors import Status, UsageError, normalise_message

_OF_MEMORY = {
    # torch tries cuDNN's algorithms in turn, and does not tell when it was memory that each lacked (Conv_v8.cpp).
    "cuda": re.compile("out of memory|ALLOC(ATION)?_FAILED|_NOT_INITIALIZED|unable to find an engine"),
    "cpu": re.compile("can't allocate memory|bad_alloc"),
}
_OF_DEVICE = {"cuda": re.compile("CUDA|cuDNN|Triton Error")}


def failure_of(message: str, device_type: str) -> Literal["memory", "device"] | None:
    """What the message of an error says of the device that it was raised on; none: nothing.

    The libraries below torch have no exceptions of their own: cuBLAS, cuDNN and Triton raise ``RuntimeError`` for
    whatever befalls the device.
    """
    if device_type in _OF_MEMORY and _OF_MEMORY[device_type].search(message):
        return "memory"
    if device_type in _OF_DEVICE and _OF_DEVICE[device_type].search(message):
        return "device"
    return None


@dataclass(frozen=True, slots=True)
class _Output:
    """Of one batch, on the device."""

    probs_BK: Tensor
    """float32, zeros where not finite."""
    finite_B: Tensor
    features_BD: Tensor | None


class Predictor(BatchedPredictor):
    """A loaded model on a device.

    channels_last; float32 and eager unless told otherwise, because that is what a bundle's numbers were measured
    with. Measured with ResNet-18 at 224 px on one core of an AVX-512 server CPU, images/s at
    batches of 8 / 32 (medians of 4): contiguous 22 / 18, channels_last 26 / 23; folding batch norms by torch.fx adds
    1 to 5% but cannot trace every architecture, mkldnn tensors and TorchScript add 10 to 15% but are deprecated.
    All agree within 1e-6.

    Args:
        device: ``cpu`` or ``cuda`` (``cuda:1`` for another than the first).
        batch_size: images per forward pass, at most; fewer while a GPU has not enough memory, or from then on where
            the network is compiled.
        features: give ``features_ND`` too, of the same forward pass.
        num_threads: of the CPU for one forward pass, or none to leave it. Several threads may call at once; on a GPU
            each has a stream of its own.
        compiled: by ``torch.compile``, for batches of exactly ``batch_size``: smaller ones are filled up; no features.
        reduced: what convolutions and products of matrices are computed in (``torch.autocast``): bfloat16, or float16,
            whose largest number is 65,504; the rest in float32, as is everything without it.
        graph: what runs instead of the bundle's network: uint8 ``images_BHWC`` on the device in, float32 ``logits_BK``
            out, for batches of exactly ``batch_size``, as when compiled; no features.

    Raises:
        UsageError: the bundle's weights are not those it describes; what is compiled, or the graph, does not run here.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        features: bool = False,
        num_threads: int | None = None,
        compiled: bool = False,
        reduced: torch.dtype | None = None,
        graph: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if features and (compiled or graph):
            raise ValueError("a compiled network gives no features")
        # Another size would be compiled anew, or refused; fewer images are filled up to it.
        self._fills_up = compiled or graph is not None
        super().__init__(bundle, batch_size=batch_size, features=features, may_grow=not self._fills_up)
        self._num_threads = num_threads
        self._of_thread = threading.local()
        self._settle_threads()
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._reduced = reduced
        self._graph = graph
        if graph is None:
            network = load_network(bundle).requires_grad_(False)
            network = network.to(self.device).to(memory_format=torch.channels_last)
            if features:
                # Once: threads that each put a hook of their own there would see each other's images.
                network.get_submodule(head_module_name(bundle.arch)).register_forward_pre_hook(self._keep_head_input)
            self._network: nn.Module = torch.compile(network, dynamic=False) if compiled else network  # type: ignore[assignment]
            std_C = 255.0 * torch.tensor(bundle.preprocess.std)
            self._scale_C11 = std_C.reciprocal().view(-1, 1, 1).to(self.device)
            self._shift_C11 = (-255.0 * torch.tensor(bundle.preprocess.mean) / std_C).view(-1, 1, 1).to(self.device)
        self._temperature_K = torch.tensor(bundle.temperature, device=self.device)
        if self.device.type == "cuda":
            # The streams of other threads do not wait for this one's.
            torch.cuda.synchronize(self.device)
        if self._fills_up:
            self._try_out()

    def _try_out(self) -> None:
        """A batch of zeros, which is compiled for: that a network cannot be is no fault of an image."""
        spec = self.bundle.preprocess
        while True:
            shape = (self.batch_size, spec.crop_size, spec.crop_size, spec.num_channels)
            try:
                self._collect(self._forward(np.zeros(shape, np.uint8)))
                return
            except Exception as error:
                failure = self._failure(error)
                if failure == "memory" and self._graph is None and self._shrink(self.batch_size):
                    self._free(error)
                    continue
                if isinstance(error, torch.AcceleratorError):
                    raise
                raise UsageError(
                    f"{self.bundle.path}: the network does not run on {self.device} in batches of {self.batch_size} "
                    f"({normalise_message(error)}); set classify.backend to torch"
                ) from error

    def _settle_threads(self) -> None:
        """Once in each thread that calls: OpenMP keeps the number for each of them."""
        if self._num_threads is not None and not hasattr(self._of_thread, "settled"):
            torch.set_num_threads(self._num_threads)
            self._of_thread.settled = True

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        """On a GPU, the calling thread's own, so that it waits for its own results only."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        mine = self._of_thread
        if not hasattr(mine, "computing"):
            mine.computing, mine.copying = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        return torch.cuda.stream(mine.computing)

    @torch.inference_mode()
    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> _Output:
        self._settle_threads()
        with self._on_stream(), torch.autocast(self.device.type, self._reduced, enabled=self._reduced is not None):
            return self._run(images_BHWC)

    def _run(self, images_BHWC: npt.NDArray[np.uint8]) -> _Output:
        # A copy, because what Ray hands out is read-only, and because only pinned memory is copied in the background.
        # Another thread may have made batches smaller since this one was cut.
        num_staged = max(len(images_BHWC), self.batch_size) if self._fills_up else len(images_BHWC)
        shape = (num_staged, *images_BHWC.shape[1:])
        staged_BHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        staged_BHWC.numpy()[: len(images_BHWC)] = images_BHWC
        staged_BHWC.numpy()[len(images_BHWC) :] = 0
        failpoint("classify.forward")
        logits_BK, features_BD = self._infer(self._to_device(staged_BHWC))
        logits_BK = logits_BK[: len(images_BHWC)].float() / self._temperature_K
        probs_BK = logits_BK.sigmoid() if self.bundle.task == "multilabel" else logits_BK.softmax(dim=1)
        finite_B = logits_BK.isfinite().all(dim=1)
        return _Output(torch.where(finite_B[:, None], probs_BK, 0.0), finite_B, features_BD)

    def _infer(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._graph is not None:
            return self._graph(images_BHWC), None
        # NHWC seen as NCHW is what channels_last means, so no pixel moves.
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2)
        inputs_BCHW = torch.addcmul(self._shift_C11, pixels_BCHW.float(), self._scale_C11)
        logits_BK = self._network(inputs_BCHW)
        if not self._with_features:
            return logits_BK, None
        return logits_BK, pooled(self._of_thread.head_input).float()

    def _keep_head_input(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._of_thread.head_input = inputs[0]

    def _to_device(self, staged: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return staged.to(self.device)
        # Pixels cross to a GPU on a stream of their own, while it computes the batch before.
        copying, computing = self._of_thread.copying, torch.cuda.current_stream(self.device)
        with torch.cuda.stream(copying):
            pixels = staged.to(self.device, non_blocking=True)
        computing.wait_stream(copying)
        # The allocator must not hand the memory to the next copy before the computation is through with it.
        pixels.record_stream(computing)
        return pixels

    def _collect(self, output: _Output) -> BatchOutput:
        with self._on_stream():
            features_BD = output.features_BD.cpu().numpy() if output.features_BD is not None else None
            return BatchOutput(output.probs_BK.cpu().numpy(), output.finite_B.cpu().numpy(), features_BD)

    def _failure(self, error: Exception) -> Literal["memory", "device"] | None:
        """:func:`failure_of` an error, whose class says enough in torch's own cases."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return "memory"
        failure = failure_of(str(error), self.device.type)
        return "device" if failure is None and isinstance(error, torch.AcceleratorError) else failure

    def _status_of(self, error: Exception) -> Status:
        """Raises again what is no image's fault.

        When a GPU has failed it is in a state that only a new process cures, of which ONNX Runtime tells in errors of
        its own; and where a graph's batch does not fit, no smaller one can be tried.
        """
        failure = self._failure(error)
        of_graph = self._graph is not None and (failure == "memory" or self.device.type == "cuda")
        if of_graph or failure == "device":
            raise error
        if failure is None:
            return Status.CLASSIFY_FAILED
        self._free(error)
        return Status.OUT_OF_MEMORY

    def _free(self, error: Exception) -> None:
        """Give back the memory that torch keeps: cuBLAS, cuDNN and other processes have theirs from the GPU itself."""
        # The tensors of the failed pass are held by its frames, and those by the error.
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()

    def _memory(self) -> str:
        if self.device.type != "cuda":
            return super()._memory()
        free, total = torch.cuda.mem_get_info(self.device)
        name = torch.cuda.get_device_name(self.device)
        return f"the memory of {name}, of which {free / 2**20:,.0f} of {total / 2**20:,.0f} MB are free,"
