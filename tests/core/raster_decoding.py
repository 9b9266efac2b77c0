"""Rasters decoded as the child does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from imgbatch.core.bands import BandSpec
from imgbatch.core.images import Decoded
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.rasters import RasterDecoder
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError
from tests.core.encoding import encode
from tests.rasters import noise

MAX_PIXELS = 120_000_000
RGB = PreprocessSpec(resize_size=16, crop_size=16)


def bands_spec(low: float, high: float, *indices: int, side: int = 16, mean: float = 0.5) -> PreprocessSpec:
    count = len(indices)
    spec = BandSpec(indices, (low,) * count, (high,) * count)
    return PreprocessSpec(resize_size=side, crop_size=side, mean=(mean,) * count, std=(0.25,) * count, bands=spec)


def decode(path: Path, spec: PreprocessSpec, window: Window | None = None, **request) -> Decoded | RowError:
    decoder = RasterDecoder(spec, max_pixels=MAX_PIXELS, max_nodata=0.5)
    return decoder.decode(RasterRequest(str(path), window, **request))


def pixels(path: Path, spec: PreprocessSpec, window: Window | None = None, **request) -> np.ndarray:
    outcome = decode(path, spec, window, **request)
    assert isinstance(outcome, Decoded), outcome
    return outcome.pixels_HWC


def failure(path: Path, spec: PreprocessSpec = RGB, window: Window | None = None, **request) -> RowError:
    outcome = decode(path, spec, window, **request)
    assert isinstance(outcome, RowError), outcome
    return outcome


def stretched(values_CHW: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(np.rint((values_CHW.astype(np.float64) - low) * 255 / (high - low)), 0, 255).transpose(1, 2, 0)


ENCODED = {"JPEG": {"quality": 95}, "PNG": {}}


def encoded(kind: str, size: int = 128, **options) -> bytes:
    samples_CHW = noise(3, size, size, dtype="uint8", high=255)
    image = Image.fromarray(np.ascontiguousarray(samples_CHW.transpose(1, 2, 0)))
    return encode(image, kind, **ENCODED[kind], **options)
