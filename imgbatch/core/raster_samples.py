"""What a raster holds in a window, and how samples become 8 bits. Needs the extra ``geo``.

Legend of shape suffixes: H height, W width, C channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import rasterio.windows
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.io import DatasetReader

from imgbatch.core.bands import BandSpec
from imgbatch.core.colour import scale_to_uint8
from imgbatch.core.raster_request import Window
from imgbatch.errors import Status

_FLOAT_RANGES = (1.0, 255.0, 65535.0)
_INTEGER_RANGES = (65535.0,)
_INT8_RANGES = (127.0,)
_EXIF_ORIENTATIONS = frozenset("12345678")
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class RasterRejected(Exception):
    """The outcome is known: ends the reading of one window."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Samples:
    """Part of a raster as it is stored, perhaps at a fraction of its resolution."""

    stored_CHW: np.ndarray
    """In the raster's own type."""
    missing_CHW: np.ndarray | None
    """bool, where there is no value (nodata, mask, alpha 0, NaN); none: nowhere."""
    scales_C: tuple[float, ...]
    offsets_C: tuple[float, ...]
    """The value is ``stored * scale + offset``."""

    def values(self) -> np.ndarray:
        """float64 CHW, NaN where missing."""
        scales, offsets = (np.array(per_band)[:, None, None] for per_band in (self.scales_C, self.offsets_C))
        values_CHW = self.stored_CHW * scales + offsets
        if self.missing_CHW is not None:
            values_CHW[self.missing_CHW] = np.nan
        return values_CHW

    @property
    def missing_share(self) -> float:
        """Share of the samples that are missing, 0 to 1."""
        return 0.0 if self.missing_CHW is None else float(self.missing_CHW.mean())


def default_bands(scene: DatasetReader) -> tuple[int, ...]:
    """Red, green and blue where the raster names them, else its first three bands, or the first one for grey."""
    interpretations = list(scene.colorinterp)
    if all(colour in interpretations for colour in _RGB):
        return tuple(interpretations.index(colour) + 1 for colour in _RGB)
    plain = all_bands(scene)
    return plain[:3] if len(plain) >= 3 else plain[:1]


def all_bands(scene: DatasetReader) -> tuple[int, ...]:
    """Every band but alpha; the first where there is nothing else."""
    bands = [band for band, colour in zip(scene.indexes, scene.colorinterp, strict=True) if colour != ColorInterp.alpha]
    return tuple(bands) or (1,)


