"""Targets that are likely wrong: confident learning (Northcutt, Jiang and Chuang, 2021, JAIR 70).

A row is suspect if some other class's probability reaches that class's own threshold: the mean probability it gets
where it is the target. The rows that are counted off the diagonal of the paper's confident joint are exactly these.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class SelfConfidence:
    """Sums towards the thresholds of confident learning, added batch by batch."""

    prob_sum_K: np.ndarray
    count_K: np.ndarray

    @classmethod
    def empty(cls, num_classes: int) -> SelfConfidence:
        """Nothing counted yet."""
        return cls(np.zeros(num_classes), np.zeros(num_classes, np.int64))

    def add(self, probs_NK: np.ndarray, targets_N: np.ndarray) -> None:
        """Count rows in: probabilities float (N, K) and target class indices (N,)."""
        target_probs_N = np.take_along_axis(probs_NK, targets_N[:, None], axis=1)[:, 0]
        self.prob_sum_K += np.bincount(targets_N, target_probs_N, len(self.count_K))
        self.count_K += np.bincount(targets_N, minlength=len(self.count_K))

    def thresholds(self) -> np.ndarray:
        """Mean probability of each class where it is the target, float64 (K,); infinite for a class without rows."""
        return np.divide(self.prob_sum_K, self.count_K, out=np.full(self.count_K.shape, np.inf), where=self.count_K > 0)


@dataclass(frozen=True, slots=True)
class Suspects:
    """What confident learning says of rows."""

    class_N: np.ndarray
    """int64: the most probable class that reaches its threshold; the target itself if none does."""
    margin_N: np.ndarray
    """float32 in [-1, 1]: probability of the target less that of the best other class; low: likely wrong."""


def suspects(probs_NK: np.ndarray, targets_N: np.ndarray, thresholds_K: np.ndarray) -> Suspects:
    """For each row the class it confidently belongs to; a row is suspect where that is not its target."""
    column_N1 = targets_N[:, None]
    reached_NK = np.where(probs_NK >= thresholds_K, probs_NK, -1)
    best_N = np.argmax(reached_NK, axis=1)
    nothing_N = np.take_along_axis(reached_NK, best_N[:, None], axis=1)[:, 0] < 0
    others_NK = probs_NK.copy()
    np.put_along_axis(others_NK, column_N1, -np.inf, axis=1)
    target_probs_N = np.take_along_axis(probs_NK, column_N1, axis=1)[:, 0]
    return Suspects(np.where(nothing_N, targets_N, best_N), target_probs_N - others_NK.max(axis=1))
