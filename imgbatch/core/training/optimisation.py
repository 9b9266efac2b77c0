"""Optimiser, learning rates and the running mean of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imgbatch.config import TrainConfig

_DEPTH_STEPS = 8
"""Different learning rates between the first layer and the head, at most."""


def parameter_groups(network: nn.Module, head: str, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters grouped by learning rate and weight decay.

    The rate falls geometrically from the head's to ``first_layer_rate`` of it with the place of a parameter in the
    network's own order. Norms and biases (one dimension) have no weight decay.

    Args:
        head: dotted name of the last layer.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``base_lr`` (what a schedule multiplies).
    """
    named = list(network.named_parameters())
    backbone = [name for name, _ in named if not name.startswith(f"{head}.")]
    place = {n: math.floor(_DEPTH_STEPS * index / len(backbone)) / _DEPTH_STEPS for index, n in enumerate(backbone)}
    grouped: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        if parameter.requires_grad:
            rate = config.learning_rate * config.first_layer_rate ** (1 - place.get(name, 1.0))
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            grouped[rate, decay].append(parameter)
    return [
        {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(grouped.items(), key=lambda item: item[0])
    ]


def build_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum of 0.9, over :func:`parameter_groups`."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def rate_factor(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """What learning rates are multiplied by at a step (from 0): a line up to 1, then a cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps in which learning rates rise: ``warmup_epochs``, but a fifth of a training that has no more epochs."""
    if config.epochs <= config.warmup_epochs:
        return config.epochs * steps_per_epoch // 5
    return round(config.warmup_epochs * steps_per_epoch)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes ``factor`` of its own highest."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


@torch.no_grad()
def shrink_weights(optimizer: torch.optim.Optimizer, l1: float) -> None:
    """The step of an L1 penalty: weights come nearer to 0 by their learning rate times ``l1``, and stay there.

    Apart from the gradients, as AdamW's weight decay is, so that neither clipping nor the optimiser's own scales
    change it. Norms and biases are left alone.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.ndim > 1:
                parameter.copy_(functional.softshrink(parameter, group["lr"] * l1))


class AveragedWeights:
    """Exponential moving average of a network's state dict, statistics of batch norms too; counters are copied.

    The decay starts low, so that early weights are forgotten: ``min(decay, (1 + t) / (10 + t))`` at update t.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_updates = 0
        self._mean = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self._num_updates += 1
        decay = min(self._decay, (1 + self._num_updates) / (10 + self._num_updates))
        current = network.state_dict()
        averaged = [name for name, tensor in self._mean.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self._mean[n] for n in averaged], [current[n] for n in averaged], 1 - decay)
        for name, tensor in self._mean.items():
            if not tensor.is_floating_point():
                tensor.copy_(current[name])

    def weights(self) -> dict[str, Tensor]:
        """The averages, by the names of the state dict."""
        return self._mean

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self._num_updates, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_updates = state["num_updates"]
        for name, tensor in self._mean.items():
            tensor.copy_(state["mean"][name])
