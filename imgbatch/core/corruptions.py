"""Common corruptions of photographs at five severities.

After Hendrycks and Dietterich 2019 (ImageNet-C), with their strengths for images of 224 px; lengths scale with the
side of the image. Legend of the shape suffixes: ``N`` images, ``H`` height, ``W`` width, ``C`` channel.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SEVERITIES = (1, 2, 3, 4, 5)

NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Of values scaled to 0 to 1."""
BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)
"""px, of an image of 224 px."""
JPEG_QUALITY = (25, 18, 15, 10, 7)
BRIGHTNESS_ADDED = (0.1, 0.2, 0.3, 0.4, 0.5)
"""To the value of HSV, 0 to 1."""
CONTRAST_LEFT = (0.4, 0.3, 0.2, 0.1, 0.05)
"""Share of each channel's distance to its mean over the image."""

_BLUR_SIDE = 224


def corrupt(images_NHWC: np.ndarray, name: str, severity: int, *, seed: int = 0) -> np.ndarray:
    """The images, corrupted.

    Args:
        images_NHWC: uint8, three channels.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise; each image has its own.

    Returns:
        uint8 [N, H, W, C].
    """
    function = _FUNCTIONS[name]
    rngs = (np.random.default_rng([seed, index]) for index in range(len(images_NHWC)))
    corrupted = [function(image_HWC, severity - 1, rng) for image_HWC, rng in zip(images_NHWC, rngs, strict=True)]
    return np.stack(corrupted) if corrupted else images_NHWC.copy()


def _add_noise(image_HWC: np.ndarray, level: int, rng: np.random.Generator) -> np.ndarray:
    return _to_uint8(image_HWC / 255 + rng.normal(scale=NOISE_STD[level], size=image_HWC.shape))


def _blur(image_HWC: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    sigma = BLUR_SIGMA[level] * image_HWC.shape[0] / _BLUR_SIDE
    return np.asarray(Image.fromarray(image_HWC).filter(ImageFilter.GaussianBlur(sigma)))


def _compress(image_HWC: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    encoded = io.BytesIO()
    Image.fromarray(image_HWC).save(encoded, "JPEG", quality=JPEG_QUALITY[level])
    with Image.open(encoded) as image:
        return np.asarray(image)


def _brighten(image_HWC: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    # With hue and saturation kept, all channels grow as their largest does, which is the value of HSV.
    value_HW1 = image_HWC.max(axis=2, keepdims=True) / 255
    new_HW1 = np.minimum(value_HW1 + BRIGHTNESS_ADDED[level], 1)
    black_HW1 = value_HW1 == 0
    scaled_HWC = image_HWC / 255 * new_HW1 / np.where(black_HW1, 1, value_HW1)
    return _to_uint8(np.where(black_HW1, new_HW1, scaled_HWC))


def _flatten(image_HWC: np.ndarray, level: int, _: np.random.Generator) -> np.ndarray:
    mean_C = image_HWC.mean(axis=(0, 1), keepdims=True) / 255
    return _to_uint8((image_HWC / 255 - mean_C) * CONTRAST_LEFT[level] + mean_C)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


_FUNCTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "gaussian_noise": _add_noise,
    "gaussian_blur": _blur,
    "jpeg": _compress,
    "brightness": _brighten,
    "contrast": _flatten,
}

CORRUPTIONS = tuple(_FUNCTIONS)
