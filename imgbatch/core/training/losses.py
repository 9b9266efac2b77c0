"""Losses of logits against truth that may be a mixture.

Legend of shape suffixes: B image of the batch, K class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from imgbatch.core.description import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_BK, truth_BK), both float32 -> loss_B."""

LossKind = Literal["cross_entropy", "focal", "hinge"]

_FOCUS = 2.0
"""gamma of the focal loss: the best of those that Lin et al. (2017) tried."""


def build_loss(
    task: Task,
    *,
    kind: LossKind = "cross_entropy",
    label_smoothing: float = 0.0,
    class_weights_K: Tensor | None = None,
) -> Loss:
    """The loss of each image; where its truth is a mixture of classes, the same mixture of their losses.

    multiclass, binary: of the class, among all; for two classes the cross-entropy is the binary one of the difference
    of the logits. multilabel: of each class against its absence, the mean over the classes.

    Args:
        kind: ``cross_entropy``, in nats; ``focal``: that times ``(1 - p) ** 2``, where p is the probability of the
            truth; ``hinge``: how much the logit of the truth lacks to be 1 above every other (Crammer and Singer,
            2001), multilabel: to be 1 beyond 0.
        label_smoothing: share of the truth that is spread evenly, 0 to 1 (Szegedy et al., 2016).
        class_weights_K: see :func:`class_weights`.
    """

    def of_classes(logits_BK: Tensor, truth_BK: Tensor) -> Tensor:
        smooth_BK = truth_BK * (1 - label_smoothing) + label_smoothing / truth_BK.shape[1]
        if class_weights_K is not None:
            smooth_BK = smooth_BK * class_weights_K.to(smooth_BK)
        return (smooth_BK * _AMONG_CLASSES[kind](logits_BK)).sum(dim=1)

    def of_labels(logits_BK: Tensor, truth_BK: Tensor) -> Tensor:
        smooth_BK = truth_BK * (1 - label_smoothing) + label_smoothing / 2
        present_BK = smooth_BK if class_weights_K is None else smooth_BK * class_weights_K.to(smooth_BK)
        against_absence = _AGAINST_ABSENCE[kind]
        losses_BK = present_BK * against_absence(logits_BK) + (1 - smooth_BK) * against_absence(-logits_BK)
        return losses_BK.mean(dim=1)

    return of_labels if task == "multilabel" else of_classes


def class_weights(counts_K: np.ndarray, num_images: int, task: Task) -> Tensor:
    """Weights that make every class count the same, float32.

    Single-label: inverse to the class's images, 1 on average over the images. Multilabel: of a class's positives,
    such that they weigh as much as its negatives.
    """
    counts = np.maximum(counts_K.astype(np.float64), 1)
    weights_K = (num_images - counts) / counts if task == "multilabel" else num_images / (len(counts) * counts)
    return torch.from_numpy(np.clip(weights_K, 1e-3, 1e3).astype(np.float32))


def _focal(log_probs_BK: Tensor) -> Tensor:
    return -((1 - log_probs_BK.exp()) ** _FOCUS) * log_probs_BK


def _margins(logits_BK: Tensor) -> Tensor:
    """If the truth were k: what its logit lacks to be 1 above the highest other, [B, K]."""
    highest_B2, place_B2 = logits_BK.topk(2, dim=1)
    others_BK = highest_B2[:, :1].expand_as(logits_BK).scatter(1, place_B2[:, :1], highest_B2[:, 1:])
    return functional.relu(1 + others_BK - logits_BK)


_AMONG_CLASSES: dict[LossKind, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda logits_BK: -logits_BK.log_softmax(dim=1),
    "focal": lambda logits_BK: _focal(logits_BK.log_softmax(dim=1)),
    "hinge": _margins,
}
"""logits_BK -> the loss if the truth were class k, [B, K]."""

_AGAINST_ABSENCE: dict[LossKind, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda logits_BK: -functional.logsigmoid(logits_BK),
    "focal": lambda logits_BK: _focal(functional.logsigmoid(logits_BK)),
    "hinge": lambda logits_BK: functional.relu(1 - logits_BK),
}
"""logits_BK -> the loss if label k were there, [B, K]."""
