"""From which probability on a label applies, or needs no review: for the best F1, a precision, or a review budget.

Legend of the shape suffixes: ``N`` rows, ``K`` classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from imgbatch.core.metrics.intervals import Interval, wilson_interval
from imgbatch.core.metrics.ranking import best_f1_point, precision_point, threshold_counts


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a threshold does to the rows of one label, on the rows it was chosen on."""

    threshold: float | None
    """A row is accepted from this probability on; none: never, every row of the label is reviewed."""
    rows: int
    accepted: int
    right: int
    """Of the accepted rows."""
    precision: float | None
    """Share of the accepted rows that are right; none without any."""
    interval: Interval | None
    """95% of the precision (Wilson)."""


def for_f1(probs_N: np.ndarray, positive_N: np.ndarray) -> float | None:
    """A threshold of the highest F1, half-way to the next lower probability (or to 0); none without positives."""
    counts = threshold_counts(positive_N, probs_N)
    point = best_f1_point(counts)
    if point is None:
        return None
    lower = counts.thresholds[counts.thresholds < point.threshold]
    return (point.threshold + (float(lower[0]) if lower.size else 0.0)) / 2


def for_precision(confidence_N: np.ndarray, right_N: np.ndarray, target_precision: float) -> float | None:
    """The lowest threshold at which at least ``target_precision`` of the accepted rows are right; none if none does."""
    point = precision_point(threshold_counts(right_N, confidence_N), target_precision)
    return point.threshold if point else None


def for_review_budget(confidence_N: np.ndarray, budget: float) -> float:
    """The lowest threshold that leaves at most ``budget`` of the rows, the least certain ones, for review.

    One threshold for all classes: with calibrated probabilities the least certain rows are those likeliest wrong, so
    no other choice finds more mistakes for the same effort.
    """
    allowed = math.floor(budget * len(confidence_N) + 1e-9)
    if allowed >= len(confidence_N):
        return 1.0
    return float(np.partition(confidence_N, allowed)[allowed])


def describe_acceptance(confidence_N: np.ndarray, right_N: np.ndarray, threshold: float | None) -> Acceptance:
    """Counts and precision of the rows from ``threshold`` on."""
    accepted_N = confidence_N >= (np.inf if threshold is None else threshold)
    accepted, right = int(accepted_N.sum()), int(right_N[accepted_N].sum())
    if not accepted:
        return Acceptance(threshold, len(confidence_N), 0, 0, None, None)
    interval = wilson_interval(right, accepted)
    return Acceptance(threshold, len(confidence_N), accepted, right, right / accepted, interval)
