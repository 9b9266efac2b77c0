"""What a fine-tuned network has to beat: simple classifiers on the features of a frozen one, or on hand-made ones.

Each becomes the backbone's last layer, so its bundle is classified like any other model.

Legend of shape suffixes: N image, D feature, K class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from imgbatch.core.architectures import head_module_name
from imgbatch.core.description import Task
from imgbatch.core.forest import FittedForest, fit_forest
from imgbatch.errors import UsageError

LOGISTIC_REGRESSION, PROTOTYPES, LINEAR_SVM, RANDOM_FOREST = (
    "logistic_regression",
    "prototypes",
    "linear_svm",
    "random_forest",
)
BASELINES = (LOGISTIC_REGRESSION, PROTOTYPES, LINEAR_SVM, RANDOM_FOREST)

_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
_SVM_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_SVM_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
_LEAF_IMAGES = (1, 3, 10)
_SCALES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 3))
_MAX_ITERATIONS = 200


@dataclass(frozen=True)
class LinearHead:
    """``logits_NK = features_ND @ weight_KD.T + bias_K``, float32."""

    weight_KD: Tensor
    bias_K: Tensor
    setting: float
    """The penalty, or scale (prototypes)."""

    def logits(self, features_ND: Tensor) -> Tensor:
        return functional.linear(features_ND, self.weight_KD, self.bias_K)

    def scaled(self, factor: float) -> LinearHead:
        """With logits ``factor`` times as large."""
        return replace(self, weight_KD=factor * self.weight_KD, bias_K=factor * self.bias_K)

    def install(self, network: nn.Module, arch: str) -> None:
        """Make it the head of a network; see :func:`check_linear_head`."""
        head = network.get_submodule(head_module_name(arch))
        with torch.no_grad():
            for parameter, value in ((head.weight, self.weight_KD), (head.bias, self.bias_K)):
                assert isinstance(parameter, nn.Parameter)
                parameter.copy_(value)


def has_linear_head(network: nn.Module, arch: str) -> bool:
    """Whether the network ends in a linear layer, to which a classifier can be fitted."""
    return isinstance(network.get_submodule(head_module_name(arch)), nn.Linear)


def check_linear_head(network: nn.Module, arch: str) -> None:
    """Raise :class:`UsageError` unless the network ends in a linear layer."""
    if not has_linear_head(network, arch):
        raise UsageError(
            f"{arch}: its head is a convolution, to which no linear classifier can be fitted; take another"
        )


def fit_head(
    kind: str, train_ND: Tensor, truth_NK: Tensor, validation_ND: Tensor, validation_NK: Tensor, *, task: Task
) -> LinearHead | FittedForest:
    """The ``kind`` of head that has the lowest validation loss among a few settings.

    Args:
        kind: one of :data:`BASELINES`.
        train_ND: features, float32; likewise ``validation_ND``.
        truth_NK: float32, 1 where an image shows the class; likewise ``validation_NK``.
    """
    candidates: list[LinearHead | FittedForest] = []
    if kind == PROTOTYPES:
        candidates += [fit_prototypes(train_ND, truth_NK, task=task, scale=scale) for scale in _SCALES]
    elif kind == LINEAR_SVM:
        fitted = [fit_svm(train_ND, truth_NK, penalty=penalty) for penalty in _SVM_PENALTIES]
        candidates += [head.scaled(scale) for head in fitted for scale in _SVM_SCALES]
    elif kind == RANDOM_FOREST:
        candidates += [fit_forest(train_ND, truth_NK, task=task, min_images=size) for size in _LEAF_IMAGES]
    else:
        candidates += [fit_logistic(train_ND, truth_NK, task=task, penalty=penalty) for penalty in _PENALTIES]
    return min(candidates, key=lambda head: float(_loss(head.logits(validation_ND), validation_NK, task)))


def fit_logistic(features_ND: Tensor, truth_NK: Tensor, *, task: Task, penalty: float) -> LinearHead:
    """Logistic regression on standardised features, by L-BFGS in float64.

    Args:
        penalty: half of it times the squared norm of the weights is added to the mean loss; scikit-learn's C is
            ``1 / (penalty * N)``.
    """
    return _fit_linear(features_ND, truth_NK, penalty, lambda logits_NK, truth_NK: _loss(logits_NK, truth_NK, task))


def fit_svm(features_ND: Tensor, truth_NK: Tensor, *, penalty: float) -> LinearHead:
    """A linear support vector machine for each class against the rest, by squared hinge loss, as ``LinearSVC``.

    Args:
        penalty: as for :func:`fit_logistic`.
    """

    def squared_hinge(logits_NK: Tensor, truth_NK: Tensor) -> Tensor:
        return functional.relu(1 - (2 * truth_NK - 1) * logits_NK).square().mean(dim=0).sum()

    return _fit_linear(features_ND, truth_NK, penalty, squared_hinge)


def _fit_linear(
    features_ND: Tensor, truth_NK: Tensor, penalty: float, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> LinearHead:
    standard_ND, mean_D, std_D = _standardise(features_ND)
    truth = truth_NK.double()
    weight_KD = torch.zeros(truth.shape[1], features_ND.shape[1], dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(truth.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_KD, bias_K], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(functional.linear(standard_ND, weight_KD, bias_K), truth)
        loss = loss + 0.5 * penalty * weight_KD.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return _on_raw_features(weight_KD.detach(), bias_K.detach(), mean_D, std_D, penalty)


def fit_prototypes(features_ND: Tensor, truth_NK: Tensor, *, task: Task, scale: float) -> LinearHead:
    """The nearest class mean: few-shot classification from a handful of images per class (Snell et al., 2017).

    Logits are minus the squared distance of standardised features to each class's mean; what all classes share drops
    out and leaves them linear. Multilabel: the distance to the mean of the images without the class less that to the
    mean of those with it.

    Args:
        scale: what the logits are multiplied by.
    """
    standard_ND, mean_D, std_D = _standardise(features_ND)
    truth = truth_NK.double()
    with_KD = truth.T @ standard_ND / truth.sum(dim=0)[:, None]
    weight_KD, bias_K = 2 * with_KD, -with_KD.square().sum(dim=1)
    if task == "multilabel":
        without = 1 - truth
        without_KD = without.T @ standard_ND / without.sum(dim=0)[:, None]
        weight_KD, bias_K = weight_KD - 2 * without_KD, bias_K + without_KD.square().sum(dim=1)
    return _on_raw_features(scale * weight_KD, scale * bias_K, mean_D, std_D, scale)


def _standardise(features_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features with mean 0 and standard deviation 1, and what they had, float64."""
    features = features_ND.double()
    mean_D, std_D = features.mean(dim=0), features.std(dim=0, correction=0).clamp(min=1e-6)
    return (features - mean_D) / std_D, mean_D, std_D


def _on_raw_features(weight_KD: Tensor, bias_K: Tensor, mean_D: Tensor, std_D: Tensor, setting: float) -> LinearHead:
    """A head for standardised features as one for features as they are."""
    scaled_KD = weight_KD / std_D
    return LinearHead(scaled_KD.float(), (bias_K - scaled_KD @ mean_D).float(), setting)


def _loss(logits_NK: Tensor, truth_NK: Tensor, task: Task) -> Tensor:
    if task == "multilabel":
        return functional.binary_cross_entropy_with_logits(logits_NK, truth_NK.to(logits_NK))
    return functional.cross_entropy(logits_NK, truth_NK.to(logits_NK))
