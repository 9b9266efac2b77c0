"""What follows from the confusion matrix: accuracy, balanced accuracy, precision, recall, F1 and their averages.

Everything is computed from three counts per class (right, target, predicted), so that one set of functions serves
single-label and multi-label tasks, and bootstrap replicates too: leading dimensions broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Counts per class, integers or (resampled) floats, each of shape (..., K)."""

    right: np.ndarray
    """Rows of the class that were predicted as it (true positives)."""
    target: np.ndarray
    """Rows whose target it is (support)."""
    predicted: np.ndarray
    """Rows that were predicted as it."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Precision, recall and F1 per class, float64 of shape (..., K) in [0, 1]; 0 where the denominator is 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def confusion_matrix(targets_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 (K, K): row = target, column = predicted. Both inputs hold class indices in [0, K)."""
    cells_N = targets_N.astype(np.int64) * num_classes + predicted_N
    return np.bincount(cells_N, minlength=num_classes * num_classes).reshape(num_classes, num_classes)


def counts_from_confusion(confusion_KK: np.ndarray) -> ClassCounts:
    """The three counts per class of a confusion matrix."""
    return ClassCounts(np.diagonal(confusion_KK), confusion_KK.sum(axis=1), confusion_KK.sum(axis=0))


def class_scores(counts: ClassCounts) -> ClassScores:
    """Per-class scores; a denominator of zero gives 0, as scikit-learn's ``zero_division=0``."""
    return ClassScores(
        precision=_ratio(counts.right, counts.predicted),
        recall=_ratio(counts.right, counts.target),
        f1=_ratio(2 * counts.right, counts.target + counts.predicted),
    )


def accuracy(counts: ClassCounts) -> np.ndarray:
    """Share of rows predicted right, single-label; NaN without rows."""
    return _ratio(counts.right.sum(axis=-1), counts.target.sum(axis=-1), undefined=np.nan)


def balanced_accuracy(counts: ClassCounts) -> np.ndarray:
    """Mean recall over the classes that have rows; NaN without rows."""
    return _mean_where(class_scores(counts).recall, counts.target > 0)


def averages(counts: ClassCounts, *, all_classes: bool = False) -> dict[str, dict[str, np.ndarray]]:
    """``macro``, ``micro`` and ``weighted`` averages of precision, recall and F1.

    Macro averages run over the classes that occur as a target or as a prediction (scikit-learn's default for
    single-label input); with ``all_classes`` over every class (its default for multi-label input). Weights are the
    target counts; all zero if there are none.
    """
    scores = class_scores(counts)
    occurs = np.ones(counts.target.shape, bool) if all_classes else (counts.target + counts.predicted) > 0
    total = ClassCounts(*(c.sum(axis=-1) for c in (counts.right, counts.target, counts.predicted)))
    micro = class_scores(total)
    result: dict[str, dict[str, np.ndarray]] = {"macro": {}, "micro": {}, "weighted": {}}
    for name in ("precision", "recall", "f1"):
        values = getattr(scores, name)
        result["macro"][name] = _mean_where(values, occurs)
        result["micro"][name] = getattr(micro, name)
        result["weighted"][name] = _ratio((values * counts.target).sum(axis=-1), total.target)
    return result


def confused_pairs(confusion_KK: np.ndarray, class_names: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
    """The most frequent mistakes: ``target``, ``label``, ``count`` and ``share`` of the target's rows."""
    wrong = confusion_KK.copy()
    np.fill_diagonal(wrong, 0)
    support_K = confusion_KK.sum(axis=1)
    cells = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = []
    for target, label in zip(*np.unravel_index(cells, wrong.shape), strict=True):
        count = int(wrong[target, label])
        if count:
            names = {"target": class_names[target], "label": class_names[label]}
            pairs.append({**names, "count": count, "share": count / int(support_K[target])})
    return pairs


def _ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float = 0.0) -> np.ndarray:
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, undefined), where=bottom > 0)


def _mean_where(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return _ratio(np.where(mask, values, 0.0).sum(axis=-1), mask.sum(axis=-1), undefined=np.nan)
