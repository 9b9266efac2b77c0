from __future__ import annotations

import numpy as np
import pytest
import torch

from imgbatch.core.architectures import build_network, head_module_name
from imgbatch.core.explain import Explainer
from imgbatch.core.model import load_network
from imgbatch.core.predict import Predictor
from imgbatch.core.transforms import PreprocessSpec

SIDE = 64


def _bundle(make_bundle, arch: str, side: int = SIDE):
    torch.manual_seed(0)
    network = build_network(arch, 3, crop_size=side)
    # Some are published with a head of zeros, through which no gradient flows.
    torch.nn.init.normal_(network.get_submodule(head_module_name(arch)).weight)
    spec = PreprocessSpec(resize_size=side, crop_size=side)
    return make_bundle(arch, arch=arch, preprocess=spec, state_dict=network.state_dict())


@pytest.fixture(name="images_NHWC")
def draw_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)


@pytest.mark.parametrize("arch", ["simple_cnn", "resnet18", "squeezenet1_1", "swin_t", "vit_b_32"])
def test_heat_lies_over_the_image_and_depends_on_the_class(make_bundle, images_NHWC, arch):
    explainer = Explainer(_bundle(make_bundle, arch), batch_size=3)
    heats = [explainer.heat(images_NHWC, np.full(4, index)) for index in range(3)]
    for heat_NHW in heats:
        assert heat_NHW.shape == (4, SIDE, SIDE)
        assert heat_NHW.dtype == np.float32
        assert heat_NHW.min() >= 0
        assert set(np.round(heat_NHW.max(axis=(1, 2)), 5)) <= {0.0, 1.0}
    assert len({heat_NHW.tobytes() for heat_NHW in heats}) > 1


def test_it_is_grad_cam_as_published(make_bundle, images_NHWC):
    bundle = _bundle(make_bundle, "resnet18")
    network, kept = load_network(bundle), {}
    network.layer4.register_forward_hook(lambda _, __, output: kept.update(maps=output))
    mean, std = (torch.tensor(v)[:, None, None] for v in (bundle.preprocess.mean, bundle.preprocess.std))
    logits_NK = network((torch.from_numpy(images_NHWC).permute(0, 3, 1, 2) / 255 - mean) / std)
    gradient_NCHW = torch.autograd.grad(logits_NK[:, 1].sum(), kept["maps"])[0]
    weight_NC11 = gradient_NCHW.mean(dim=(2, 3), keepdim=True)
    coarse_N1HW = (weight_NC11 * kept["maps"]).sum(dim=1, keepdim=True).relu()
    heat_NHW = torch.nn.functional.interpolate(coarse_N1HW, (SIDE, SIDE), mode="bilinear")[:, 0]
    expected_NHW = heat_NHW / heat_NHW.amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    found_NHW = Explainer(bundle).heat(images_NHWC, np.ones(4, np.int64))
    np.testing.assert_allclose(found_NHW, expected_NHW.detach().numpy(), atol=1e-4)


def test_probabilities_are_those_of_classification(make_bundle, images_NHWC):
    bundle = _bundle(make_bundle, "resnet18")
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    np.testing.assert_allclose(Explainer(bundle).probabilities(images_NHWC), expected_NK, atol=1e-6)


def test_no_images_no_heat(make_bundle, images_NHWC):
    assert Explainer(_bundle(make_bundle, "resnet18")).heat(images_NHWC[:0], np.zeros(0, np.int64)).shape == (0, 64, 64)
