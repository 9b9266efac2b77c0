from __future__ import annotations

import colorsys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from captum.robust import FGSM, PGD
from scipy.ndimage import gaussian_filter
from torch import nn

from imgbatch.core.attacks import fgsm, pgd
from imgbatch.core.bands import BandSpec
from imgbatch.core.corruptions import (
    BLUR_SIGMA,
    BRIGHTNESS_ADDED,
    CONTRAST_LEFT,
    CORRUPTIONS,
    JPEG_QUALITY,
    NOISE_STD,
    SEVERITIES,
    corrupt,
)
from imgbatch.core.model import load_network
from imgbatch.core.predict import Predictor
from imgbatch.core.robustness import EPSILONS, Subject, measure_robustness
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.weights import adapt_channels
from imgbatch.errors import UsageError
from imgbatch.report.plots import robustness_curves


@pytest.fixture(name="images_NHWC")
def draw_images() -> np.ndarray:
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 255, 32)[None, :, None, None] * rng.random((6, 1, 1, 3))
    return np.clip(smooth + rng.normal(0, 20, (6, 32, 32, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(name="attacked")
def prepare_attack(make_bundle, images_NHWC):
    """A subject, pixels from 0 to 1, their truth and its class indices."""
    pixels_BCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 255
    targets_B = torch.arange(6) % 3
    return Subject(make_bundle()), pixels_BCHW, nn.functional.one_hot(targets_B, 3).float(), targets_B


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_attacks_are_captums(attacked, epsilon):
    subject, pixels, truth, targets = attacked
    cross_entropy = nn.CrossEntropyLoss(reduction="none")
    theirs = FGSM(subject.logits, cross_entropy, lower_bound=0, upper_bound=1)
    theirs.zero_thresh = -1.0
    torch.testing.assert_close(fgsm(subject.loss(truth), pixels, epsilon), theirs.perturb(pixels, epsilon, targets))
    theirs = PGD(subject.logits, cross_entropy, lower_bound=0, upper_bound=1)
    theirs.fgsm.zero_thresh = -1.0
    expected = theirs.perturb(pixels, epsilon, 2.5 * epsilon / 10, 10, targets)
    torch.testing.assert_close(pgd(subject.loss(truth), pixels, epsilon), expected)


def test_attacks_stay_in_reach_and_raise_the_loss(attacked):
    subject, pixels, truth, _ = attacked
    loss, epsilon = subject.loss(truth), 4 / 255
    generator = torch.Generator().manual_seed(0)
    for found in (fgsm(loss, pixels, epsilon), pgd(loss, pixels, epsilon, generator=generator)):
        assert (found - pixels).abs().max() <= epsilon + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        assert loss(found) > loss(pixels)
    assert torch.equal(fgsm(loss, pixels, 0.0), pixels)


def test_the_subject_says_what_classification_says(make_bundle, images_NHWC):
    bundle = make_bundle(temperature=2.0)
    label_N = Predictor(bundle).predict(images_NHWC).probs_NK.argmax(axis=1)
    subject = Subject(bundle, batch_size=4)
    assert subject.is_right(images_NHWC, np.eye(3, dtype=np.float32)[label_N]).all()
    assert not subject.is_right(images_NHWC, np.eye(3, dtype=np.float32)[(label_N + 1) % 3]).any()


def test_multi_label_is_right_with_every_label(make_bundle, images_NHWC):
    bundle = make_bundle(task="multilabel", thresholds={"labels": {"cat": 0.3}})
    applies_NK = Predictor(bundle).predict(images_NHWC).probs_NK >= np.array([0.3, 0.5, 0.5])
    subject = Subject(bundle)
    assert subject.is_right(images_NHWC, applies_NK.astype(np.float32)).all()
    applies_NK[:, 1] ^= True
    assert not subject.is_right(images_NHWC, applies_NK.astype(np.float32)).any()
    assert not subject.withstands("pgd", 1 / 255, images_NHWC, applies_NK.astype(np.float32), 0).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_adds_to_the_value_of_hsv(images_NHWC, severity):
    images_NHWC[0, :4, :4] = 0
    found_NHWC = corrupt(images_NHWC, "brightness", severity)
    for n, h, w in np.random.default_rng(1).integers(0, [6, 32, 32], (200, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images_NHWC[n, h, w] / 255))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + BRIGHTNESS_ADDED[severity - 1], 1))
        np.testing.assert_allclose(found_NHWC[n, h, w], np.array(expected) * 255, atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_shrinks_the_spread_of_each_channel_around_its_mean(images_NHWC, severity):
    found_NHWC = corrupt(images_NHWC, "contrast", severity)
    mean = images_NHWC.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found_NHWC, mean + CONTRAST_LEFT[severity - 1] * (images_NHWC - mean), atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_noise_has_the_stated_spread_and_is_the_same_each_time(severity):
    grey = np.full((2, 64, 64, 3), 128, np.uint8)
    found = corrupt(grey, "gaussian_noise", severity, seed=3)
    std = NOISE_STD[severity - 1]
    noise = np.clip(128 / 255 + np.random.default_rng(9).normal(0, std, 10**5), 0, 1)
    assert (found / 255).std() == pytest.approx(noise.std(), rel=0.03)
    np.testing.assert_array_equal(found, corrupt(grey, "gaussian_noise", severity, seed=3))
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blur_is_gaussian(severity):
    side = 224
    image = np.zeros((1, side, side, 3), np.uint8)
    image[0, 80:140, 80:140] = 255
    expected = gaussian_filter(image[0].astype(float), (BLUR_SIGMA[severity - 1], BLUR_SIGMA[severity - 1], 0))
    assert np.abs(corrupt(image, "gaussian_blur", severity)[0] - expected).max() < 255 * 0.02


def test_jpeg_loses_more_with_each_severity(images_NHWC):
    loss = [np.abs(corrupt(images_NHWC, "jpeg", severity).astype(int) - images_NHWC).mean() for severity in SEVERITIES]
    assert loss == sorted(loss)
    assert list(JPEG_QUALITY) == sorted(JPEG_QUALITY, reverse=True)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_no_images_stay_none(name):
    assert corrupt(np.zeros((0, 8, 8, 3), np.uint8), name, 1).shape == (0, 8, 8, 3)


@pytest.mark.soak
def test_the_table_and_its_curves(photo_manifest, tiny_model, tmp_path):
    result = measure_robustness(tiny_model.path, str(photo_manifest), str(tmp_path), limit=12)
    assert result.num_failed == 1
    table = pq.read_table(tmp_path / "robustness.parquet").to_pylist()
    assert len(table) == len(result.rows) == 1 + 5 * 7
    assert (table[0]["perturbation"], table[0]["severity"], table[0]["strength"]) == ("clean", 0, None)
    for row in table:
        assert row["images"] == 11
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
    attacks = [row["accuracy"] for row in table if row["perturbation"] in ("fgsm", "pgd")]
    assert max(attacks) <= table[0]["accuracy"]
    assert robustness_curves(result.rows).startswith(b"\x89PNG")


def test_targets_that_the_model_does_not_know_are_no_use(photo_manifest, make_bundle, tmp_path):
    with pytest.raises(UsageError, match="no row has a target that the model knows"):
        measure_robustness(make_bundle().path, str(photo_manifest), str(tmp_path), limit=3)


def test_a_model_of_bands_is_refused_before_it_is_attacked(photo_manifest, make_bundle, tmp_path):
    grey = PreprocessSpec(32, 32, mean=(0.5,), std=(0.5,), bands=BandSpec((1,), (0.0,), (255.0,)))
    bundle = make_bundle(
        preprocess=grey, state_dict=adapt_channels("simple_cnn", load_network(make_bundle("rgb")).state_dict(), 1)
    )
    with pytest.raises(UsageError, match="its images have 1 bands; the corruptions are of RGB images"):
        measure_robustness(bundle.path, str(photo_manifest), str(tmp_path), limit=10)
