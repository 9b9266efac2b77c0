from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

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
