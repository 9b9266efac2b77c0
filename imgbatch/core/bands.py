"""The bands of a raster as a model sees them: which, in what order, and how their values become 8 bits.

Reading is :mod:`imgbatch.core.rasters`; nothing here needs the extra ``geo``.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from imgbatch.errors import UsageError

Stretch = Literal["percentile", "deviation", "physical"]
MAX_BANDS = 1024
RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k")
"""What of a folder is a scene."""


@dataclass(frozen=True, slots=True)
class BandSpec:
    """``value = stored * scale + offset`` (as the raster states them); then ``low`` becomes 0 and ``high`` 255."""

    indices: tuple[int, ...]
    """Bands of the raster from 1, in the order of the model's channels; a manifest's ``bands`` column wins."""
    low: tuple[float, ...]
    """Per band, the value that becomes 0; what is lower becomes 0 too."""
    high: tuple[float, ...]
    """Per band, the value that becomes 255, above ``low``; what is higher becomes 255 too."""
    stretch: Stretch = "physical"
    """Where ``low`` and ``high`` come from: see ``config.GeoConfig.stretch``."""

    def __post_init__(self) -> None:
        if not 0 < len(self.indices) <= MAX_BANDS or not all(type(band) is int and band > 0 for band in self.indices):
            raise ValueError(f"bands: expected 1 to {MAX_BANDS} whole numbers from 1")
        if len(self.low) != len(self.indices) or len(self.high) != len(self.indices):
            raise ValueError("bands: low and high need one value per band each")
        limits = zip(self.low, self.high, strict=True)
        if not all(math.isfinite(low) and math.isfinite(high) and low < high for low, high in limits):
            raise ValueError("bands: every low must be below its high, both finite")
        if self.stretch not in get_args(Stretch):
            raise ValueError(f"bands: stretch must be one of {', '.join(get_args(Stretch))}")

    def describe(self) -> str:
        """As it stands in the line that describes a model's preprocessing."""
        shown = zip(self.indices[:4], self.low, self.high, strict=False)
        parts = [f"{band}: {low:g} to {high:g}" for band, low, high in shown]
        more = f", … {len(self.indices)} in all" if len(self.indices) > len(parts) else ""
        return f"bands({', '.join(parts)}{more}; {self.stretch})"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BandSpec:
        """From plain values; unknown keys raise ``TypeError``."""
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**plain)


def require_rasterio() -> None:
    """Raise :class:`UsageError` where the extra ``geo`` is not installed."""
    try:
        found = importlib.util.find_spec("rasterio") is not None
    except ValueError:  # somebody has put None in its place
        found = False
    if not found:
        raise UsageError("rasters are read by rasterio, which is not installed: pip install 'imgbatch[geo]'")


def visible_rgb(images_NHWC: np.ndarray) -> np.ndarray:
    """uint8 images of any number of bands as RGB for a person: the first three bands, or the first one as grey."""
    if images_NHWC.shape[-1] >= 3:
        return np.ascontiguousarray(images_NHWC[..., :3])
    return np.repeat(images_NHWC[..., :1], 3, axis=-1)
