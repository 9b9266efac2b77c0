"""Networks for any number of channels, and weights for RGB adapted to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from imgbatch.core.architectures import (
    ARCHITECTURES,
    HOG_COLOR,
    build_network,
    default_preprocess,
    first_convolution_name,
)
from imgbatch.core.model import init_bundle, load_bundle, load_network, save_bundle
from imgbatch.core.weights import adapt_channels, fit_network
from imgbatch.errors import UsageError
from tests.core.test_architectures import NEEDS_GIGABYTES, ONE_OF_EACH_FAMILY


@pytest.mark.parametrize("arch", sorted(set(ONE_OF_EACH_FAMILY) - {HOG_COLOR}))
def test_a_network_of_every_family_sees_five_bands(arch: str):
    side = default_preprocess(arch).crop_size
    network = build_network(arch, 4, crop_size=side, num_channels=5, empty=True).to("meta").eval()
    assert network(torch.empty(2, 5, side, side, device="meta")).shape == (2, 4)


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(NEEDS_GIGABYTES) - {HOG_COLOR}))
def test_the_first_convolution_is_the_only_layer_that_sees_the_channels(arch: str):
    network = build_network(arch, 4, crop_size=default_preprocess(arch).crop_size, empty=True)
    seeing = [name for name, layer in network.named_modules() if getattr(layer, "in_channels", 0) == 3]
    assert seeing == [first_convolution_name(arch)]


def test_hand_made_features_describe_rgb_only():
    with pytest.raises(UsageError, match="describes RGB, not 4 bands"):
        build_network(HOG_COLOR, 4, num_channels=4)


@pytest.mark.parametrize("num_channels", [1, 2, 4, 13])
def test_equal_bands_give_what_grey_gave_where_filters_are_spread(num_channels: int):
    torch.manual_seed(0)
    weights = build_network("resnet18", 3).state_dict()
    # Filters of one colour alone: then it does not matter how often each colour is repeated.
    weights["conv1.weight"] = weights["conv1.weight"][:, :1].repeat(1, 3, 1, 1)
    rgb = fit_network("resnet18", weights, crop_size=32, where="weights")
    adapted = adapt_channels("resnet18", weights, num_channels)
    bands = fit_network("resnet18", adapted, crop_size=32, where="weights")
    grey_BCHW = torch.rand(2, 1, 32, 32)
    with torch.inference_mode():
        logits = bands(grey_BCHW.expand(-1, num_channels, -1, -1)), rgb(grey_BCHW.expand(-1, 3, -1, -1))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)


def test_the_first_three_bands_keep_the_filters_of_red_green_and_blue():
    weights = build_network("simple_cnn", 3).state_dict()
    adapted = adapt_channels("simple_cnn", weights, 5)["features.0.weight"]
    given = weights["features.0.weight"]
    torch.testing.assert_close(adapted[:, :3], given * 3 / 5)
    torch.testing.assert_close(adapted[:, 3:], given[:, :2] * 3 / 5)
    assert adapt_channels("simple_cnn", weights, 3)["features.0.weight"] is given


@pytest.fixture
def rgb_weights(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("water\nforest\n")
    safetensors.torch.save_file(build_network("simple_cnn", 2).state_dict(), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


def test_a_bundle_for_bands_is_made_from_weights_for_rgb(tmp_path: Path, rgb_weights: str):
    parts = {"arch": "simple_cnn", "weights": rgb_weights, "classes": str(tmp_path / "classes.txt")}
    made = init_bundle(str(tmp_path / "m"), **parts, num_bands=4, value_range=(0, 10_000))
    bundle = load_bundle(made.path)
    assert bundle.preprocess.bands is not None
    assert bundle.preprocess.bands.indices == (1, 2, 3, 4)
    assert bundle.preprocess.num_channels == 4
    assert load_network(bundle)(torch.zeros(1, 4, 64, 64)).shape == (1, 2)
    with pytest.raises(UsageError, match="belong together"):
        init_bundle(str(tmp_path / "n"), **parts, num_bands=4)
    with pytest.raises(UsageError, match=r"--bands 4 --value-range 1,0: bands: every low"):
        init_bundle(str(tmp_path / "n"), **parts, num_bands=4, value_range=(1, 0))


def test_weights_of_another_number_of_channels_are_refused(tmp_path: Path, make_bundle):
    rgb = make_bundle()
    four = adapt_channels("simple_cnn", load_network(rgb).state_dict(), 4)
    with pytest.raises(UsageError, match="the weights take 4 channels, but preprocessing gives 3"):
        save_bundle(
            str(tmp_path / "four"),
            arch="simple_cnn",
            task="multiclass",
            class_names=rgb.class_names,
            preprocess=rgb.preprocess,
            state_dict=four,
        )
