"""What only a GPU can show; all else is tested on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from imgbatch.config import DecodeConfig
from imgbatch.core.architectures import build_network
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.model import ModelBundle
from imgbatch.core.predict import Predictor
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import Stage, Status, UsageError
from tests.core.test_jpeg_header import jpeg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

MakeBundle = Callable[..., ModelBundle]


@pytest.fixture(name="bundle")
def make_resnet(make_bundle: MakeBundle) -> ModelBundle:
    torch.manual_seed(0)
    return make_bundle(
        arch="resnet18",
        preprocess=PreprocessSpec(resize_size=64, crop_size=64),
        state_dict=build_network("resnet18", 3).state_dict(),
    )


@pytest.fixture(name="images_NHWC")
def draw_images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def all_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_probabilities_and_features_are_those_of_the_cpu(bundle: ModelBundle, images_NHWC: np.ndarray):
    expected = Predictor(bundle, features=True).predict(images_NHWC)
    predictor = Predictor(bundle, device="cuda", batch_size=16, features=True)
    for _ in range(5):
        given = predictor.predict(images_NHWC)
        assert given.errors == [None] * len(images_NHWC)
        np.testing.assert_allclose(given.probs_NK, expected.probs_NK, atol=1e-4)
        np.testing.assert_allclose(given.features_ND, expected.features_ND, atol=1e-3)


def test_two_threads_get_what_one_gets(bundle: ModelBundle, images_NHWC: np.ndarray):
    calls = [np.roll(images_NHWC, shift, axis=0) for shift in range(20)]
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    predictor = Predictor(bundle, device="cuda", batch_size=64, features=True)
    with ThreadPoolExecutor(2) as threads:
        for shift, given in enumerate(threads.map(predictor.predict, calls)):
            assert given.errors == [None] * len(images_NHWC)
            np.testing.assert_allclose(given.probs_NK, np.roll(expected_NK, shift, axis=0), atol=1e-4)


def test_sixteen_bits_and_compiled_say_nearly_the_same(bundle: ModelBundle, images_NHWC: np.ndarray):
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    for options, atol in (
        ({"reduced": torch.bfloat16}, 0.05),
        ({"reduced": torch.float16}, 0.01),
        ({"compiled": True}, 1e-3),
    ):
        predictor = Predictor(bundle, device="cuda", batch_size=64, **options)
        given = predictor.predict(images_NHWC)
        assert given.errors == [None] * len(images_NHWC)
        assert predictor.batch_size == 64
        np.testing.assert_allclose(given.probs_NK, expected_NK, atol=atol)


def test_a_model_that_gives_no_numbers_gives_errors(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    weights = build_network("simple_cnn", 3).state_dict()
    weights["head.bias"][1] = float("nan")
    bundle = make_bundle(state_dict=weights, preprocess=PreprocessSpec(resize_size=64, crop_size=64))
    predictions = Predictor(bundle, device="cuda", batch_size=64).predict(images_NHWC)
    assert not predictions.probs_NK.any()
    assert {(error.status, error.stage) for error in predictions.errors} == {(Status.NON_FINITE, Stage.CLASSIFY)}


@pytest.mark.parametrize("options", [{"mode": "L"}, {"subsampling": 0}, {"subsampling": 0, "progressive": True}])
def test_pixels_of_whole_chroma_are_those_of_the_cpu(options: dict[str, object]):
    pytest.importorskip("torchcodec", reason="torchcodec is not installed (extra nvjpeg)")
    from imgbatch.core.gpu_decode import GpuDecoder

    spec, sizes = PreprocessSpec(resize_size=72, crop_size=64), [(300, 200), (90, 400), (64, 64), (500, 501)]
    images = [jpeg(size=size, quality=95, **options) for size in sizes]
    try:
        decoder = GpuDecoder(spec, DecodeConfig(), device="cuda")
    except UsageError as error:
        pytest.skip(str(error))
    with ThreadPoolExecutor(2) as threads:
        units = list(threads.map(lambda _: decoder.decode(images, sizes), range(8)))
    assert decoder._decoder.child_pid is None, "none of them is decoded on the CPU"
    for unit in units:
        assert unit.errors == [None] * len(images)
        for data, pixels_HWC in zip(images, unit.pixels_NHWC, strict=True):
            expected = decode_image(data, spec, max_pixels=10**8)
            assert isinstance(expected, Decoded)
            assert np.abs(pixels_HWC.astype(int) - expected.pixels_HWC).max() <= 2
