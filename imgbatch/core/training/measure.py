"""What a split's probabilities are worth, as plain numbers.

Legend of shape suffixes: N image, K class.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from imgbatch.core.description import Task
from imgbatch.core.metrics import confusion, intervals, probability, ranking, thresholds
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD


def measure(
    probs_NK: np.ndarray,
    truth: np.ndarray,
    *,
    task: Task,
    class_names: tuple[str, ...],
    per_class: bool = False,
    label_thresholds: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Metrics of a split: shares from 0 to 1, losses in nats; what cannot be measured is ``None``.

    Args:
        probs_NK: float32.
        truth: as ``LabelledSplit.truth``.
        per_class: add a table of the classes.
        label_thresholds: multilabel: class name to the probability from which it applies; others: 0.5.
    """
    if task == "multilabel":
        metrics = _multi_label(probs_NK, truth, class_names, per_class, label_thresholds or {})
    else:
        metrics = _single_label(probs_NK, truth, class_names, per_class)
    return {"images": len(truth), **metrics}


def choose_label_thresholds(
    probs_NK: np.ndarray, truth_NK: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, float]:
    """From which probability each label applies for the best F1 on these images; 0.5 for one that none of them has."""
    chosen = [thresholds.for_f1(probs_NK[:, k], truth_NK[:, k]) for k in range(len(class_names))]
    return {
        name: DEFAULT_LABEL_THRESHOLD if threshold is None else threshold
        for name, threshold in zip(class_names, chosen, strict=True)
    }


def score(metrics: dict[str, Any], metric: str, task: Task) -> tuple[float, float]:
    """What makes one epoch better than another, higher is better: the metric, then the loss.

    Args:
        metric: as ``train.metric``.
    """
    if metric == "auto":
        metric = "mean_average_precision" if task == "multilabel" else "top1"
    value = metrics[metric]
    first = -math.inf if value is None else float(value)
    return (-first if metric == "loss" else first, -float(metrics["loss"]))


def check_metric(metric: str, task: Task) -> bool:
    """Whether the task has the metric."""
    only = {"top1": False, "balanced_accuracy": False, "mean_average_precision": True}
    return only.get(metric, task == "multilabel") == (task == "multilabel")


def _single_label(
    probs_NK: np.ndarray, targets_N: np.ndarray, class_names: tuple[str, ...], per_class: bool
) -> dict[str, Any]:
    num_classes = len(class_names)
    predicted_N = probs_NK.argmax(axis=1)
    right = int((predicted_N == targets_N).sum())
    one_each_N = np.ones(len(targets_N), np.int64)
    counts = confusion.counts_from_cells(targets_N, predicted_N, one_each_N, num_classes)
    interval = intervals.wilson_interval(right, len(targets_N))
    metrics: dict[str, Any] = {
        "loss": _number(probability.log_loss_sum(probs_NK, targets_N) / len(targets_N)),
        "top1": right / len(targets_N),
        "top1_interval_95": [_number(bound) for bound in interval],
    }
    if num_classes > 5:
        metrics["top5"] = float(probability.top_k_hits(probs_NK, targets_N, 5).mean())
    metrics["balanced_accuracy"] = _number(confusion.balanced_accuracy(counts))
    metrics["macro_f1"] = _number(confusion.averages(counts)["macro"]["f1"])
    if per_class:
        scores = confusion.class_scores(counts)
        metrics["per_class"] = {
            name: {
                "images": int(counts.target[k]),
                "precision": _number(scores.precision[k]),
                "recall": _number(scores.recall[k]),
                "f1": _number(scores.f1[k]),
            }
            for k, name in enumerate(class_names)
        }
    return metrics


def _multi_label(
    probs_NK: np.ndarray,
    truth_NK: np.ndarray,
    class_names: tuple[str, ...],
    per_class: bool,
    label_thresholds: dict[str, float],
) -> dict[str, Any]:
    said_NK = probs_NK >= np.array([label_thresholds.get(name, DEFAULT_LABEL_THRESHOLD) for name in class_names])
    counts = confusion.ClassCounts(
        right=(said_NK & truth_NK).sum(axis=0), target=truth_NK.sum(axis=0), predicted=said_NK.sum(axis=0)
    )
    precision_K = np.array([ranking.average_precision(truth_NK[:, k], probs_NK[:, k]) for k in range(len(class_names))])
    averages = confusion.averages(counts, all_classes=True)
    metrics: dict[str, Any] = {
        "loss": _number(probability.binary_log_loss_sum(probs_NK, truth_NK).mean() / len(truth_NK)),
        "mean_average_precision": _number(ranking.nan_mean(precision_K[:, None])[0]),
        "mean_base_rate": float(truth_NK.mean()),
        "macro_f1": _number(averages["macro"]["f1"]),
        "micro_f1": _number(averages["micro"]["f1"]),
        "exact_match": float((said_NK == truth_NK).all(axis=1).mean()),
    }
    if per_class:
        scores = confusion.class_scores(counts)
        base_rate_K = truth_NK.mean(axis=0)
        metrics["per_class"] = {
            name: {
                "images": int(counts.target[k]),
                "base_rate": float(base_rate_K[k]),
                "f1_of_always_yes": float(2 * base_rate_K[k] / (1 + base_rate_K[k])),
                "average_precision": _number(precision_K[k]),
                "precision": _number(scores.precision[k]),
                "recall": _number(scores.recall[k]),
                "f1": _number(scores.f1[k]),
            }
            for k, name in enumerate(class_names)
        }
    return metrics


def _number(value: Any) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None
