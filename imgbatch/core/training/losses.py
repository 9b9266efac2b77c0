"""Losses of logits against truth that may be a mixture.

Legend of shape suffixes: B image of the batch, K class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from imgbatch.core.description import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_BK, truth_BK), both float32 -> loss_B, nats."""


def build_loss(task: Task, *, label_smoothing: float = 0.0, class_weights_K: Tensor | None = None) -> Loss:
    """The loss of each image.

    multiclass, binary: cross-entropy of the softmax; for two classes that is the binary cross-entropy of the
    difference of the logits. multilabel: the mean over the classes of the binary cross-entropies.

    Args:
        label_smoothing: share of the truth that is spread evenly, 0 to 1 (Szegedy et al., 2016).
        class_weights_K: see :func:`class_weights`.
    """

    def cross_entropy(logits_BK: Tensor, truth_BK: Tensor) -> Tensor:
        smooth_BK = truth_BK * (1 - label_smoothing) + label_smoothing / truth_BK.shape[1]
        if class_weights_K is not None:
            smooth_BK = smooth_BK * class_weights_K.to(smooth_BK)
        return -(smooth_BK * logits_BK.log_softmax(dim=1)).sum(dim=1)

    def binary_cross_entropies(logits_BK: Tensor, truth_BK: Tensor) -> Tensor:
        smooth_BK = truth_BK * (1 - label_smoothing) + label_smoothing / 2
        loss_BK = functional.binary_cross_entropy_with_logits(
            logits_BK,
            smooth_BK,
            reduction="none",
            pos_weight=None if class_weights_K is None else class_weights_K.to(logits_BK),
        )
        return loss_BK.mean(dim=1)

    return binary_cross_entropies if task == "multilabel" else cross_entropy


def class_weights(counts_K: np.ndarray, num_images: int, task: Task) -> Tensor:
    """Weights that make every class count the same, float32.

    Single-label: inverse to the class's images, 1 on average over the images. Multilabel: of a class's positives,
    such that they weigh as much as its negatives.
    """
    counts = np.maximum(counts_K.astype(np.float64), 1)
    weights_K = (num_images - counts) / counts if task == "multilabel" else num_images / (len(counts) * counts)
    return torch.from_numpy(np.clip(weights_K, 1e-3, 1e3).astype(np.float32))
