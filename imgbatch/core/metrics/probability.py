"""Sums over rows of what needs every class's probability; the means are taken at the end, so batches add up."""

from __future__ import annotations

import numpy as np

EPSILON = float(np.finfo(np.float32).eps)
"""Probabilities are stored as float32 and clipped to [EPSILON, 1 - EPSILON] before the logarithm (1.19e-7), as
``sklearn.metrics.log_loss`` does with float32 input: one confident mistake does not make the mean infinite."""


def log_loss_sum(probs_NK: np.ndarray, targets_N: np.ndarray) -> float:
    """Sum over rows of -log p(target), nats."""
    target_probs_N = np.take_along_axis(probs_NK, targets_N[:, None], axis=1)[:, 0].astype(np.float64)
    return float(-np.log(_clipped(target_probs_N)).sum())


def brier_sum(probs_NK: np.ndarray, targets_N: np.ndarray) -> float:
    """Sum over rows of the squared distance to the one-hot target, in [0, 2] a row.

    For two classes half of it is the usual binary score in [0, 1] (Brier, 1950; scikit-learn halves it likewise).
    """
    target_probs_N = np.take_along_axis(probs_NK, targets_N[:, None], axis=1)[:, 0].astype(np.float64)
    squares_N = np.einsum("nk,nk->n", probs_NK, probs_NK, dtype=np.float64)
    return float((squares_N - 2 * target_probs_N + 1).sum())


def top_k_hits(probs_NK: np.ndarray, targets_N: np.ndarray, k: int) -> np.ndarray:
    """Whether the target is among the ``k`` most probable classes, bool (N,).

    Among equal probabilities the class with the higher index counts as the more probable one, as in
    ``sklearn.metrics.top_k_accuracy_score``.
    """
    target_probs_N1 = np.take_along_axis(probs_NK, targets_N[:, None], axis=1)
    above_N = (probs_NK > target_probs_N1).sum(axis=1)
    after_NK = np.arange(probs_NK.shape[1]) > targets_N[:, None]
    tied_N = ((probs_NK == target_probs_N1) & after_NK).sum(axis=1)
    return above_N + tied_N < k


def binary_log_loss_sum(probs_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """Multi-label: per label the sum over rows of the binary cross-entropy, nats, float64 (K,)."""
    probs = _clipped(probs_NK.astype(np.float64))
    return -(np.where(truth_NK, np.log(probs), np.log1p(-probs))).sum(axis=0)


def binary_brier_sum(probs_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """Multi-label: per label the sum over rows of the squared error, float64 (K,)."""
    return np.square(probs_NK.astype(np.float64) - truth_NK).sum(axis=0)


def _clipped(probs: np.ndarray) -> np.ndarray:
    return np.clip(probs, EPSILON, 1 - EPSILON)
