from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import hinge_loss
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from imgbatch.core.training.losses import build_loss, class_weights

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.3, -2.0]])
TARGETS = torch.tensor([0, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multiclass_is_torchs_cross_entropy(smoothing):
    loss_B = build_loss("multiclass", label_smoothing=smoothing)(LOGITS, functional.one_hot(TARGETS, 3).float())
    expected = functional.cross_entropy(LOGITS, TARGETS, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss_B, expected)


def test_two_logits_are_the_binary_cross_entropy_of_their_difference():
    logits, truth = LOGITS[:, :2], torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    difference = logits[:, 1] - logits[:, 0]
    expected = functional.binary_cross_entropy_with_logits(difference, truth[:, 1], reduction="none")
    torch.testing.assert_close(build_loss("binary")(logits, truth), expected)


def test_multilabel_is_the_mean_binary_cross_entropy():
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = functional.binary_cross_entropy_with_logits(LOGITS, truth, reduction="none").mean(dim=1)
    torch.testing.assert_close(build_loss("multilabel")(LOGITS, truth), expected)


def test_class_weights_make_classes_count_the_same():
    weights_K = class_weights(np.array([30, 10]), 40, "multiclass")
    torch.testing.assert_close(weights_K * torch.tensor([30.0, 10.0]), torch.tensor([20.0, 20.0]))
    torch.testing.assert_close(class_weights(np.array([30, 10]), 40, "multilabel"), torch.tensor([1 / 3, 3.0]))


def test_weights_scale_the_loss_of_their_class():
    truth = functional.one_hot(TARGETS, 3).float()
    plain = build_loss("multiclass")(LOGITS, truth)
    weighted = build_loss("multiclass", class_weights_K=torch.tensor([3.0, 1.0, 0.5]))(LOGITS, truth)
    torch.testing.assert_close(weighted, plain * torch.tensor([3.0, 0.5]))


def test_focal_is_the_cross_entropy_times_the_square_of_what_is_missing():
    truth = functional.one_hot(TARGETS, 3).float()
    missing_B = 1 - LOGITS.softmax(dim=1).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(
        build_loss("multiclass", kind="focal")(LOGITS, truth), missing_B**2 * build_loss("multiclass")(LOGITS, truth)
    )


def test_multilabel_focal_is_torchvisions():
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = sigmoid_focal_loss(LOGITS, truth, alpha=-1, gamma=2).mean(dim=1)
    torch.testing.assert_close(build_loss("multilabel", kind="focal")(LOGITS, truth), expected)


def test_hinge_is_what_the_truth_lacks_to_be_one_above_all_others():
    loss_B = build_loss("multiclass", kind="hinge")(LOGITS, functional.one_hot(TARGETS, 3).float())
    torch.testing.assert_close(loss_B, torch.tensor([0.0, 1 + 0.3 + 2.0]))
    reference = hinge_loss(TARGETS, LOGITS, labels=range(3))
    assert loss_B.mean() == pytest.approx(reference)


def test_multilabel_hinge_asks_for_one_beyond_zero():
    truth = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    expected = torch.tensor([[0.0, 2.0, 1.5], [1.0, 1.3, 3.0]]).mean(dim=1)
    torch.testing.assert_close(build_loss("multilabel", kind="hinge")(LOGITS, truth), expected)


@pytest.mark.parametrize("kind", ["cross_entropy", "focal", "hinge"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_a_mixture_has_the_mixture_of_the_losses(kind, task):
    loss = build_loss(task, kind=kind)
    first, second = torch.eye(3)[[0, 1]], torch.eye(3)[[2, 0]]
    torch.testing.assert_close(
        loss(LOGITS, 0.3 * first + 0.7 * second), 0.3 * loss(LOGITS, first) + 0.7 * loss(LOGITS, second)
    )
