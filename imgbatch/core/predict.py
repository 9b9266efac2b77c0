"""Pixels to probabilities: the forward pass, the same for every engine.

Shape suffixes: N image of the call, B image of the batch, H height, W width, C channel, K class,
D feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imgbatch.core.architectures import forward_with_features
from imgbatch.core.failpoints import failpoint
from imgbatch.core.model import ModelBundle, load_network
from imgbatch.errors import RowError, Stage, Status, row_error


@dataclass(frozen=True, slots=True)
class Predictions:
    """One row per image of the call, in its order.

    Rows with an error are zeros in ``probs_NK``; their ``finite_N`` is false if the model's output held NaN or
    infinity, or if there was none.
    """

    probs_NK: npt.NDArray[np.float32]
    """0 to 1; rows add up to 1 unless the task is multilabel."""
    finite_N: npt.NDArray[np.bool_]
    errors: list[RowError | None]
    """``CLASSIFY_FAILED``, ``OUT_OF_MEMORY`` or ``NON_FINITE``, at ``Stage.CLASSIFY``."""
    features_ND: npt.NDArray[np.float32] | None = None
    """What the head saw of each image, where asked for; D is 0 if no image got that far."""


@dataclass(frozen=True, slots=True)
class _Output:
    """Of one batch, on the device."""

    probs_BK: Tensor
    """float32, zeros where not finite."""
    finite_B: Tensor
    features_BD: Tensor | None


class Predictor:
    """A loaded model on a device.

    float32, eager, channels_last. Measured with ResNet-18 at 224 px on one core of an AVX-512 server CPU, images/s at
    batches of 8 / 32 (medians of 4): contiguous 22 / 18, channels_last 26 / 23; folding batch norms by torch.fx adds
    1 to 5% but cannot trace every architecture, mkldnn tensors and TorchScript add 10 to 15% but are deprecated.
    All agree within 1e-6.

    Args:
        device: ``cpu`` or ``cuda`` (``cuda:1`` for another than the first).
        batch_size: images per forward pass, at most; halved for good when a GPU has not enough memory.
        features: give ``features_ND`` too, of the same forward pass.
        num_threads: of the CPU for one forward pass (a setting of the whole process), or none to leave it.

    Raises:
        UsageError: the bundle's weights are not those it describes.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        features: bool = False,
        num_threads: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.bundle = bundle
        self.batch_size = batch_size
        self._with_features = features
        self.device = torch.device(device)
        network = load_network(bundle).requires_grad_(False)
        self._network = network.to(self.device).to(memory_format=torch.channels_last)
        std_C = 255.0 * torch.tensor(bundle.preprocess.std)
        self._scale_C11 = std_C.reciprocal().view(-1, 1, 1).to(self.device)
        self._shift_C11 = (-255.0 * torch.tensor(bundle.preprocess.mean) / std_C).view(-1, 1, 1).to(self.device)
        self._temperature_K = torch.tensor(bundle.temperature, device=self.device)

    def predict(self, images_NHWC: npt.NDArray[np.uint8]) -> Predictions:
        """Probabilities of every image; one that cannot be classified costs its own row only.

        Args:
            images_NHWC: uint8, decoded and cropped as ``bundle.preprocess`` says.

        Raises:
            ValueError: not images of that shape and type.
            torch.AcceleratorError: the GPU is in a state that only a new process cures.
        """
        side, channels = self.bundle.preprocess.crop_size, self.bundle.preprocess.num_channels
        if images_NHWC.dtype != np.uint8 or images_NHWC.shape[1:] != (side, side, channels):
            raise ValueError(
                f"images must be uint8 [N, {side}, {side}, {channels}], not {images_NHWC.dtype} {images_NHWC.shape}"
            )
        num_images = len(images_NHWC)
        probs_NK = np.zeros((num_images, self.bundle.num_classes), dtype=np.float32)
        finite_N = np.zeros(num_images, dtype=bool)
        errors: list[RowError | None] = [None] * num_images
        pending = [(0, num_images)]
        done: list[tuple[int, int, _Output]] = []
        while pending:
            start, stop = pending.pop()
            if stop - start > self.batch_size:
                pending += [(start + self.batch_size, stop), (start, start + self.batch_size)]
            elif stop > start:
                try:
                    done.append((start, stop, self._forward(images_NHWC[start:stop])))
                except torch.AcceleratorError:
                    raise
                except Exception as error:
                    # Halves are tried again, down to the single images at fault.
                    out_of_memory = isinstance(error, torch.OutOfMemoryError)
                    if stop - start == 1:
                        status = Status.OUT_OF_MEMORY if out_of_memory else Status.CLASSIFY_FAILED
                        errors[start] = row_error(status, Stage.CLASSIFY, error)
                        continue
                    middle = (start + stop) // 2
                    pending += [(middle, stop), (start, middle)]
                    if out_of_memory:
                        self.batch_size = middle - start
                        torch.cuda.empty_cache()
        num_features = next((output.features_BD.shape[1] for *_, output in done if output.features_BD is not None), 0)
        features_ND = np.zeros((num_images, num_features), dtype=np.float32) if self._with_features else None
        for start, stop, output in done:
            probs_NK[start:stop] = output.probs_BK.cpu().numpy()
            finite_N[start:stop] = output.finite_B.cpu().numpy()
            if features_ND is not None and output.features_BD is not None:
                features_ND[start:stop] = output.features_BD.cpu().numpy()
        for index in np.flatnonzero(~finite_N):
            if errors[index] is None:
                message = "the model's output holds NaN or infinity"
                errors[index] = row_error(Status.NON_FINITE, Stage.CLASSIFY, message)
        return Predictions(probs_NK, finite_N, errors, features_ND)

    @torch.inference_mode()
    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> _Output:
        # A copy, because what Ray hands out is read-only, and because only pinned memory is copied in the background.
        staged_BHWC = torch.empty(images_BHWC.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        staged_BHWC.numpy()[...] = images_BHWC
        failpoint("classify.forward")
        # NHWC seen as NCHW is what channels_last means, so no pixel moves.
        pixels_BCHW = staged_BHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        inputs_BCHW = torch.addcmul(self._shift_C11, pixels_BCHW.float(), self._scale_C11)
        features_BD = None
        if self._with_features:
            logits_BK, features_BD = forward_with_features(self._network, self.bundle.arch, inputs_BCHW)
            features_BD = features_BD.float()
        else:
            logits_BK = self._network(inputs_BCHW)
        logits_BK = logits_BK.float() / self._temperature_K
        probs_BK = logits_BK.sigmoid() if self.bundle.task == "multilabel" else logits_BK.softmax(dim=1)
        finite_B = logits_BK.isfinite().all(dim=1)
        return _Output(torch.where(finite_B[:, None], probs_BK, 0.0), finite_B, features_BD)
