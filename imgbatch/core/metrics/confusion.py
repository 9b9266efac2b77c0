"""What follows from the confusion matrix: accuracy, balanced accuracy, precision, recall, F1 and their averages.

Everything is computed from three counts per class (right, target, predicted), so that one set of functions serves
single-label and multi-label tasks, and bootstrap replicates too: leading dimensions broadcast. Of the confusion matrix
itself only the cells that are not empty are held: with 10,000 classes the whole of it would take 800 MB.

Legend of the shape suffixes: ``K`` classes, ``M`` cells that are not empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SCORES = ("precision", "recall", "f1")


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
class Cells:
    """A confusion matrix by its cells that are not empty, ordered by target, then by prediction."""

    target_M: np.ndarray
    """Class index."""
    predicted_M: np.ndarray
    """Class index."""
    count_M: np.ndarray
    """int64, at least 1."""
    num_classes: int

    def counts(self) -> ClassCounts:
        """The three counts per class, int64 (K,)."""
        return counts_from_cells(self.target_M, self.predicted_M, self.count_M, self.num_classes)

    def matrix(self) -> np.ndarray:
        """The whole matrix, int64 (K, K): row = target, column = predicted."""
        confusion_KK = np.zeros((self.num_classes, self.num_classes), np.int64)
        confusion_KK[self.target_M, self.predicted_M] = self.count_M
        return confusion_KK


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Precision, recall and F1 per class, float64 of shape (..., K) in [0, 1]; 0 where the denominator is 0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def counts_from_cells(
    target_M: np.ndarray, predicted_M: np.ndarray, count_M: np.ndarray, num_classes: int
) -> ClassCounts:
    """The three counts per class, int64 (K,), of ``count_M`` rows of each pair (target, predicted)."""

    def per_class(classes_M: np.ndarray, weights_M: np.ndarray) -> np.ndarray:
        return np.bincount(classes_M, weights_M, num_classes).astype(np.int64)

    on = target_M == predicted_M
    return ClassCounts(
        right=per_class(target_M[on], count_M[on]),
        target=per_class(target_M, count_M),
        predicted=per_class(predicted_M, count_M),
    )


def class_scores(counts: ClassCounts) -> ClassScores:
    """Per-class scores; a denominator of zero gives 0, as scikit-learn's ``zero_division=0``."""
    below = _denominators(counts)
    return ClassScores(
        precision=_ratio(counts.right, below["precision"]),
        recall=_ratio(counts.right, below["recall"]),
        f1=_ratio(2 * counts.right, below["f1"]),
    )


def accuracy(counts: ClassCounts) -> np.ndarray:
    """Share of rows predicted right, single-label; NaN without rows."""
    return _ratio(counts.right.sum(axis=-1), counts.target.sum(axis=-1), undefined=np.nan)


def balanced_accuracy(counts: ClassCounts) -> np.ndarray:
    """Mean recall over the classes that have rows; NaN without rows."""
    return _mean_where(class_scores(counts).recall, counts.target > 0)


def averages(
    counts: ClassCounts, *, all_classes: bool = False, drawn_from: ClassCounts | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """``macro``, ``micro`` and ``weighted`` averages of precision, recall and F1.

    Macro averages run over the classes that occur as a target or as a prediction (scikit-learn's default for
    single-label input); with ``all_classes`` over every class (its default for multi-label input). Weights are the
    target counts; all zero if there are none.

    Args:
        drawn_from: the counts that ``counts`` are replicates of. What a replicate happens to hold no row of has no
            score there rather than a score of 0, and stays out of its macro average.
    """
    scores = class_scores(counts)
    occurs = np.ones(counts.target.shape, bool) if all_classes else (counts.target + counts.predicted) > 0
    total = ClassCounts(*(c.sum(axis=-1) for c in (counts.right, counts.target, counts.predicted)))
    micro = class_scores(total)
    result: dict[str, dict[str, np.ndarray]] = {"macro": {}, "micro": {}, "weighted": {}}
    below = _denominators(counts)
    for name in SCORES:
        values, measured = getattr(scores, name), occurs
        if drawn_from is not None:
            measured = occurs & ((below[name] > 0) | (_denominators(drawn_from)[name] == 0))
        result["macro"][name] = _mean_where(values, measured)
        result["micro"][name] = getattr(micro, name)
        result["weighted"][name] = _ratio((values * counts.target).sum(axis=-1), total.target)
    return result


def confused_pairs(cells: Cells, class_names: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
    """The most frequent mistakes: ``target``, ``label``, ``count`` and ``share`` of the target's rows."""
    support_K = cells.counts().target
    wrong = np.flatnonzero(cells.target_M != cells.predicted_M)
    first = wrong[np.argsort(-cells.count_M[wrong], kind="stable")[:limit]]
    pairs = []
    for target, label, count in zip(cells.target_M[first], cells.predicted_M[first], cells.count_M[first], strict=True):
        names = {"target": class_names[target], "label": class_names[label]}
        pairs.append({**names, "count": int(count), "share": int(count) / int(support_K[target])})
    return pairs


def _denominators(counts: ClassCounts) -> dict[str, np.ndarray]:
    """What each score divides by."""
    return {"precision": counts.predicted, "recall": counts.target, "f1": counts.target + counts.predicted}


def _ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float = 0.0) -> np.ndarray:
    top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(top, bottom, out=np.full(np.broadcast(top, bottom).shape, undefined), where=bottom > 0)


def _mean_where(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return _ratio(np.where(mask, values, 0.0).sum(axis=-1), mask.sum(axis=-1), undefined=np.nan)