def read_samples(scene: DatasetReader, window: Window, bands: Sequence[int], *, step: int = 1) -> Samples:
    """What is stored in a window, and where nothing is.

    Args:
        step: read at ``1 / step`` of the resolution, averaged.

    Raises:
        RasterRejected: complex numbers.
        RasterioError: a block cannot be read.
    """
    if any(np.dtype(scene.dtypes[band - 1]).kind == "c" for band in bands):
        raise RasterRejected(Status.UNSUPPORTED_FORMAT, "complex numbers")
    part = rasterio.windows.Window(*window)
    options: dict[str, Any] = {"window": part}
    if step > 1:
        shape = (-(-window.height // step), -(-window.width // step))
        options |= {"out_shape": (len(bands), *shape), "resampling": Resampling.average}
    stored_CHW = scene.read(list(bands), **options)
    return Samples(
        stored_CHW,
        _missing(scene, bands, stored_CHW, options),
        tuple(scene.scales[band - 1] for band in bands),
        tuple(scene.offsets[band - 1] for band in bands),
    )


def stretch(samples: Samples, bands: BandSpec) -> np.ndarray:
    """uint8 CHW: see :class:`BandSpec`; what is missing becomes anything."""
    pixels_CHW = np.empty(samples.stored_CHW.shape, np.uint8)
    for channel, stored_HW in enumerate(samples.stored_CHW):
        factor = 255.0 / (bands.high[channel] - bands.low[channel])
        slope = samples.scales_C[channel] * factor
        shift = (samples.offsets_C[channel] - bands.low[channel]) * factor
        if stored_HW.dtype.kind in "iu" and stored_HW.dtype.itemsize <= 2:
            codes_HW = stored_HW.view(np.uint8 if stored_HW.dtype.itemsize == 1 else np.uint16)
            np.take(_lookup_table(stored_HW.dtype.str, slope, shift), codes_HW, out=pixels_CHW[channel])
        else:
            scaled_HW = np.nan_to_num(stored_HW.astype(np.float64)) * slope + shift
            pixels_CHW[channel] = np.clip(np.rint(scaled_HW), 0, 255)
    return pixels_CHW


def north_up(scene: DatasetReader, pixels_CHW: np.ndarray) -> np.ndarray:
    """Mirrored where rows run north or columns run west; a raster without a CRS stays as it is stored."""
    if scene.crs is None:
        return pixels_CHW
    turn = scene.transform
    if turn.e > 0 and abs(turn.e) > abs(turn.d):
        pixels_CHW = pixels_CHW[:, ::-1]
    if turn.a < 0 and abs(turn.a) > abs(turn.b):
        pixels_CHW = pixels_CHW[:, :, ::-1]
    return pixels_CHW


def exif_orientation(scene: DatasetReader) -> int:
    """How a JPEG says that it is stored, 1 to 8; 1 is upright, which everything else is taken for."""
    if scene.driver != "JPEG":
        return 1
    orientation = scene.tags().get("EXIF_Orientation", "")
    return int(orientation) if orientation in _EXIF_ORIENTATIONS else 1


def turned(pixels_CHW: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, of pixels whose EXIF orientation is ``orientation``."""
    if orientation >= 5:
        pixels_CHW = pixels_CHW.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        pixels_CHW = pixels_CHW[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels_CHW = pixels_CHW[:, :, ::-1]
    return pixels_CHW


@lru_cache(maxsize=256)
def _lookup_table(dtype: str, slope: float, shift: float) -> np.ndarray:
    """Every value of an integer type stretched to uint8, in the order of its bit patterns."""
    item = np.dtype(dtype)
    values = np.arange(1 << (8 * item.itemsize), dtype=np.uint8 if item.itemsize == 1 else np.uint16).view(item)
    return np.clip(np.rint(values * slope + shift), 0, 255).astype(np.uint8)


def as_rgb(scene: DatasetReader, samples: Samples, bands: Sequence[int]) -> np.ndarray:
    """uint8 CHW: colours of a palette, grey three times, and samples of other than 8 bits scaled.

    From 0 to the largest value of their bits where these are fewer than 16, and else as in :mod:`imgbatch.core.colour`.
    """
    stored_CHW = samples.stored_CHW
    if len(bands) == 1 and scene.colorinterp[bands[0] - 1] == ColorInterp.palette:
        palette = scene.colormap(bands[0])
        table = np.array([palette.get(code, (0, 0, 0, 255))[:3] for code in range(256)], np.uint8)
        return np.ascontiguousarray(table[stored_CHW[0]].transpose(2, 0, 1))
    if ranges := _ranges(scene, bands[0], stored_CHW.dtype):
        if samples.missing_CHW is not None:
            stored_CHW = np.where(samples.missing_CHW, 0, stored_CHW)
        stored_CHW = scale_to_uint8(stored_CHW, ranges)
    return np.repeat(stored_CHW, 3, axis=0) if len(bands) == 1 else stored_CHW


def _ranges(scene: DatasetReader, band: int, dtype: np.dtype) -> tuple[float, ...]:
    """What samples are scaled from, for ``scale_to_uint8``; empty: they are 8 bits already."""
    if dtype.kind == "f":
        return _FLOAT_RANGES
    if dtype == np.int8:
        return _INT8_RANGES
    bits = int(scene.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8 * dtype.itemsize))
    if dtype == np.uint8 and bits == 8:
        return ()
    # Sentinel-2's JPEG 2000 files say 15, and the same scenes as GeoTIFF say nothing: both are to look alike.
    return (2.0**bits - 1,) if bits < 15 else _INTEGER_RANGES


def _missing(
    scene: DatasetReader, bands: Sequence[int], stored_CHW: np.ndarray, options: dict[str, Any]
) -> np.ndarray | None:
    missing_CHW: np.ndarray | None = None
    flags = {flag for band in bands for flag in scene.mask_flag_enums[band - 1]}
    if flags - {MaskFlags.all_valid}:
        if flags == {MaskFlags.nodata} and stored_CHW.dtype.kind in "iu" and "resampling" not in options:
            nodata = [scene.nodatavals[band - 1] for band in bands]
            missing_CHW = np.stack([band_HW == value for band_HW, value in zip(stored_CHW, nodata, strict=True)])
        else:
            missing_CHW = scene.read_masks(list(bands), **options) == 0
    if stored_CHW.dtype.kind == "f":
        unknown_CHW = ~np.isfinite(stored_CHW)
        if unknown_CHW.any():
            missing_CHW = unknown_CHW if missing_CHW is None else missing_CHW | unknown_CHW
    return missing_CHW if missing_CHW is not None and missing_CHW.any() else None
