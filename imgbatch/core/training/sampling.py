"""Which images make which batch, and which of them a worker takes: the same for any number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from imgbatch.core.training.augment import derived_seed

_ORDER = 1
"""Keeps the seed of the order apart from those of other uses."""

Draw = tuple[int, int, int]
"""Epoch, position of an image, and how many times the epoch had it before: a sampler draws rare classes again."""


@dataclass(frozen=True)
class BatchPlan:
    """How epochs are cut into optimiser steps, and steps into the passes of each worker."""

    num_images: int
    batch_size: int
    """Images per step, over all workers; fewer where there are not so many."""
    seed: int
    world_size: int = 1
    rank: int = 0
    accumulate: int = 1

    @property
    def step_images(self) -> int:
        return min(self.batch_size, self.num_images)

    @property
    def steps_per_epoch(self) -> int:
        """What is left over is left out, another part each epoch."""
        return self.num_images // self.step_images

    def passes(self, epoch: int, weights_N: np.ndarray | None = None) -> Iterator[list[Draw]]:
        """This worker's forward passes of an epoch; ``accumulate`` of them a step.

        Images 0 and 1, 2 and 3, ... of a step stay together, so that pairs can be mixed.
        """
        order = epoch_order(self.num_images, seed=self.seed, epoch=epoch, weights_N=weights_N)
        times = times_before(order)
        size = self.step_images
        for step in range(self.steps_per_epoch):
            batch = range(step * size, (step + 1) * size)
            pairs = [batch[first : first + 2] for first in range(0, size, 2)][self.rank :: self.world_size]
            for part in range(self.accumulate):
                chosen = [at for pair in pairs[part :: self.accumulate] for at in pair]
                yield [(epoch, int(order[at]), int(times[at])) for at in chosen]


def spread_over_classes(truth: np.ndarray, counts_K: np.ndarray, *, most: int, seed: int) -> np.ndarray:
    """Positions of at most so many images, rising, of every class as many as of the others while there are any.

    Args:
        truth: as ``LabelledSplit.truth``; multilabel: an image counts as of its rarest class.
        counts_K: images of each class.
    """
    class_N = truth
    if truth.ndim == 2:
        rarest_first_K = np.argsort(counts_K, kind="stable")
        class_N = np.where(truth.any(axis=1), truth[:, rarest_first_K].argmax(axis=1), -1)
    order_N = epoch_order(len(truth), seed=seed, epoch=0)
    chosen = np.argsort(times_before(class_N[order_N]), kind="stable")[:most]
    positions: np.ndarray = np.sort(order_N[chosen])
    return positions


def times_before(order_N: np.ndarray) -> np.ndarray:
    """How many times each position came before in an order: zeros for a permutation."""
    by_position = np.argsort(order_N, kind="stable")
    ordered_N = order_N[by_position]
    times_N = np.empty(len(order_N), np.int64)
    times_N[by_position] = np.arange(len(order_N)) - np.searchsorted(ordered_N, ordered_N)
    return times_N


def epoch_order(num_images: int, *, seed: int, epoch: int, weights_N: np.ndarray | None = None) -> np.ndarray:
    """Positions in the order of an epoch: a permutation, or drawn with replacement in proportion to weights."""
    rng = np.random.default_rng(derived_seed(_ORDER, seed, epoch))
    if weights_N is None:
        return rng.permutation(num_images)
    return rng.choice(num_images, size=num_images, p=weights_N / weights_N.sum())


def balancing_weights(truth: np.ndarray, counts_K: np.ndarray) -> np.ndarray:
    """Weights that draw every class equally often, float64 (N,); multilabel: by an image's rarest class.

    Args:
        truth: as ``LabelledSplit.truth``.
        counts_K: images of each class.
    """
    weights_K = 1 / np.maximum(counts_K, 1)
    if truth.ndim == 1:
        return weights_K[truth]
    # An image of none of the classes is drawn like one of the commonest.
    return np.broadcast_to(weights_K, truth.shape).max(axis=1, where=truth, initial=weights_K.min())
