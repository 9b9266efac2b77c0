"""Writes the small rasters that tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin


def write_raster(path: Path, samples_CHW: np.ndarray, **options: Any) -> Path:
    """A GeoTIFF in UTM zone 33 with pixels of 10 m; ``options`` are rasterio's profile.

    ``scales``, ``offsets``, ``colorinterp`` and ``mask`` (bool HW, true where there are values) are set too.
    """
    extras = {name: options.pop(name) for name in ("scales", "offsets", "colorinterp", "mask") if name in options}
    count, height, width = samples_CHW.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": samples_CHW.dtype,
        "crs": "EPSG:32633",
        "transform": from_origin(500_000, 5_000_000, 10, 10),
        **options,
    }
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as scene:
        scene.write(samples_CHW)
        for name in ("scales", "offsets", "colorinterp"):
            if name in extras:
                setattr(scene, name, extras[name])
        if "mask" in extras:
            scene.write_mask(extras["mask"])
    return path


def noise(*shape: int, dtype: str = "uint16", high: int = 10_000, seed: int = 0) -> np.ndarray:
    """Random integers from 1, so that 0 can mean nodata."""
    return np.random.default_rng(seed).integers(1, high, shape).astype(dtype)
