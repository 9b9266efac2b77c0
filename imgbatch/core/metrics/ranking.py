"""What needs rows sorted by score: areas under curves and operating points of one class against the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class ThresholdCounts:
    """Counts of rows at or above each distinct score, highest score first, each of shape (T,)."""

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray

    @property
    def precision(self) -> np.ndarray:
        """Share of the rows at or above the threshold that are positive."""
        return self.true_positives / (self.true_positives + self.false_positives)

    @property
    def recall(self) -> np.ndarray:
        """Share of the positives at or above the threshold; NaN without positives."""
        positives = self.true_positives[-1] if self.true_positives.size else 0
        return self.true_positives / positives if positives else np.full(self.thresholds.shape, np.nan)


def threshold_counts(positive_N: np.ndarray, scores_N: np.ndarray) -> ThresholdCounts:
    """True and false positives at every distinct score."""
    order = np.argsort(-scores_N, kind="stable")
    last_of_ties = _last_of_ties(scores_N[order])
    hits = np.cumsum(positive_N[order], dtype=np.int64)[last_of_ties]
    return ThresholdCounts(scores_N[order][last_of_ties], hits, last_of_ties + 1 - hits)


def roc_area(counts: ThresholdCounts) -> float:
    """As :func:`roc_auc`, from counts."""
    hits, misses = counts.true_positives, counts.false_positives
    if not hits.size or not hits[-1] or not misses[-1]:
        return float("nan")
    area = np.trapezoid(np.concatenate([[0], hits]), np.concatenate([[0], misses]))
    return float(area / (float(hits[-1]) * float(misses[-1])))


def precision_area(counts: ThresholdCounts) -> float:
    """As :func:`average_precision`, from counts."""
    if not counts.true_positives.size or not counts.true_positives[-1]:
        return float("nan")
    return float(np.sum(np.diff(counts.recall, prepend=0.0) * counts.precision))


def roc_auc(positive_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Area under the ROC curve; NaN if all rows are positive or none is."""
    return roc_area(threshold_counts(positive_N, scores_N))


def average_precision(positive_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Sum of precision times the step in recall, without interpolation; NaN without positives.

    (scikit-learn returns 0 and a warning without positives; a class that cannot be measured is not a bad class.)
    """
    return precision_area(threshold_counts(positive_N, scores_N))


def bootstrap_areas(
    positive_NK: np.ndarray, scores_NK: np.ndarray, num_replicates: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Macro ROC-AUC and macro average precision of rows drawn with replacement, float64 (R,) each.

    Each class is sorted once; a replicate is a weight per row. Classes without positives or negatives are left out.
    """
    num_rows = len(scores_NK)
    # A row is drawn a dozen times at most; as bytes the weights of all replicates stay small.
    evenly_N = np.full(num_rows, 1 / max(num_rows, 1))
    weights_RN = np.stack([rng.multinomial(num_rows, evenly_N).astype(np.uint8) for _ in range(num_replicates)])
    aucs, precisions = [], []
    for positive_N, scores_N in zip(positive_NK.T, scores_NK.T, strict=True):
        order = np.argsort(-scores_N, kind="stable")
        last_of_ties = _last_of_ties(scores_N[order])
        hit_N = positive_N[order]
        areas = np.empty((num_replicates, 2))
        for replicate, weights_N in enumerate(weights_RN):
            drawn_N = weights_N[order]
            hits = np.cumsum(drawn_N * hit_N, dtype=np.int64)[last_of_ties]
            misses = np.cumsum(drawn_N, dtype=np.int64)[last_of_ties] - hits
            seen = hits + misses > 0
            counts = ThresholdCounts(last_of_ties[seen], hits[seen], misses[seen])
            areas[replicate] = roc_area(counts), precision_area(counts)
        aucs.append(areas[:, 0])
        precisions.append(areas[:, 1])
    return nan_mean(np.array(aucs)), nan_mean(np.array(precisions))


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """What one threshold on the score of a class does; predicted positive means score >= threshold."""

    threshold: float
    precision: float
    recall: float
    f1: float


def best_f1_point(counts: ThresholdCounts) -> OperatingPoint | None:
    """The threshold with the highest F1 (the highest such threshold); none without positives."""
    if not counts.true_positives.size or not counts.true_positives[-1]:
        return None
    selected = counts.true_positives + counts.false_positives
    f1 = 2 * counts.true_positives / (selected + counts.true_positives[-1])
    return _point(counts, int(np.argmax(f1)))


def precision_point(counts: ThresholdCounts, target_precision: float) -> OperatingPoint | None:
    """The lowest threshold whose precision is at least ``target_precision``; none if no threshold reaches it."""
    if not counts.true_positives.size or not counts.true_positives[-1]:
        return None
    reached = np.flatnonzero(counts.precision >= target_precision)
    return _point(counts, int(reached[-1])) if reached.size else None


def nan_mean(values_KR: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values_KR)
    count = defined.sum(axis=0)
    total = np.where(defined, values_KR, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def thin_out(num_points: int, limit: int) -> np.ndarray:
    """At most ``limit`` indices spread evenly over a curve of ``num_points``, both ends included."""
    return np.unique(np.linspace(0, max(num_points - 1, 0), min(num_points, limit)).round().astype(np.int64))


def _last_of_ties(sorted_scores_N: np.ndarray) -> np.ndarray:
    changes = np.flatnonzero(np.diff(sorted_scores_N))
    return np.append(changes, len(sorted_scores_N) - 1) if len(sorted_scores_N) else changes


def _point(counts: ThresholdCounts, at: int) -> OperatingPoint:
    hits, misses = int(counts.true_positives[at]), int(counts.false_positives[at])
    positives = int(counts.true_positives[-1])
    return OperatingPoint(
        threshold=float(counts.thresholds[at]),
        precision=hits / (hits + misses),
        recall=hits / positives,
        f1=2 * hits / (hits + misses + positives),
    )
