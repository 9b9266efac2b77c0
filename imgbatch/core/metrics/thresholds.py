"""From which probability on a label applies, or needs no review: for the best F1, a precision, or a review budget.

Legend of the shape suffixes: ``N`` rows, ``K`` classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from imgbatch.core.metrics.intervals import Interval, wilson_interval, wilson_lower_bound
from imgbatch.core.metrics.ranking import best_f1_point, threshold_counts


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
    """A threshold of about the highest F1; none without positives.

    Of those that are at most one mistake worse than the very best it is 0.5, or the one nearest to that: the best
    threshold of a small split, or of a label that nearly every row has, hangs on single rows and need not suit others.
    """
    counts = threshold_counts(positive_N, probs_N)
    best = best_f1_point(counts)
    if best is None:
        return None
    hits, positives = counts.true_positives, counts.true_positives[-1]
    mistakes = counts.false_positives + positives - hits
    at = int(np.flatnonzero(counts.thresholds == best.threshold)[0])
    least_f1 = 2 * (hits[at] - 1) / (2 * (hits[at] - 1) + mistakes[at] + 1)
    good = 2 * hits / (2 * hits + mistakes) >= least_f1
    # All thresholds above the next lower probability accept the same rows.
    lower = np.append(counts.thresholds[1:], 0.0)
    if (good & (lower < 0.5) & (counts.thresholds >= 0.5)).any():
        return 0.5
    halfway = (counts.thresholds[good].astype(np.float64) + lower[good]) / 2
    return float(halfway[np.argmin(np.abs(halfway - 0.5))])


def for_precision(confidence_N: np.ndarray, right_N: np.ndarray, target_precision: float) -> float | None:
    """The lowest threshold at which, at 80% confidence, at least ``target_precision`` are right; none if none shows it.

    The rows that it is chosen on have the precision more often than new ones: of all thresholds at which they do, the
    lowest is a lucky one. So it is what the precision is at least that has to reach the target (Wilson's bound,
    one-sided), which for 0.95 takes 14 accepted rows if all are right, and for 1 cannot be.
    """
    counts = threshold_counts(right_N, confidence_N)
    least_T = wilson_lower_bound(counts.true_positives, counts.true_positives + counts.false_positives)
    reached = np.flatnonzero(least_T >= target_precision)
    return float(counts.thresholds[reached[-1]]) if reached.size else None


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
