"""What a model says of a call's images, and how they get through it in batches, whatever runs the model.

Shape suffixes: N image of the call, B image of the batch, H height, W width, C channel, K class, D feature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.model import ModelBundle
from imgbatch.errors import RowError, Stage, Status, UsageError, row_error


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
class BatchOutput:
    """Of one batch, on the CPU."""

    probs_BK: npt.NDArray[np.float32]
    """Zeros where not finite."""
    finite_B: npt.NDArray[np.bool_]
    features_BD: npt.NDArray[np.float32] | None = None


def require_predictions(predictions: Predictions, who: str) -> None:
    """Raise :class:`UsageError` if any image has none: what was measured on the others would hide it.

    Args:
        who: gave them, for the message.
    """
    errors = [error for error in predictions.errors if error is not None]
    if errors:
        raise UsageError(
            f"{who} gave nothing for {len(errors)} of {len(predictions.errors)} images: {errors[0].message}"
        )


class BatchedPredictor(ABC):
    """Runs a model over any number of images; one that cannot be classified costs its own row only.

    Args:
        batch_size: images per forward pass, at most; halved for good when a device has not enough memory.
        features: give ``features_ND`` too, of the same forward pass.
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int, features: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.bundle = bundle
        self.batch_size = batch_size
        self._with_features = features

    def predict(self, images_NHWC: npt.NDArray[np.uint8]) -> Predictions:
        """Probabilities of every image.

        Args:
            images_NHWC: uint8, decoded and cropped as ``bundle.preprocess`` says.

        Raises:
            ValueError: not images of that shape and type.
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
        outputs: list[tuple[int, int, BatchOutput]] = []

        def try_again(start: int, stop: int, error: Exception) -> None:
            """In smaller batches where memory was short, else in halves: down to the single images at fault."""
            status = self._status_of(error)
            if status == Status.OUT_OF_MEMORY and self._shrink(stop - start):
                pending.append((start, stop))
            elif stop - start == 1:
                errors[start] = row_error(status, Stage.CLASSIFY, error)
            else:
                middle = (start + stop) // 2
                pending.extend([(middle, stop), (start, middle)])

        while pending:
            on_their_way: list[tuple[int, int, Any]] = []
            while pending:
                start, stop = pending.pop()
                size = self.batch_size  # another thread may make it smaller
                if stop - start > size:
                    pending += [(start + size, stop), (start, start + size)]
                elif stop > start:
                    try:
                        on_their_way.append((start, stop, self._forward(images_NHWC[start:stop])))
                    except Exception as error:
                        try_again(start, stop, error)
            # Only now: until here the CPU may have been ahead of the device.
            for start, stop, output in on_their_way:
                try:
                    outputs.append((start, stop, self._collect(output)))
                except Exception as error:
                    try_again(start, stop, error)
        num_features = next((o.features_BD.shape[1] for *_, o in outputs if o.features_BD is not None), 0)
        features_ND = np.zeros((num_images, num_features), dtype=np.float32) if self._with_features else None
        for start, stop, output in outputs:
            probs_NK[start:stop] = output.probs_BK
            finite_N[start:stop] = output.finite_B
            if features_ND is not None and output.features_BD is not None:
                features_ND[start:stop] = output.features_BD
        for index in np.flatnonzero(~finite_N):
            if errors[index] is None:
                message = "the model's output holds NaN or infinity"
                errors[index] = row_error(Status.NON_FINITE, Stage.CLASSIFY, message)
        return Predictions(probs_NK, finite_N, errors, features_ND)

    def _shrink(self, num_images: int) -> bool:
        """Halve the batches, of which one of ``num_images`` did not fit; false: it was of one image already."""
        # Another thread may have done so since that one was begun.
        self.batch_size = min(self.batch_size, max(1, num_images // 2))
        return num_images > 1

    @abstractmethod
    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Start the forward pass of up to ``batch_size`` images; its output may still be on its way."""

    @abstractmethod
    def _collect(self, output: Any) -> BatchOutput:
        """What :meth:`_forward` gave, waited for; an error counts as one of the forward pass."""

    def _status_of(self, error: Exception) -> Status:
        """What a forward pass that raised means for its images; raises the error again if it is not theirs."""
        del error
        return Status.CLASSIFY_FAILED


def probabilities(logits_BK: npt.NDArray[np.float32], task: str, temperature: float | tuple[float, ...]) -> BatchOutput:
    """Softmax, or sigmoid where classes do not exclude each other, of logits divided by the temperature."""
    with np.errstate(over="ignore"):
        scaled_BK = logits_BK / np.asarray(temperature, np.float32)
    finite_B: npt.NDArray[np.bool_] = np.all(np.isfinite(scaled_BK), axis=1)
    scaled_BK = np.where(finite_B[:, None], scaled_BK, 0.0)
    if task == "multilabel":
        # exp of a positive number may overflow.
        small_BK = np.exp(-np.abs(scaled_BK))
        probs_BK = np.where(scaled_BK >= 0, 1.0, small_BK) / (1.0 + small_BK)
    else:
        powers_BK = np.exp(scaled_BK - scaled_BK.max(axis=1, keepdims=True))
        probs_BK = powers_BK / powers_BK.sum(axis=1, keepdims=True)
    return BatchOutput(np.where(finite_B[:, None], probs_BK, 0.0).astype(np.float32), finite_B)
