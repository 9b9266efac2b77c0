from __future__ import annotations

import pytest
import torch
from torch import nn

from imgbatch.config import TrainConfig
from imgbatch.core.architectures import build_network, head_module_name
from imgbatch.core.training.optimisation import (
    AveragedWeights,
    build_optimizer,
    parameter_groups,
    rate_factor,
    set_rates,
    shrink_weights,
    warmup_steps,
)


@pytest.mark.parametrize("arch", ["resnet18", "simple_cnn", "vit_b_16"])
def test_every_parameter_is_in_one_group_and_earlier_layers_learn_slower(arch):
    network = build_network(arch, 3, empty=True)
    config = TrainConfig(learning_rate=1e-2, first_layer_rate=0.01)
    groups = parameter_groups(network, head_module_name(arch), config)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = [rate_of[id(parameter)] for parameter in network.parameters()]
    assert len(rate_of) == len(rates)
    head = network.get_submodule(head_module_name(arch))
    assert all(rate_of[id(parameter)] == 1e-2 for parameter in head.parameters())
    first = next(iter(network.parameters()))
    assert rate_of[id(first)] == pytest.approx(1e-4)


def test_norms_and_biases_do_not_decay():
    groups = parameter_groups(build_network("simple_cnn", 3), "head", TrainConfig(weight_decay=0.1))
    for group in groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


def test_frozen_parameters_are_left_out():
    network = build_network("simple_cnn", 3).requires_grad_(False)
    network.head.requires_grad_(True)
    groups = parameter_groups(network, "head", TrainConfig())
    assert sum(len(group["params"]) for group in groups) == 2


def test_rates_rise_then_fall_to_nothing():
    factors = [rate_factor(step, num_steps=20, warmup_steps=4) for step in range(21)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0
    assert factors == [*factors[:5], *sorted(factors[5:], reverse=True)]
    assert factors[20] == 0.0


@pytest.mark.parametrize(
    ("epochs", "warmup_epochs", "expected"),
    [(20, 1.0, 30), (2, 1.0, 30), (3, 0.5, 15), (1, 1.0, 6), (2, 5.0, 12), (1, 0.0, 0)],
)
def test_a_training_is_never_all_warm_up(epochs, warmup_epochs, expected):
    assert warmup_steps(TrainConfig(epochs=epochs, warmup_epochs=warmup_epochs), 30) == expected


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_schedule_scales_every_group(optimizer):
    config = TrainConfig(optimizer=optimizer)
    built = build_optimizer(parameter_groups(build_network("simple_cnn", 3), "head", config), config)
    set_rates(built, 0.5)
    assert all(group["lr"] == 0.5 * group["base_lr"] for group in built.param_groups)


def test_an_l1_penalty_makes_small_weights_nothing_and_spares_biases():
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.05, -0.5, 1.0]]))
        layer.bias.fill_(0.05)
    config = TrainConfig(learning_rate=1.0)
    shrink_weights(build_optimizer(parameter_groups(nn.Sequential(layer), "0", config), config), l1=0.1)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[0.0, -0.4, 0.9]]))
    assert layer.bias.item() == pytest.approx(0.05)


def test_averaged_weights_follow_and_survive_storing():
    network = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    average = AveragedWeights(network, decay=0.9)
    before = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
        network[1].running_mean += 1
        network[1].num_batches_tracked += 7
    average.update(network)
    decay = 2 / 11  # (1 + t) / (10 + t) at the first update
    torch.testing.assert_close(average.weights()["0.weight"], before + (1 - decay))
    torch.testing.assert_close(average.weights()["1.running_mean"], torch.tensor([1 - decay]))
    assert average.weights()["1.num_batches_tracked"] == 7
    other = AveragedWeights(network, decay=0.9)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.weights(), average.weights())
