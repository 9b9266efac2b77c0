"""How sure a figure is: bootstrap over counts, Wilson's interval of a share, McNemar's test of a difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from imgbatch.core.metrics.confusion import Cells, ClassCounts, counts_from_cells

Interval = tuple[float, float]
"""Lower and upper end of a 95% interval."""

_Z95 = 1.959963984540054
EXACT_UP_TO = 1000
"""Discordant pairs up to which McNemar's test is the exact binomial one."""
_DRAWS_BUDGET = 100_000_000
_CLASS_COST = 100
"""Of a class in draws: its three counts and what is computed from them stand in memory for every replicate."""


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


def affordable_replicates(num_cells: int, num_classes: int, wanted: int = 1000, least: int = 100) -> int:
    """How many bootstrap replicates to draw so that a large, full matrix still takes seconds and little memory."""
    return int(np.clip(_DRAWS_BUDGET // max(num_cells, _CLASS_COST * num_classes, 1), least, wanted))


def bootstrap_cells(counts_M: np.ndarray, num_replicates: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Counts (M,) of datasets drawn with replacement from rows that fall into M kinds, one array per replicate.

    Drawing cells from a multinomial is the same as drawing rows, at a cost that does not grow with their number.
    """
    total = int(counts_M.sum())
    for _ in range(num_replicates if total else 0):
        yield rng.multinomial(total, counts_M / total)


def bootstrap_confusion(cells: Cells, num_replicates: int, rng: np.random.Generator) -> ClassCounts:
    """Counts per class, int64 (R, K), of confusion matrices drawn by :func:`bootstrap_cells`."""
    drawn = bootstrap_cells(cells.count_M, num_replicates, rng)
    replicates = [counts_from_cells(cells.target_M, cells.predicted_M, each_M, cells.num_classes) for each_M in drawn]
    return stack_counts(replicates, cells.num_classes)


def stack_counts(replicates: Sequence[ClassCounts], num_classes: int) -> ClassCounts:
    """Replicates of (K,) as one, int64 (R, K)."""
    parts = ([getattr(each, name) for each in replicates] for name in ("right", "target", "predicted"))
    return ClassCounts(*(np.array(part, np.int64).reshape(-1, num_classes) for part in parts))


def bootstrap_labels(counts: ClassCounts, num_rows: int, num_replicates: int, rng: np.random.Generator) -> ClassCounts:
    """Multi-label: counts (R, K) drawn label by label from each label's four outcomes.

    Labels are drawn independently of each other, so intervals of averages over labels leave their correlation out.
    """
    if not num_rows:
        return stack_counts([], len(counts.target))
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
