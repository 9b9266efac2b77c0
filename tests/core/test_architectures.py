from __future__ import annotations

import pytest
import torch

from imgbatch.core.architectures import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    build_network,
    default_preprocess,
    forward_features,
    head_module_name,
    replace_head,
)
from imgbatch.errors import UsageError

ONE_OF_EACH_FAMILY = [
    *("simple_cnn", "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18"),
    *("resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg11_bn"),
    *("vit_b_32", "wide_resnet50_2", "hog_color"),
]

NEEDS_GIGABYTES = ["regnet_x_16gf", "regnet_x_32gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"]
"""regnet cannot be built without its weights; its small ones are."""


def test_the_list_holds_every_classification_network_of_torchvision():
    from torchvision import models

    assert set(ARCHITECTURES) == {*models.list_models(module=models), "simple_cnn", "hog_color"}
    assert DEFAULT_ARCHITECTURE in ARCHITECTURES


def assert_a_state_dict_fills(network: torch.nn.Module) -> None:
    """A buffer outside the state dict would stay empty in a network that was built empty."""
    assert {name for name, _ in network.named_buffers()} <= set(network.state_dict())


@pytest.mark.parametrize("arch", ONE_OF_EACH_FAMILY)
def test_features_feed_a_head_of_any_width(arch: str):
    side = default_preprocess(arch).crop_size
    network = build_network(arch, 5, crop_size=side, empty=True).to("meta").eval()
    assert_a_state_dict_fills(network)
    images_BCHW = torch.empty(2, 3, side, side, device="meta")
    replace_head(network, arch, 7)
    seen = []
    network.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.shape))
    features_BD = forward_features(network, arch, images_BCHW)
    assert seen == [(2, 7)]
    assert features_BD.shape == (2, network.get_submodule(head_module_name(arch)).weight.shape[1])


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - set(ONE_OF_EACH_FAMILY) - set(NEEDS_GIGABYTES)))
def test_every_other_architecture_builds_with_its_head_last(arch: str):
    network = build_network(arch, 5, crop_size=default_preprocess(arch).crop_size, empty=True)
    weights = [name for name, tensor in network.state_dict().items() if tensor.ndim > 1]
    assert weights[-1] == f"{head_module_name(arch)}.weight"
    assert network.get_parameter(weights[-1]).shape[0] == 5
    assert_a_state_dict_fills(network)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "simple_cnn"])
def test_features_times_head_are_the_logits(arch: str):
    torch.manual_seed(0)
    network = build_network(arch, 4).eval()
    images_BCHW = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits_BK = network(images_BCHW)
        features_BD = forward_features(network, arch, images_BCHW)
        head = network.get_submodule(head_module_name(arch))
        torch.testing.assert_close(head(features_BD), logits_BK)
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    ("arch", "line"),
    [
        ("resnet18", "resize(256, bilinear) | center_crop(224)"),
        ("resnet50", "resize(232, bilinear) | center_crop(224)"),
        ("efficientnet_b3", "resize(320, bicubic) | center_crop(300)"),
        ("inception_v3", "resize(342, bilinear) | center_crop(299) | normalise(0.5, 0.5, 0.5; 0.5, 0.5, 0.5)"),
        ("vit_h_14", "resize(518, bicubic) | center_crop(518)"),
        ("simple_cnn", "resize(64, bilinear) | center_crop(64)"),
    ],
)
def test_preprocessing_is_what_the_weights_are_published_with(arch: str, line: str):
    assert line in default_preprocess(arch).describe()


def test_preprocessing_of_named_weights():
    assert default_preprocess("resnet50", "IMAGENET1K_V1").resize_size == 256
    assert default_preprocess("vit_b_16", "IMAGENET1K_SWAG_E2E_V1").crop_size == 384
    with pytest.raises(UsageError, match="no published weights 'IMAGENET1K_V9'; one of IMAGENET1K_V1, IMAGENET1K_V2"):
        default_preprocess("resnet50", "IMAGENET1K_V9")


def test_googlenet_normalises_as_its_published_network_does():
    from torchvision.models import GoogLeNet_Weights, googlenet

    torch.manual_seed(0)
    published = googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False, num_classes=3)
    ours = build_network("googlenet", 3)
    ours.load_state_dict(published.state_dict())
    pixels_BCHW = torch.rand(2, 3, 96, 96)

    def normalised(mean, std):
        return (pixels_BCHW - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    theirs, spec = GoogLeNet_Weights.DEFAULT.transforms(), default_preprocess("googlenet")
    with torch.inference_mode():
        expected_BK = published.eval()(normalised(theirs.mean, theirs.std))
        torch.testing.assert_close(ours.eval()(normalised(spec.mean, spec.std)), expected_BK)


@pytest.mark.parametrize(
    ("arch", "crop_size", "message"),
    [
        ("resnet19", None, "resnet19: unknown architecture; one of resnet101, resnet152, resnet18, resnet34, resnet50"),
        ("vit_b_16", 100, "crop_size 100 must be a multiple of its patches of 16 px"),
        ("maxvit_t", 256, "takes images of 224 px only"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(arch: str, crop_size: int | None, message: str):
    with pytest.raises(UsageError, match=message):
        build_network(arch, 3, crop_size=crop_size)
