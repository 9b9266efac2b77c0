from __future__ import annotations

import numpy as np
import pytest

from imgbatch.core.pictures import Pictures
from imgbatch.report.explanations import Claim
from imgbatch.report.heatmaps import draw_heat_maps, overlay

pytest.importorskip("matplotlib", reason="the explain extra is not installed")

SIDE = 30


class Fixed:
    """An explainer that is told what to say; its heat is as strong as the class's index."""

    def __init__(self, probs_NK: np.ndarray) -> None:
        self.probs_NK = probs_NK

    def probabilities(self, _: np.ndarray) -> np.ndarray:
        return self.probs_NK

    def heat(self, images_NHWC: np.ndarray, class_index_N: np.ndarray) -> np.ndarray:
        heat_NHW = np.zeros(images_NHWC.shape[:3], np.float32)
        return heat_NHW + class_index_N[:, None, None].astype(np.float32) / 2


def drawn(bundle, probs: list[float], targets: list[str] | None):
    images_NHWC = np.full((1, SIDE, SIDE, 3), 100, np.uint8)
    pictures = Pictures(["one"], [targets], images_NHWC, {}, np.zeros(1, bool))
    [heat_map] = draw_heat_maps(Fixed(np.array([probs], np.float32)), bundle, pictures)
    return heat_map


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (None, [("dog", None)]),
        (["bat"], [("dog", False)]),
        (["dog"], [("dog", True)]),
        (["owl"], [("dog", False), ("owl", True)]),
    ],
    ids=["unknown", "no class of the model's", "right", "wrong"],
)
def test_an_image_is_asked_about_its_label_and_about_the_target_if_that_is_another(make_bundle, targets, said):
    heat_map = drawn(make_bundle(), [0.125, 0.75, 0.125], targets)
    assert [(claim.class_name, claim.is_true) for claim in heat_map.claims] == said
    assert heat_map.claims[0].probability == 0.75


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["cat", "dog"], [("cat", True)]),
        (["owl"], [("cat", False), ("owl", True)]),
        ([], [("cat", False)]),
        (["cat", "dog", "owl"], [("owl", True)]),
    ],
    ids=["right", "said and missed", "nothing is true", "missed"],
)
def test_several_labels_are_asked_about_the_worst_on_either_side(make_bundle, targets, said):
    heat_map = drawn(make_bundle(task="multilabel"), [0.875, 0.75, 0.25], targets)
    assert [(claim.class_name, claim.is_true) for claim in heat_map.claims] == said


def test_a_label_is_said_from_its_own_threshold(make_bundle):
    bundle = make_bundle(task="multilabel", thresholds={"labels": {"cat": 0.9, "owl": 0.2}})
    for targets, said in (
        (["dog", "owl"], [("dog", True)]),
        (["cat"], [("dog", False), ("cat", True)]),
        (["dog"], [("owl", False)]),
    ):
        heat_map = drawn(bundle, [0.875, 0.75, 0.25], targets)
        assert [(claim.class_name, claim.is_true) for claim in heat_map.claims] == said


@pytest.mark.parametrize("targets", [[], None])
def test_what_nobody_says_is_neither_right_nor_wrong(make_bundle, targets):
    heat_map = drawn(make_bundle(task="multilabel"), [0.25, 0.375, 0.125], targets)
    assert [(claim.class_name, claim.is_true) for claim in heat_map.claims] == [("dog", None)]


def test_panels_stand_side_by_side_and_small_images_are_enlarged(make_bundle):
    picture_HWC = drawn(make_bundle(), [0.125, 0.75, 0.125], ["owl"]).picture_HWC
    side = 8 * SIDE
    assert picture_HWC.shape == (side, 3 * side, 3)
    assert picture_HWC.dtype == np.uint8
    panels = [picture_HWC[:, start : start + side] for start in range(0, 3 * side, side)]
    assert (panels[0] == 100).all()
    assert not np.array_equal(panels[1], panels[2])


def test_without_heat_an_overlay_is_the_grey_image():
    image_HWC = np.zeros((4, 4, 3), np.uint8)
    image_HWC[..., 0] = 90
    assert (overlay(image_HWC, np.zeros((4, 4), np.float32)) == 30).all()


def test_captions_mark_what_is_true():
    captions = [Claim("mug", 0.984, is_true).caption for is_true in (True, False, None)]
    assert captions == ["✓ mug 0.98", "✗ mug 0.98", "mug 0.98"]


@pytest.mark.parametrize("num_bands", [1, 2, 4, 13])
def test_any_number_of_bands_is_drawn(make_bundle, num_bands):
    images_NHWC = np.full((1, SIDE, SIDE, num_bands), 100, np.uint8)
    pictures = Pictures(["one"], [None], images_NHWC, {}, np.zeros(1, bool))
    [heat_map] = draw_heat_maps(Fixed(np.array([[0.125, 0.75, 0.125]], np.float32)), make_bundle(), pictures)
    assert heat_map.picture_HWC.shape[2] == 3
