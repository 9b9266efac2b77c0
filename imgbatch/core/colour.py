"""Any Pillow mode to 8-bit RGB: transparency composited, wide and float samples scaled, nothing clipped to white.

Legend of shape suffixes: H height, W width, C channel.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_TIFF_BITS_PER_SAMPLE = 258
_FLOAT_RANGES = (1.0, 255.0, 65535.0)
_INTEGER_RANGES = (65535.0,)
_DEEP_RGB_RAW_MODES = ("RGB;16B", "RGB;16L", "RGB;16N")
_SHALLOW_GREY_STEPS = {"L;2": 85, "L;4": 17}


class NoPixels(ValueError):
    """The file has samples, and none of them is a number."""


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """``image`` (any mode, loaded after :func:`fit_transparency`) as mode RGB; the same object where it is plain RGB.

    Args:
        background: RGB, 0 to 255, that transparent pixels are composited on.

    16-bit grey is scaled from 0..65535 (12-bit TIFF from 0..4095). 32-bit integers are read as 0..65535 and floats
    as 0..1, 0..255 or 0..65535, the smallest that holds the image's maximum, or else 0..maximum; negative values
    and NaN become 0.

    Raises:
        NoPixels: a float image without one finite value.
    """
    if image.mode.startswith("I;16"):
        return _grey_16(image, background)
    if image.mode in ("I", "F"):
        ranges = _INTEGER_RANGES if image.mode == "I" else _FLOAT_RANGES
        return Image.fromarray(scale_to_uint8(np.asarray(image), ranges)).convert("RGB")
    if image.has_transparency_data:
        return _composite(image.convert("RGBA"), background)
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_transparency(image: Image.Image) -> None:
    """Give the transparent colour of a freshly opened ``image`` the 8 bits that loading gives its samples.

    Pillow leaves it in the file's bits, which loading forgets.
    """
    transparent = image.info.get("transparency")
    for raw_mode in _raw_modes(image):
        if isinstance(transparent, tuple) and raw_mode in _DEEP_RGB_RAW_MODES:
            image.info["transparency"] = tuple(sample >> 8 for sample in transparent)
        elif isinstance(transparent, int) and raw_mode in _SHALLOW_GREY_STEPS:
            image.info["transparency"] = transparent * _SHALLOW_GREY_STEPS[raw_mode]


def _raw_modes(image: Image.Image) -> set[str]:
    modes: set[str] = set()
    for tile in image.tile:  # type: ignore[attr-defined]
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        modes.update(argument for argument in arguments if isinstance(argument, str))
    return modes


def _grey_16(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    values_HW = np.asarray(image).astype(np.uint32)
    full = (1 << _bits_per_sample(image)) - 1
    grey = Image.fromarray(np.minimum((values_HW * 255 + full // 2) // full, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey.convert("RGB")
    opaque = Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8))
    return _composite(Image.merge("LA", (grey, opaque)).convert("RGBA"), background)


def _bits_per_sample(image: Image.Image) -> int:
    tags = getattr(image, "tag_v2", {})
    return 12 if tuple(tags.get(_TIFF_BITS_PER_SAMPLE, ())) == (12,) else 16


def scale_to_uint8(values_HW: np.ndarray, ranges: tuple[float, ...]) -> np.ndarray:
    """Values of any shape, scaled from 0 to the first of ``ranges`` that holds their maximum, or else to that.

    Raises:
        NoPixels: not one finite value.
    """
    finite_HW = np.isfinite(values_HW)
    if not finite_HW.any():
        raise NoPixels("no finite value among the samples")
    highest = float(values_HW.max(where=finite_HW, initial=0))
    full = next((full for full in ranges if highest <= full), highest)
    scaled_HW = np.nan_to_num(values_HW.astype(np.float64), nan=0.0, posinf=full, neginf=0.0) * (255.0 / full)
    return np.clip(np.rint(scaled_HW), 0, 255).astype(np.uint8)


def _composite(image_rgba: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    alpha = image_rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image_rgba.convert("RGB")
    canvas = Image.new("RGB", image_rgba.size, background)
    canvas.paste(image_rgba, mask=alpha)
    return canvas
