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
CONFIDENCE = 0.8
"""Of :func:`wilson_lower_bound`."""
_Z80_ONE_SIDED = 0.8416212335729143
EXACT_UP_TO = 1000
"""Discordant pairs up to which McNemar's test is the exact binomial one."""
_DRAWS_BUDGET = 100_000_000
_CLASS_COST = 100
"""Of a class in draws: its three counts and what is computed from them stand in memory for every replicate."""
_GROUPS_BYTES = 64 * 2**20
_LEAST_GROUPS, _MOST_GROUPS = 200, 4096
"""Of rows that are drawn together; the width of an interval is then off by 5% and by 1%."""


def wilson_interval(right: int, total: int) -> Interval:
    """95% interval of a share (Wilson, 1927): honest for few rows and for shares near 0 or 1; NaN without rows."""
    if not total:
        return float("nan"), float("nan")
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_lower_bound(right_T: np.ndarray, total_T: np.ndarray) -> np.ndarray:
    """What shares are at least, at 80% confidence (Wilson's bound, one-sided); totals are at least 1."""
    share_T, z2 = right_T / total_T, _Z80_ONE_SIDED**2
    spread_T = _Z80_ONE_SIDED * np.sqrt(share_T * (1 - share_T) / total_T + z2 / (4 * total_T**2))
    bound_T: np.ndarray = (share_T + z2 / (2 * total_T) - spread_T) / (1 + z2 / total_T)
    return bound_T


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


class RowGroups:
    """Sums over rows that come in batches, so that the rows can be drawn with replacement without being kept.

    Rows are put into groups by their hashes, and groups are drawn: at random they spread like the rows themselves, and
    what the labels of one row share stays together, so that averages over labels spread as they do.
    """

    def __init__(self, num_sums: int) -> None:
        self.num_groups = max(_LEAST_GROUPS, min(_MOST_GROUPS, _GROUPS_BYTES // (8 * num_sums)))
        self._sums_GM = np.zeros((self.num_groups, num_sums))
        self._has_rows_G = np.zeros(self.num_groups, bool)

    def add(self, lots_N: np.ndarray, values_NM: np.ndarray) -> None:
        """Add ``values_NM``, bool, of rows whose hashes are ``lots_N``, uint64."""
        group_N = lots_N % np.uint64(self.num_groups)
        order = np.argsort(group_N)
        groups, starts = np.unique(group_N[order], return_index=True)
        if groups.size:
            self._sums_GM[groups] += np.add.reduceat(values_NM[order], starts, axis=0, dtype=np.int64)
            self._has_rows_G[groups] = True

    def totals(self) -> np.ndarray:
        """Of all rows, int64 (M,)."""
        totals_M: np.ndarray = self._sums_GM.sum(axis=0).astype(np.int64)
        return totals_M

    def draw(self, num_replicates: int, rng: np.random.Generator) -> np.ndarray:
        """Sums of rows drawn with replacement, int64 (R, M); (0, M) without rows."""
        filled_GM = self._sums_GM[self._has_rows_G]
        num_filled = len(filled_GM)
        if not num_filled:
            return np.zeros((0, self._sums_GM.shape[1]), np.int64)
        weights_RG = rng.multinomial(num_filled, np.full(num_filled, 1 / num_filled), size=num_replicates)
        drawn_RM: np.ndarray = (weights_RG @ filled_GM).astype(np.int64)
        return drawn_RM


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
