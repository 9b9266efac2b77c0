from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.svm import LinearSVC
from torch.nn import functional

from imgbatch.core.architectures import build_network
from imgbatch.core.baselines import (
    BASELINES,
    check_linear_head,
    fit_head,
    fit_logistic,
    fit_prototypes,
    fit_svm,
)
from imgbatch.errors import UsageError


@pytest.fixture
def features():
    """Three overlapping classes of 40 points in five dimensions of different scale: features_ND, targets_N."""
    rng = np.random.default_rng(0)
    targets_N = np.repeat(np.arange(3), 40)
    centres_KD = rng.normal(0, 1.5, (3, 5))
    points_ND = (centres_KD[targets_N] + rng.normal(0, 1, (120, 5))) * [1, 10, 0.1, 1, 3] + [0, 5, 0, -2, 1]
    return torch.from_numpy(points_ND.astype(np.float32)), torch.from_numpy(targets_N)


def standardised(points_ND):
    return (points_ND - points_ND.mean(dim=0)) / points_ND.std(dim=0, correction=0)


def test_logistic_regression_is_scikit_learns(features):
    points_ND, targets_N = features
    penalty = 0.01
    head = fit_logistic(points_ND, functional.one_hot(targets_N, 3).float(), task="multiclass", penalty=penalty)
    scaled = standardised(points_ND)
    reference = LogisticRegression(C=1 / (penalty * 120), tol=1e-8, max_iter=1000).fit(
        scaled.numpy(), targets_N.numpy()
    )
    np.testing.assert_allclose(
        head.logits(points_ND).softmax(dim=1).numpy(), reference.predict_proba(scaled.numpy()), atol=1e-3
    )


def test_the_support_vector_machine_is_scikit_learns(features):
    points_ND, targets_N = features
    penalty = 0.01
    head = fit_svm(points_ND, functional.one_hot(targets_N, 3).float(), penalty=penalty)
    scaled = standardised(points_ND).numpy()
    # LinearSVC shrinks the bias too; a large scaling makes that as good as nothing.
    reference = LinearSVC(C=1 / (penalty * 120), intercept_scaling=100, tol=1e-8, max_iter=100_000)
    reference.fit(scaled, targets_N.numpy())
    np.testing.assert_allclose(head.logits(points_ND).numpy(), reference.decision_function(scaled), atol=1e-2)


def test_prototypes_choose_the_nearest_mean(features):
    points_ND, targets_N = features
    head = fit_prototypes(points_ND, functional.one_hot(targets_N, 3).float(), task="multiclass", scale=1.0)
    scaled = standardised(points_ND).numpy()
    reference = NearestCentroid().fit(scaled, targets_N.numpy())
    np.testing.assert_array_equal(head.logits(points_ND).argmax(dim=1).numpy(), reference.predict(scaled))


@pytest.mark.parametrize("kind", BASELINES)
def test_a_head_is_chosen_on_the_validation_split(features, kind):
    points_ND, targets_N = features
    truth_NK = functional.one_hot(targets_N, 3).float()
    even, odd = slice(0, None, 2), slice(1, None, 2)
    head = fit_head(kind, points_ND[even], truth_NK[even], points_ND[odd], truth_NK[odd], task="multiclass")
    right = (head.logits(points_ND[odd]).argmax(dim=1) == targets_N[odd]).float().mean()
    assert right > 0.8


@pytest.mark.parametrize("kind", BASELINES)
def test_labels_are_told_apart_one_by_one(features, kind):
    points_ND, _ = features
    truth_NK = torch.stack([points_ND[:, 0] > 0, points_ND[:, 3] > -2], dim=1).float()
    head = fit_head(kind, points_ND, truth_NK, points_ND, truth_NK, task="multilabel")
    right_K = ((head.logits(points_ND) > 0) == truth_NK.bool()).float().mean(dim=0)
    assert (right_K > 0.75).all()


def test_a_head_becomes_part_of_a_network():
    network = build_network("simple_cnn", 2)
    check_linear_head(network, "simple_cnn")
    features_ND = torch.randn(20, 128)
    truth_NK = functional.one_hot((features_ND[:, 0] > 0).long(), 2).float()
    head = fit_logistic(features_ND, truth_NK, task="binary", penalty=0.1)
    head.install(network, "simple_cnn")
    torch.testing.assert_close(network.head(features_ND), head.logits(features_ND))


def test_a_convolution_is_no_linear_head():
    with pytest.raises(UsageError, match="squeezenet1_1: its head is a convolution"):
        check_linear_head(build_network("squeezenet1_1", 2, empty=True), "squeezenet1_1")
