"""Images as files, and what decoding makes of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status

SPEC = PreprocessSpec(resize_size=8, crop_size=8)
MAX_PIXELS = 1_000_000
GREY = (90, 120, 150)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, spec: PreprocessSpec = SPEC) -> Decoded:
    outcome = decode_image(data, spec, max_pixels=MAX_PIXELS)
    assert isinstance(outcome, Decoded), outcome
    assert outcome.pixels_HWC.shape == (spec.crop_size, spec.crop_size, 3)
    assert outcome.pixels_HWC.dtype == np.uint8
    return outcome


def status(data: bytes, spec: PreprocessSpec = SPEC, max_pixels: int = MAX_PIXELS) -> Status:
    outcome = decode_image(data, spec, max_pixels=max_pixels)
    assert isinstance(outcome, RowError)
    assert outcome.stage is Stage.DECODE
    assert outcome.message
    return outcome.status


def assert_uniform(data: bytes, rgb: tuple[int, int, int], tolerance: int = 1) -> None:
    difference = decoded(data).pixels_HWC.astype(int) - rgb
    assert np.abs(difference).max() <= tolerance


def photograph(width: int = 64, height: int = 48) -> Image.Image:
    """Noise on a gradient, so that any shift or flip shows."""
    rng = np.random.default_rng(0)
    ramp_HW = np.linspace(0, 200, width)[None, :] + np.linspace(0, 40, height)[:, None]
    noise_HWC = rng.integers(0, 15, (height, width, 3))
    return Image.fromarray((ramp_HW[..., None] * (1.0, 0.7, 0.4) + noise_HWC).astype(np.uint8))
