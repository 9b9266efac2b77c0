"""What a model says of a call's images, and how they get through it in batches, whatever runs the model.

Shape suffixes: N image of the call, B image of the batch, H height, W width, C channel, K class, D feature.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.model import ModelBundle
from imgbatch.errors import ImgbatchError, RowError, Stage, Status, UsageError, normalise_message, row_error

_GOOD_BEFORE_GROWTH = 64
"""Batches that get through before those that were made smaller are doubled for the first time."""


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
    """``CLASSIFY_FAILED`` or ``NON_FINITE``, at ``Stage.CLASSIFY``."""
    features_ND: npt.NDArray[np.float32] | None = None
    """What the head saw of each image, where asked for; D is 0 if no image got that far."""


@dataclass(frozen=True, slots=True)
class BatchOutput:
    """Of one batch, on the CPU."""

    probs_BK: npt.NDArray[np.float32]
    """Zeros where not finite."""
    finite_B: npt.NDArray[np.bool_]
    features_BD: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Images of a call, ``start`` to ``stop``."""

    start: int
    stop: int
    batch_size: int = 0
    """What it was when they were tried last."""
    again: bool = False
    """Whether memory was short when they were tried last."""


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
        batch_size: images per forward pass, at most; fewer while a device has not enough memory.
        features: give ``features_ND`` too, of the same forward pass.
        may_grow: whether batches that were made smaller may grow again.
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int, features: bool = False, may_grow: bool = True) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.bundle = bundle
        self.batch_size = batch_size
        self._with_features = features
        self._largest_batch = batch_size if may_grow else 0
        self._resizing = threading.Lock()
        self._num_good = 0
        """Batches that got through since their size changed."""
        self._good_before_growth = _GOOD_BEFORE_GROWTH

    def predict(self, images_NHWC: npt.NDArray[np.uint8]) -> Predictions:
        """Probabilities of every image.

        Args:
            images_NHWC: uint8, decoded and cropped as ``bundle.preprocess`` says.

        Raises:
            ValueError: not images of that shape and type.
            ImgbatchError: the device has not even memory for one of them, which are all of the same size.
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
        pending = [_Part(0, num_images)]
        outputs: list[tuple[slice, BatchOutput]] = []

        def try_again(part: _Part, error: Exception) -> None:
            """Where memory was short, as it was and then in smaller batches; else in halves, down to the single images
            at fault."""
            status = self._status_of(error)
            if status == Status.OUT_OF_MEMORY:
                if part.again and not self._shrink(part.batch_size):
                    raise self._has_no_room(error) from error
                pending.append(replace(part, again=not part.again))
            elif part.stop - part.start == 1:
                errors[part.start] = row_error(status, Stage.CLASSIFY, error)
            else:
                middle = (part.start + part.stop) // 2
                pending.extend([_Part(middle, part.stop), _Part(part.start, middle)])

        while pending:
            on_their_way: list[tuple[_Part, Any]] = []
            while pending:
                size = self.batch_size  # another thread may change it
                part = replace(pending.pop(), batch_size=size)
                if part.stop - part.start > size:
                    pending += [_Part(part.start + size, part.stop), _Part(part.start, part.start + size)]
                elif part.stop > part.start:
                    try:
                        on_their_way.append((part, self._forward(images_NHWC[part.start : part.stop])))
                    except Exception as error:
                        try_again(part, error)
            # Only now: until here the CPU may have been ahead of the device.
            for part, output in on_their_way:
                try:
                    outputs.append((slice(part.start, part.stop), self._collect(output)))
                    self._count_good()
                except Exception as error:
                    try_again(part, error)
        num_features = next((o.features_BD.shape[1] for _, o in outputs if o.features_BD is not None), 0)
        features_ND = np.zeros((num_images, num_features), dtype=np.float32) if self._with_features else None
        for rows, output in outputs:
            probs_NK[rows] = output.probs_BK
            finite_N[rows] = output.finite_B
            if features_ND is not None and output.features_BD is not None:
                features_ND[rows] = output.features_BD
        for index in np.flatnonzero(~finite_N):
            if errors[index] is None:
                message = "the model's output holds NaN or infinity"
                errors[index] = row_error(Status.NON_FINITE, Stage.CLASSIFY, message)
        return Predictions(probs_NK, finite_N, errors, features_ND)

    def _shrink(self, batch_size: int) -> bool:
        """Halve the batches, unless another thread did since one of ``batch_size`` was begun; false: they are of one
        image already."""
        with self._resizing:
            if batch_size > 1:
                self.batch_size = min(self.batch_size, batch_size // 2)
                self._num_good = 0
        return batch_size > 1

    def _count_good(self) -> None:
        """One more batch got through; after enough of them, double those that were made smaller.

        Each time after twice as many, so that a size for which there is never room costs less and less.
        """
        if self.batch_size >= self._largest_batch:
            return
        with self._resizing:
            self._num_good += 1
            if self._num_good >= self._good_before_growth:
                self.batch_size = min(2 * self.batch_size, self._largest_batch)
                self._num_good = 0
                self._good_before_growth *= 2

    def _has_no_room(self, error: Exception) -> ImgbatchError:
        side = self.bundle.preprocess.crop_size
        return ImgbatchError(
            f"{self.bundle.path}: {self._memory()} is too little for a batch of one image of {side} px "
            f"({normalise_message(error)}); end what else uses it, or choose another device (resources.device)"
        )

    def _memory(self) -> str:
        """That of the device, for a message."""
        return "this machine's memory"

    @abstractmethod
    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> Any:
        """Start the forward pass of up to ``batch_size`` images; its output may still be on its way."""

    @abstractmethod
    def _collect(self, output: Any) -> BatchOutput:
        """What :meth:`_forward` gave, waited for; an error counts as one of the forward pass."""

    def _status_of(self, error: Exception) -> Status:
        """What a forward pass that raised means for its images; raises the error again if it is not theirs.

        ``OUT_OF_MEMORY`` is no fault of theirs either: smaller batches may get through.
        """
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
