"""A random forest as the head of a network: its trees are arrays, stored and evaluated like any other weights.

scikit-learn, of the ``baselines`` extra, fits it; classifying needs torch alone.

Legend of shape suffixes: B image of the batch, N image, T tree, M node, D feature, K class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imgbatch.core.architectures import head_module_name, set_head
from imgbatch.core.description import Task
from imgbatch.errors import UsageError

_NUM_TREES = 300
_SURE = 1e-4
"""Shares of trees are kept this far from 0 and 1, whose logarithms are infinite."""


class ForestHead(nn.Module):
    """Features ``[B, D]`` to logits ``[B, K]``: the logarithm of the trees' mean probability, or its log odds.

    NaN where a feature is not finite: every node would send it right, and the label would look sure.

    Args:
        num_trees: and ``num_nodes`` of the largest; smaller trees end in nodes that nothing leads to.
    """

    feature: Tensor
    """[T, M] int32: what a node looks at."""
    limit: Tensor
    """[T, M] float32: up to it the way leads left."""
    left: Tensor
    """[T, M] int32: the next node; a leaf's is itself. Likewise ``right``."""
    right: Tensor
    shares: Tensor
    """[T, M, K] float32: of each class among the training images that came to a leaf."""
    importances: Tensor
    """[D] float32: how much each feature told (mean decrease in impurity), 1 in all."""
    multilabel: Tensor
    """bool: whether the shares are of each class against its absence."""

    def __init__(self, num_trees: int, num_nodes: int, num_classes: int, num_features: int) -> None:
        super().__init__()
        for name in ("feature", "left", "right"):
            self.register_buffer(name, torch.zeros(num_trees, num_nodes, dtype=torch.int32))
        self.register_buffer("limit", torch.zeros(num_trees, num_nodes))
        self.register_buffer("shares", torch.zeros(num_trees, num_nodes, num_classes))
        self.register_buffer("importances", torch.zeros(num_features))
        self.register_buffer("multilabel", torch.tensor(False))

    def forward(self, features_BD: Tensor) -> Tensor:
        trees_T = torch.arange(len(self.feature), device=features_BD.device)
        node_BT = torch.zeros(len(features_BD), len(trees_T), dtype=torch.int64, device=features_BD.device)
        while True:
            goes_left_BT = features_BD.gather(1, self.feature[trees_T, node_BT].long()) <= self.limit[trees_T, node_BT]
            next_BT = torch.where(goes_left_BT, self.left[trees_T, node_BT], self.right[trees_T, node_BT]).long()
            if torch.equal(next_BT, node_BT):
                break
            node_BT = next_BT
        probs_BK = self.shares[trees_T, node_BT].mean(dim=1).clamp(_SURE, 1 - _SURE)
        logits_BK = torch.where(self.multilabel, probs_BK.logit(), probs_BK.log())
        return torch.where(features_BD.isfinite().all(dim=1, keepdim=True), logits_BK, torch.nan)


@dataclass(frozen=True)
class FittedForest:
    """A forest that can become a network's head."""

    head: ForestHead

    def logits(self, features_ND: Tensor) -> Tensor:
        return self.head(features_ND)

    def install(self, network: nn.Module, arch: str) -> None:
        """Make it the head of a network, on that one's device."""
        set_head(network, arch, self.head.to(_head_device(network, arch)))


def fit_forest(features_ND: Tensor, truth_NK: Tensor, *, task: Task, min_images: int) -> FittedForest:
    """300 trees by scikit-learn.

    Args:
        truth_NK: float32, 1 where an image shows the class.
        min_images: in every leaf.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise UsageError("scikit-learn is not installed; pip install 'imgbatch[baselines]' brings it") from error
    multilabel = task == "multilabel"
    truth = truth_NK.numpy().astype(np.int64)
    forest = RandomForestClassifier(
        _NUM_TREES, min_samples_leaf=min_images, random_state=0, n_jobs=torch.get_num_threads()
    )
    forest.fit(features_ND.numpy(), truth if multilabel else truth.argmax(axis=1))
    trees = [estimator.tree_ for estimator in forest.estimators_]
    head = ForestHead(len(trees), max(tree.node_count for tree in trees), truth.shape[1], features_ND.shape[1])
    for index, tree in enumerate(trees):
        _store_tree(head, index, tree, multilabel)
    head.importances.copy_(torch.from_numpy(forest.feature_importances_))
    head.multilabel.fill_(multilabel)
    return FittedForest(head)


def adopt_forest(network: nn.Module, arch: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make an empty forest the head of ``network``, on its device, where weights of these shapes end in one."""
    name = head_module_name(arch)
    if f"{name}.shares" in shapes:
        num_trees, num_nodes, num_classes = shapes[f"{name}.shares"]
        with _head_device(network, arch):
            set_head(network, arch, ForestHead(num_trees, num_nodes, num_classes, *shapes[f"{name}.importances"]))


def _head_device(network: nn.Module, arch: str) -> torch.device:
    return next(iter(network.get_submodule(head_module_name(arch)).state_dict().values())).device


def refuse_forest(network: nn.Module, arch: str, *, where: str) -> None:
    """Raise :class:`UsageError` if the network ends in a forest, through which no gradient flows."""
    if isinstance(network.get_submodule(head_module_name(arch)), ForestHead):
        raise UsageError(f"{where}: a random forest has no gradients to learn or explain from; take another model")


def _store_tree(head: ForestHead, index: int, tree: Any, multilabel: bool) -> None:
    size = tree.node_count
    is_leaf = tree.children_left < 0
    own = np.arange(size)
    # scikit-learn compares float32 features with float64 limits: the next lower float32 decides the same.
    limit = tree.threshold.astype(np.float32)
    limit = np.where(limit > tree.threshold, np.nextafter(limit, np.float32(-np.inf)), limit)
    # [node, output, class]: of a label the second class is that it is there, of a single output all classes count.
    counts = tree.value
    shares = counts[:, :, 1] / counts.sum(axis=2) if multilabel else counts[:, 0] / counts[:, 0].sum(axis=1)[:, None]
    for buffer, values in (
        (head.feature, np.where(is_leaf, 0, tree.feature)),
        (head.left, np.where(is_leaf, own, tree.children_left)),
        (head.right, np.where(is_leaf, own, tree.children_right)),
        (head.limit, limit),
        (head.shares, shares),
    ):
        buffer[index, :size] = torch.from_numpy(values).to(buffer.dtype)
