"""Whether confidence means what it says: reliability bins, expected calibration error, risk at each coverage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

NUM_BINS = 15
"""Equal-width bins of confidence, as in Guo et al. 2017 (On Calibration of Modern Neural Networks)."""


@dataclass(slots=True)
class ReliabilityBins:
    """Sums per bin of confidence; bin b holds confidences in (b/B, (b+1)/B], the first one 0 as well."""

    count_B: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    confidence_sum_B: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS))
    right_sum_B: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS))

    def add(self, confidence_N: np.ndarray, right_N: np.ndarray) -> None:
        """Count rows in: confidence in [0, 1], and whether the prediction was right."""
        inner_edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
        bins_N = np.searchsorted(inner_edges, confidence_N)
        self.count_B += np.bincount(bins_N, minlength=NUM_BINS)
        self.confidence_sum_B += np.bincount(bins_N, weights=confidence_N, minlength=NUM_BINS)
        self.right_sum_B += np.bincount(bins_N, weights=right_N, minlength=NUM_BINS)

    def expected_calibration_error(self) -> float:
        """Mean over rows of |accuracy - confidence| of the row's bin, in [0, 1]; NaN without rows."""
        total = self.count_B.sum()
        return float(np.abs(self.right_sum_B - self.confidence_sum_B).sum() / total) if total else float("nan")

    def rows(self) -> list[dict[str, float | int | None]]:
        """One mapping per bin for a reliability diagram: ``low``, ``high``, ``count``, ``confidence``, ``accuracy``."""
        return [
            {
                "low": b / NUM_BINS,
                "high": (b + 1) / NUM_BINS,
                "count": int(count),
                "confidence": self.confidence_sum_B[b] / count if count else None,
                "accuracy": self.right_sum_B[b] / count if count else None,
            }
            for b, count in enumerate(self.count_B)
        ]


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Accepting only rows with confidence >= threshold: share accepted and share of those that are wrong.

    Arrays of shape (T,), one entry per distinct confidence, highest first.
    """

    threshold: np.ndarray
    coverage: np.ndarray
    risk: np.ndarray
    area: float
    """Mean over rows of the risk at the row's own confidence (AURC, Geifman et al. 2019); NaN without rows."""


def risk_coverage(confidence_N: np.ndarray, right_N: np.ndarray) -> RiskCoverage:
    """The whole curve; rows of equal confidence are accepted together."""
    num_rows = len(confidence_N)
    if not num_rows:
        empty = np.empty(0)
        return RiskCoverage(empty, empty, empty, float("nan"))
    order = np.argsort(confidence_N, kind="stable")[::-1]
    descending = confidence_N[order]
    last_of_ties = np.append(np.flatnonzero(np.diff(descending)), num_rows - 1)
    accepted = last_of_ties + 1
    risk = np.cumsum(~right_N[order])[last_of_ties] / accepted
    area = float((risk * np.diff(accepted, prepend=0)).sum() / num_rows)
    return RiskCoverage(descending[last_of_ties], accepted / num_rows, risk, area)
