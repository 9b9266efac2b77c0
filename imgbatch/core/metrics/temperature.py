"""Temperature scaling from stored probabilities (Guo et al., 2017), without the logits.

Softmax: p = softmax(z), so log p = z - c with one constant c a row, and softmax(log p / T) = softmax(z / T): dividing
stored log-probabilities by T does what dividing the logits would have done. Sigmoid: logit(p) = log p - log(1 - p) = z.
The fit minimises the negative log-likelihood, which is convex in 1 / T, by bisection on its derivative.

Legend of the shape suffixes: ``N`` rows, ``K`` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that a fit may give; the limit itself where all rows are right, or no better than chance."""
LEAST_OF_EACH = 20
"""Rows that a label must hold and must lack to get a temperature of its own."""

_STEPS = 40
_CHUNK_VALUES = 1 << 20
_SOFTMAX_FLOOR = float(np.finfo(np.float32).tiny)
_SIGMOID_MARGIN = 2.0**-24


def fit_softmax_temperature(probs_NK: np.ndarray, truth_NK: np.ndarray) -> float:
    """The temperature to divide log-probabilities by; 1 without rows.

    Args:
        probs_NK: float, rows that sum to 1; zeros count as the smallest normal float32.
        truth_NK: bool, one class of each row true.
    """

    def slope(inverse_T: np.ndarray) -> np.ndarray:
        total = 0.0
        for rows in _chunks(probs_NK):
            logs_NK = _logs(probs_NK[rows])
            expected_N = (_softmax(logs_NK * inverse_T) * logs_NK).sum(axis=1)
            total += float(expected_N.sum() - logs_NK[truth_NK[rows]].sum())
        return np.array(total)

    return float(_bisect(slope, ())) if len(probs_NK) else 1.0


def fit_sigmoid_temperatures(probs_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """One temperature per label, float64 (K,); the common one for labels with too few rows (:data:`LEAST_OF_EACH`)."""
    num_rows, num_labels = probs_NK.shape
    if not num_rows:
        return np.ones(num_labels)

    def slopes(inverse_T: np.ndarray) -> np.ndarray:
        total_K = np.zeros(num_labels)
        for rows in _chunks(probs_NK):
            logits_NK = _logits(probs_NK[rows])
            total_K += ((_sigmoid(logits_NK * inverse_T) - truth_NK[rows]) * logits_NK).sum(axis=0)
        return total_K

    common = _bisect(lambda inverse_T: np.array(slopes(inverse_T).sum()), ())
    held_K = truth_NK.sum(axis=0)
    enough_K = np.minimum(held_K, num_rows - held_K) >= LEAST_OF_EACH
    return np.where(enough_K, _bisect(slopes, (num_labels,)), common)


def scale_softmax(probs_NK: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities at another temperature, float32 (N, K), rows that sum to 1."""
    return _softmax(_logs(probs_NK) / temperature).astype(np.float32)


def scale_sigmoid(probs_NK: np.ndarray, temperature_K: np.ndarray) -> np.ndarray:
    """Probabilities at other temperatures, float32 (N, K)."""
    return _sigmoid(_logits(probs_NK) / temperature_K).astype(np.float32)


def scale_threshold(threshold: float, temperature: float) -> float:
    """The probability of a sigmoid at another temperature that divides the same rows; 0 and 1 stay what they are."""
    if not 0 < threshold < 1 or temperature == 1:
        return threshold
    logit = (math.log(threshold) - math.log1p(-threshold)) / temperature
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    # Never 0, which every row reaches; as 32 bits, which probabilities have.
    return max(math.exp(logit) / (1 + math.exp(logit)), float(np.finfo(np.float32).tiny))


def _bisect(slope: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The temperature at which ``slope`` of the inverse temperature changes sign, within the limits."""
    low, high = np.full(shape, 1 / HIGHEST), np.full(shape, 1 / LOWEST)
    for _ in range(_STEPS):
        middle = np.sqrt(low * high)
        rising = slope(middle) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    return 1 / np.sqrt(low * high)


def _chunks(probs_NK: np.ndarray) -> Iterator[slice]:
    step = max(1, _CHUNK_VALUES // probs_NK.shape[1])
    return (slice(first, first + step) for first in range(0, len(probs_NK), step))


def _logs(probs_NK: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs_NK.astype(np.float64), _SOFTMAX_FLOOR))


def _logits(probs_NK: np.ndarray) -> np.ndarray:
    clipped = np.clip(probs_NK.astype(np.float64), _SIGMOID_MARGIN, 1 - _SIGMOID_MARGIN)
    return np.log(clipped) - np.log1p(-clipped)


def _softmax(logs_NK: np.ndarray) -> np.ndarray:
    powers_NK = np.exp(logs_NK - logs_NK.max(axis=1, keepdims=True))
    return powers_NK / powers_NK.sum(axis=1, keepdims=True)


def _sigmoid(logits_NK: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits_NK))
