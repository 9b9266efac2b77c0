"""How sure a figure is: bootstrap over counts, Wilson's interval of a share, McNemar's test of a difference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from imgbatch.core.metrics.confusion import ClassCounts

Interval = tuple[float, float]
"""Lower and upper end of a 95% interval."""

_Z95 = 1.959963984540054
EXACT_UP_TO = 1000
"""Discordant pairs up to which McNemar's test is the exact binomial one."""
_DRAWS_BUDGET = 100_000_000


def wilson_interval(right: int, total: int) -> Interval:
    """95% interval of a share (Wilson, 1927): honest for few rows and for shares near 0 or 1; NaN without rows."""
    if not total:
        return float("nan"), float("nan")
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def percentile_interval(replicates_R: np.ndarray) -> Interval:
    """The 2.5th and 97.5th percentile of bootstrap replicates that are defined; NaN if none is."""
    defined = replicates_R[~np.isnan(replicates_R)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def affordable_replicates(num_cells: int, wanted: int = 1000, least: int = 100) -> int:
    """How many bootstrap replicates to draw so that a large, full matrix still takes seconds."""
    return int(np.clip(_DRAWS_BUDGET // max(num_cells, 1), least, wanted))


def bootstrap_cells(counts_M: np.ndarray, num_replicates: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts (M,) of datasets drawn with replacement from rows that fall into M kinds, one array per replicate.

    Drawing cells from a multinomial is the same as drawing rows, at a cost that does not grow with their number.
    """
    total = int(counts_M.sum())
    for _ in range(num_replicates if total else 0):
        yield rng.multinomial(total, counts_M / total)


def bootstrap_confusion(confusion_KK: np.ndarray, num_replicates: int, rng: np.random.Generator) -> ClassCounts:
    """Counts per class, int64 (R, K), of confusion matrices drawn by :func:`bootstrap_cells`."""
    target_M, predicted_M = np.nonzero(confusion_KK)
    cells = bootstrap_cells(confusion_KK[target_M, predicted_M], num_replicates, rng)
    return stack_counts([counts_from_cells(target_M, predicted_M, drawn_M, len(confusion_KK)) for drawn_M in cells])


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


def stack_counts(replicates: list[ClassCounts]) -> ClassCounts:
    """Replicates of (K,) as one (R, K); (0, 0) if there is none."""
    if not replicates:
        return ClassCounts(*(np.zeros((0, 0), np.int64) for _ in range(3)))
    return ClassCounts(*(np.stack([getattr(r, name) for r in replicates]) for name in ("right", "target", "predicted")))


def bootstrap_labels(counts: ClassCounts, num_rows: int, num_replicates: int, rng: np.random.Generator) -> ClassCounts:
    """Multi-label: counts (R, K) drawn label by label from each label's four outcomes.

    Labels are drawn independently of each other, so intervals of averages over labels leave their correlation out.
    """
    if not num_rows:
        return stack_counts([])
    missed_K, false_K = counts.target - counts.right, counts.predicted - counts.right
    outcomes_K4 = np.stack([counts.right, missed_K, false_K, num_rows - counts.right - missed_K - false_K], axis=-1)
    drawn_RK4 = rng.multinomial(num_rows, outcomes_K4 / num_rows, size=(num_replicates, len(outcomes_K4)))
    right_RK = drawn_RK4[..., 0]
    return ClassCounts(right_RK, right_RK + drawn_RK4[..., 1], right_RK + drawn_RK4[..., 2])


@dataclass(frozen=True, slots=True)
class McNemar:
    """Whether two models that disagree on rows do so evenly (McNemar, 1947)."""

    only_a: int
    """Rows that only the first got right."""
    only_b: int
    p_value: float
    method: str
    """``exact binomial`` or ``chi-squared with continuity correction``."""


def mcnemar_test(only_a: int, only_b: int) -> McNemar:
    """Two-sided test on the discordant pairs; p = 1 without any. Exact up to :data:`EXACT_UP_TO` of them."""
    discordant = only_a + only_b
    if discordant <= EXACT_UP_TO:
        tail = sum(math.comb(discordant, i) for i in range(min(only_a, only_b) + 1))
        # Integers of a thousand bits: their quotient is exact where powers of a half would underflow.
        return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**discordant), "exact binomial")
    statistic = (abs(only_a - only_b) - 1) ** 2 / discordant if only_a != only_b else 0.0
    p_value = math.erfc(math.sqrt(statistic / 2))
    return McNemar(only_a, only_b, p_value, "chi-squared with continuity correction")
