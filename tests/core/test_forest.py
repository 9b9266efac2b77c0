from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch.nn import functional

from imgbatch.core.architectures import build_network, forward_features
from imgbatch.core.forest import FittedForest, ForestHead, fit_forest, refuse_forest
from imgbatch.core.model import count_features, load_network
from imgbatch.core.predict import Predictor
from imgbatch.errors import UsageError


@pytest.fixture
def points():
    """points_ND and two overlapping properties of theirs, bool [N, 2]."""
    points_ND = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (90, 6)).astype(np.float32))
    return points_ND, torch.stack([points_ND[:, 0] + points_ND[:, 1] > 0, points_ND[:, 2] > 0.5], dim=1)


def oracle(points_ND, truth, min_images):
    forest = RandomForestClassifier(300, min_samples_leaf=min_images, random_state=0)
    return forest.fit(points_ND.numpy(), truth.numpy())


def test_classes_are_scikit_learns(points):
    points_ND, truth_N2 = points
    targets_N = truth_N2[:, 0].long() + truth_N2[:, 1].long()
    fitted = fit_forest(points_ND, functional.one_hot(targets_N, 3).float(), task="multiclass", min_images=3)
    # Features that stand exactly at a limit go the same way too.
    seen_ND = torch.cat([points_ND, fitted.head.limit[:40, :6]])
    expected_NK = oracle(points_ND, targets_N, 3).predict_proba(seen_ND.numpy())
    np.testing.assert_allclose(fitted.logits(seen_ND).softmax(dim=1).numpy(), expected_NK, atol=1e-3)


def test_labels_are_scikit_learns(points):
    points_ND, truth_NK = points
    fitted = fit_forest(points_ND, truth_NK.float(), task="multilabel", min_images=1)
    expected = oracle(points_ND, truth_NK.long(), 1).predict_proba(points_ND.numpy())
    expected_NK = np.stack([shares[:, 1] for shares in expected], axis=1)
    np.testing.assert_allclose(fitted.logits(points_ND).sigmoid().numpy(), expected_NK, atol=1e-3)


def test_a_forest_is_stored_and_predicts_like_any_head(make_bundle):
    network = build_network("simple_cnn", 2).eval()
    images_NHWC = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), np.uint8)
    pixels_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        features_ND = forward_features(network, "simple_cnn", pixels_NCHW)
    truth_NK = functional.one_hot((features_ND[:, 0] > features_ND[:, 0].median()).long(), 2).float()
    fitted = fit_forest(features_ND, truth_NK, task="binary", min_images=1)
    fitted.install(network, "simple_cnn")
    bundle = make_bundle(task="binary", class_names=("low", "high"), state_dict=network.state_dict())
    torch.testing.assert_close(load_network(bundle).state_dict(), network.state_dict())
    assert count_features(bundle) == 128
    predictions = Predictor(bundle, features=True).predict(images_NHWC)
    assert predictions.features_ND.shape == (40, 128)
    expected_NK = fitted.logits(torch.from_numpy(predictions.features_ND)).softmax(dim=1)
    np.testing.assert_allclose(predictions.probs_NK, expected_NK.numpy(), atol=1e-5)
    with pytest.raises(UsageError, match="here: a random forest has no gradients"):
        refuse_forest(network, "simple_cnn", where="here")


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_what_is_no_number_has_no_label(points, task):
    points_ND, truth_NK = points
    odd_ND = points_ND[:4].clone()
    odd_ND[0, 5], odd_ND[2, 1] = torch.nan, torch.inf
    fitted = fit_forest(points_ND, truth_NK.float(), task=task, min_images=1)
    assert fitted.logits(odd_ND).isfinite().all(dim=1).tolist() == [False, True, False, True]


def test_a_forest_goes_to_the_device_of_its_network():
    network = build_network("simple_cnn", 2, empty=True)
    FittedForest(ForestHead(2, 3, 2, 128)).install(network, "simple_cnn")
    assert {buffer.device.type for buffer in network.head.buffers()} == {"meta"}
