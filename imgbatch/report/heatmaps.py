"""Heat maps over images: what the model says of each, what is true, and where it looked for either.

Legend of the shape suffixes: ``N`` images, ``H`` height, ``W`` width, ``C`` channel, ``K`` class.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from imgbatch.core.bands import visible_rgb
from imgbatch.core.explain import Explainer
from imgbatch.core.model import ModelBundle
from imgbatch.core.pictures import Pictures
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD
from imgbatch.report.explanations import Claim

PANEL_PX = 224
"""Least side of a panel: smaller crops are enlarged by a whole factor, each pixel as it is."""
_HEAT_SHARE = 0.55
"""Of the overlay, where the heat is strongest."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """An image as the model sees it and, to its right, where the model looked for each claim."""

    image_id: str
    claims: tuple[Claim, ...]
    """The label that the model says and, where that is wrong, the target; one or two."""
    picture_HWC: np.ndarray
    """uint8, 1 + len(claims) panels side by side."""


def draw_heat_maps(explainer: Explainer, bundle: ModelBundle, pictures: Pictures) -> Iterator[HeatMap]:
    """One for each of ``pictures``."""
    images_NHWC, shown_NHWC = pictures.images_NHWC, visible_rgb(pictures.images_NHWC)
    probs_NK = explainer.probabilities(images_NHWC)
    known = {name: index for index, name in enumerate(bundle.class_names)}
    stated = (bundle.thresholds or {}).get("labels", {})
    needed_K = np.array([stated.get(name, DEFAULT_LABEL_THRESHOLD) for name in bundle.class_names])
    is_multilabel = bundle.task == "multilabel"
    asked = []
    for probs_K, names in zip(probs_NK, pictures.targets, strict=True):
        true = None if names is None else {known[name] for name in names if name in known}
        asked.append(_ask_of_labels(probs_K, true, needed_K) if is_multilabel else _ask(probs_K, true))
    first_N, last_N = (np.array([classes[at] for classes in asked]) for at in (0, -1))
    heats = explainer.heat(images_NHWC, first_N), explainer.heat(images_NHWC, last_N)
    for row, image_id in enumerate(pictures.image_ids):
        names = pictures.targets[row]
        panels = [_enlarge(shown_NHWC[row], Image.Resampling.NEAREST)]
        claims = []
        for index, heat_NHW in zip(asked[row], heats, strict=False):
            name, probability = bundle.class_names[index], float(probs_NK[row, index])
            is_said = not is_multilabel or probability >= needed_K[index]
            claims.append(Claim(name, probability, _is_true(name, names, is_said=is_said)))
            panels.append(overlay(panels[0], _enlarge(heat_NHW[row], Image.Resampling.BILINEAR)))
        yield HeatMap(image_id, tuple(claims), np.concatenate(panels, axis=1))


def overlay(image_HWC: np.ndarray, heat_HW: np.ndarray) -> np.ndarray:
    """The image in grey with the heat in colour over it; uint8 HWC.

    Args:
        image_HWC: uint8.
        heat_HW: 0 to 1.
    """
    from matplotlib import colormaps

    grey_HW1 = image_HWC.mean(axis=2, keepdims=True)
    colour_HWC = colormaps["turbo"](heat_HW)[..., :3] * 255
    share_HW1 = _HEAT_SHARE * heat_HW[..., None]
    return np.clip(grey_HW1 * (1 - share_HW1) + colour_HWC * share_HW1, 0, 255).astype(np.uint8)


def encode_png(picture_HWC: np.ndarray) -> bytes:
    """The picture as a PNG file."""
    encoded = io.BytesIO()
    Image.fromarray(picture_HWC).save(encoded, "PNG")
    return encoded.getvalue()


def _ask(probs_K: np.ndarray, true: Collection[int] | None) -> list[int]:
    """The classes to ask about: the label, and the target where it is another one."""
    label = int(probs_K.argmax())
    return [label] if not true or label in true else [label, min(true)]


def _ask_of_labels(probs_K: np.ndarray, true: Collection[int] | None, needed_K: np.ndarray) -> list[int]:
    """Multi-label: of the labels said that are wrong the most probable, then of the targets missed the least probable.

    Where nothing is wrong the most probable of the labels said, or of all if none was said.

    Args:
        needed_K: the probability from which each label is said.
    """
    wrong = [] if true is None else [k for k in range(len(probs_K)) if k not in true and probs_K[k] >= needed_K[k]]
    missed = [k for k in true or () if probs_K[k] < needed_K[k]]
    asked = [max(wrong, key=lambda k: probs_K[k])] if wrong else []
    asked += [min(missed, key=lambda k: probs_K[k])] if missed else []
    return asked or [max(range(len(probs_K)), key=lambda k: (probs_K[k] >= needed_K[k], probs_K[k]))]


def _is_true(name: str, targets: Collection[str] | None, *, is_said: bool) -> bool | None:
    """As :class:`Claim` has it."""
    if targets is None or (name not in targets and not is_said):
        return None
    return name in targets


def _enlarge(values: np.ndarray, how: Image.Resampling) -> np.ndarray:
    """An image or a heat map with sides of at least :data:`PANEL_PX`."""
    factor = -(-PANEL_PX // min(values.shape[:2]))
    size = (values.shape[1] * factor, values.shape[0] * factor)
    return np.asarray(Image.fromarray(values).resize(size, how))
