from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from sklearn import metrics as reference

from imgbatch.core.metrics.thresholds import for_f1
from imgbatch.core.training.measure import check_metric, choose_label_thresholds, measure, score


def test_single_label_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    probs_NK = rng.dirichlet(np.ones(7), 60).astype(np.float32)
    targets_N = rng.integers(0, 7, 60)
    names = tuple("abcdefg")
    measured = measure(probs_NK, targets_N, task="multiclass", class_names=names, per_class=True)
    predicted_N = probs_NK.argmax(axis=1)
    assert measured["images"] == 60
    assert measured["top1"] == reference.accuracy_score(targets_N, predicted_N)
    assert measured["loss"] == pytest.approx(reference.log_loss(targets_N, probs_NK, labels=range(7)), rel=1e-5)
    assert measured["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(targets_N, predicted_N))
    assert measured["macro_f1"] == pytest.approx(reference.f1_score(targets_N, predicted_N, average="macro"))
    assert measured["per_class"]["a"]["images"] == (targets_N == 0).sum()
    low, high = measured["top1_interval_95"]
    assert low < measured["top1"] < high


def test_memory_does_not_grow_with_the_square_of_the_classes():
    names = tuple(f"class {k}" for k in range(20_000))
    targets_N = np.array([3, 7, 19_999])
    probs_NK = np.zeros((3, 20_000), np.float32)
    probs_NK[np.arange(3), [3, 8, 19_999]] = 1
    tracemalloc.start()
    try:
        measured = measure(probs_NK, targets_N, task="multiclass", class_names=names)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert measured["top1"] == measured["balanced_accuracy"] == pytest.approx(2 / 3)
    assert measured["macro_f1"] == pytest.approx(2 / 4)
    assert peak_bytes < 50e6  # the matrix of all pairs is 3.2 GB


def test_multilabel_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    probs_NK = rng.random((50, 3)).astype(np.float32)
    truth_NK = rng.random((50, 3)) < 0.4
    measured = measure(probs_NK, truth_NK, task="multilabel", class_names=("a", "b", "c"), per_class=True)
    said_NK = probs_NK >= 0.5
    assert measured["mean_average_precision"] == pytest.approx(reference.average_precision_score(truth_NK, probs_NK))
    assert measured["macro_f1"] == pytest.approx(reference.f1_score(truth_NK, said_NK, average="macro"))
    assert measured["micro_f1"] == pytest.approx(reference.f1_score(truth_NK, said_NK, average="micro"))
    assert measured["exact_match"] == reference.accuracy_score(truth_NK, said_NK)
    assert measured["per_class"]["b"]["base_rate"] == truth_NK[:, 1].mean()


def test_labels_apply_from_the_probability_of_the_best_f1():
    truth_NK = np.array([[1, 0], [0, 0]] * 10, bool)
    probs_NK = np.array([[0.3, 0.9], [0.1, 0.1]] * 10, np.float32)
    chosen = choose_label_thresholds(probs_NK, truth_NK, ("a", "b"))
    assert chosen == {"a": pytest.approx(0.2), "b": 0.5}
    measured = measure(
        probs_NK, truth_NK, task="multilabel", class_names=("a", "b"), per_class=True, label_thresholds=chosen
    )
    assert measured["per_class"]["a"]["f1"] == 1
    assert measured["per_class"]["a"]["f1_of_always_yes"] == pytest.approx(2 / 3)


def test_a_single_image_does_not_move_a_threshold():
    positive_N = np.array([True] * 20 + [False])
    probs_N = np.linspace(0.99, 0.6, 21)
    assert for_f1(probs_N, positive_N) == 0.5
    assert for_f1(np.append(probs_N[:-3], [0.4, 0.3, 0.2]), positive_N) == pytest.approx((0.3 + 0.4) / 2)


def test_what_cannot_be_measured_is_none():
    truth_NK = np.array([[True, False], [False, False]])
    measured = measure(
        np.full((2, 2), 0.5, np.float32), truth_NK, task="multilabel", class_names=("a", "b"), per_class=True
    )
    assert measured["per_class"]["b"]["average_precision"] is None


def test_scores_order_epochs():
    better, worse = {"top1": 0.8, "loss": 0.5}, {"top1": 0.8, "loss": 0.6}
    assert score(better, "auto", "multiclass") > score(worse, "auto", "multiclass")
    assert score({"top1": 0.9, "loss": 9.0}, "auto", "binary") > score(better, "auto", "binary")
    assert score(better, "loss", "multiclass") > score(worse, "loss", "multiclass")
    assert score({"mean_average_precision": None, "loss": 1.0}, "auto", "multilabel")[0] == -np.inf


def test_metrics_belong_to_tasks():
    assert check_metric("top1", "binary")
    assert not check_metric("top1", "multilabel")
    assert check_metric("macro_f1", "multilabel")
    assert not check_metric("mean_average_precision", "multiclass")
