"""Rank metrics from a stated subsample: areas under curves need sorted rows, and all of them need not be sorted.

Legend of the shape suffixes: ``N`` rows, ``K`` classes.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from imgbatch.core.metrics import intervals, ranking

MAX_ROWS = 200_000
MAX_BYTES = 128 * 2**20
"""Bytes of probabilities that a sample may hold: 33,554 rows with 1,000 classes."""
MAX_CURVE_CLASSES = 100
_CURVE_POINTS = 50
_BOOTSTRAP_REPLICATES = 100
_BOOTSTRAP_LEAST_REPLICATES = 40
"""Of fewer, none is beyond the 2.5th percentile."""
_BOOTSTRAP_VALUES = 200_000_000
"""Probabilities that all replicates together may hold: some seconds."""
_LOTS = 2.0**64


class RankSample:
    """Rows drawn by the hash of their image_id, so that the same images are drawn in whatever order rows come.

    Where all rows fit, the sample is all of them and the metrics are exact.
    """

    def __init__(self, num_rows: int, num_classes: int, *, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self._wanted = min(MAX_ROWS, MAX_BYTES // (4 * num_classes))
        self._probs = [np.zeros((0, num_classes), np.float32)]
        self._truth = [np.zeros((0, num_classes), bool)]

    def add(self, lots_N: np.ndarray, probs_NK: np.ndarray, truth_NK: np.ndarray) -> None:
        """Keep the rows that are drawn: ``lots_N`` are uint64 hashes, ``truth_NK`` bool."""
        drawn_N = self._drawn(lots_N)
        self._probs.append(probs_NK[drawn_N])
        self._truth.append(truth_NK[drawn_N])

    def add_single_label(self, lots_N: np.ndarray, probs_NK: np.ndarray, targets_N: np.ndarray) -> None:
        """As :meth:`add`, with one target index per row."""
        drawn_N = self._drawn(lots_N)
        self._probs.append(probs_NK[drawn_N])
        self._truth.append(targets_N[drawn_N, None] == np.arange(probs_NK.shape[1]))

    def _drawn(self, lots_N: np.ndarray) -> np.ndarray:
        if self.num_rows <= self._wanted:
            return np.arange(len(lots_N))
        return np.flatnonzero(lots_N < self._wanted / self.num_rows * _LOTS)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities float32 (N, K) and truth bool (N, K) of the rows drawn."""
        return np.concatenate(self._probs), np.concatenate(self._truth)


def rank_metrics(
    sample: RankSample, per_class: list[dict[str, Any]], *, binary: bool, target_precision: float | None = None
) -> dict[str, Any]:
    """Areas under the ROC and the precision/recall curve, one class against the rest.

    Adds ``roc_auc``, ``average_precision`` and ``pr_curve`` to each mapping of ``per_class``, and with
    ``target_precision`` the operating points ``best_f1`` and ``at_precision``.

    Returns:
        ``roc_auc`` and ``average_precision`` (of the second class for a binary task, else the means over the classes
        that are defined), ``mean_average_precision``, their intervals, and what the sample was. Where intervals would
        take too long, they are the reason alone, ``unavailable``.
    """
    probs_NK, truth_NK = sample.rows()
    for entry, positive_N, scores_N in zip(per_class, truth_NK.T, probs_NK.T, strict=True):
        counts = ranking.threshold_counts(positive_N, scores_N)
        entry["roc_auc"] = ranking.roc_area(counts)
        entry["average_precision"] = ranking.precision_area(counts)
        if target_precision is not None:
            points = ranking.best_f1_point(counts), ranking.precision_point(counts, target_precision)
            entry["best_f1"], entry["at_precision"] = (asdict(point) if point else None for point in points)
        if len(per_class) <= MAX_CURVE_CLASSES:
            entry["pr_curve"] = _curve(counts)
    aucs = np.array([entry["roc_auc"] for entry in per_class])
    precisions = np.array([entry["average_precision"] for entry in per_class])
    measured = slice(1, 2) if binary else slice(None)
    return {
        "roc_auc": ranking.nan_mean(aucs[measured]),
        "average_precision": ranking.nan_mean(precisions[measured]),
        "mean_average_precision": ranking.nan_mean(precisions),
        "classes_measured": int((~np.isnan(precisions)).sum()),
        "sample": {"rows": len(probs_NK), "of": sample.num_rows, "seed": sample.seed},
        "intervals": _intervals(truth_NK[:, measured], probs_NK[:, measured], sample.seed),
    }


def _curve(counts: ranking.ThresholdCounts) -> dict[str, list[float]]:
    # Evenly over the thresholds, and over the recall: a rare class goes through all of it in the first few thresholds.
    over_recall = np.searchsorted(counts.recall, np.linspace(0, 1, _CURVE_POINTS // 2))
    at = np.union1d(ranking.thin_out(len(counts.thresholds), _CURVE_POINTS // 2), over_recall)
    at = at[at < len(counts.thresholds)]
    names = ("thresholds", "precision", "recall")
    return {name: getattr(counts, name)[at].astype(float).tolist() for name in names}


def _intervals(truth_NK: np.ndarray, probs_NK: np.ndarray, seed: int) -> dict[str, Any]:
    num_rows, num_classes = probs_NK.shape
    num_replicates = min(_BOOTSTRAP_REPLICATES, _BOOTSTRAP_VALUES // max(probs_NK.size, 1))
    if num_replicates < _BOOTSTRAP_LEAST_REPLICATES:
        return {"unavailable": f"{num_rows:,} rows of {num_classes:,} classes are too many to draw again and again"}
    # Always as many rows as the estimate is of: fewer would spread wider, and the precision of a class depends on them.
    aucs, precisions = ranking.bootstrap_areas(truth_NK, probs_NK, num_replicates, np.random.default_rng(seed))
    return {
        "roc_auc": intervals.percentile_interval(aucs),
        "average_precision": intervals.percentile_interval(precisions),
        "rows": num_rows,
        "replicates": num_replicates,
    }
