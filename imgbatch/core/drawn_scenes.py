"""The satellite demo's collection: scenes of fields, water, town and forest in four 16-bit bands, drawn.

Every scene is a function of ``(seed, index)`` alone: a map of irregular parcels, each of one class, filled with what
that class reflects in red, green, blue and near infrared, under light and haze that differ from scene to scene.
Needs the extra ``geo``.

Legend of shape suffixes: C band, H height, W width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.features import rasterize
from rasterio.warp import transform_geom

from imgbatch.core.tiling import LONGITUDE_LATITUDE

COVERS = ("field", "forest", "town", "water")
LABELS_FILE = "labels.geojson"
LABEL_FIELD = "class"

_CRS = "EPSG:32633"
_PIXEL_M = 10.0
_PARCEL_PX = 85
"""Side of a parcel, about."""
_SPLITS = ("train", "test", "validation", "train", "train", "train", "test", "train")
_GRID_PX = 8
"""Of streets in a town, and of the rows in a field."""

# Reflectance times 10,000 in red, green, blue and near infrared: the mean, and how much of it differs by pixel.
_REFLECTANCE: dict[str, tuple[tuple[float, ...], float]] = {
    "field": ((900, 1000, 600, 3400), 0.06),
    "forest": ((350, 550, 350, 3100), 0.22),
    "town": ((1600, 1500, 1400, 2100), 0.18),
    "water": ((300, 450, 600, 150), 0.05),
}


@dataclass(frozen=True, slots=True)
class DrawnScenes:
    """What :func:`draw_scenes` left on disk."""

    folder: Path
    """``<split>/scene-<index>.tif``."""
    truth: Path
    """Of the same names: the index in :data:`COVERS` of each pixel, uint8."""
    labels: Path
    """Every parcel as a polygon in longitude and latitude, its class under :data:`LABEL_FIELD`."""
    broken: Path
    """A scene whose file is cut short."""


def draw_scenes(folder: Path, *, num_scenes: int, side: int, seed: int) -> DrawnScenes:
    """Draw the scenes, the truth and the labels below ``folder``, and one broken scene on top of ``num_scenes``.

    Args:
        side: of a scene, px of 10 m.
    """
    scenes, truth = folder / "scenes", folder / "truth"
    features: list[dict[str, Any]] = []
    for index in range(num_scenes):
        split = _SPLITS[index % len(_SPLITS)]
        name = f"{split}/scene-{index}.tif"
        features += _draw_scene(scenes / name, truth / name, side, seed, index)
    labels = folder / LABELS_FILE
    labels.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    whole = next(scenes.glob("*/*.tif"))
    broken = scenes / "test" / "broken.tif"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes(whole.read_bytes()[:2000])
    return DrawnScenes(scenes, truth, labels, broken)


def _draw_scene(scene: Path, truth: Path, side: int, seed: int, index: int) -> list[dict[str, Any]]:
    """Write one scene and its truth; returns its parcels as GeoJSON features."""
    rng = np.random.default_rng((seed, index))
    place = Affine(_PIXEL_M, 0, 400_000 + 10_000 * index, 0, -_PIXEL_M, 5_500_000)
    parcels = _draw_parcels(rng, side)
    covers = rng.permutation(np.arange(len(parcels)) % len(COVERS))
    shape = (side, side)
    cover_HW = rasterize(zip(parcels, covers.tolist(), strict=True), shape, dtype="uint8", all_touched=True)
    parcel_HW = rasterize(zip(parcels, range(len(parcels)), strict=True), shape, dtype="uint8", all_touched=True)
    samples_CHW = _reflect(rng, cover_HW, parcel_HW)
    if index % 3 == 1:
        # What lies outside the satellite's swath.
        samples_CHW[:, :, : side // 6] = 0
    profile = {"driver": "GTiff", "width": side, "height": side, "crs": _CRS, "transform": place}
    profile |= {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "DEFLATE"}
    for path, bands_CHW, nodata in ((scene, samples_CHW, 0), (truth, cover_HW[None], 255)):
        path.parent.mkdir(parents=True, exist_ok=True)
        count, dtype = len(bands_CHW), bands_CHW.dtype
        with rasterio.open(path, "w", **profile, count=count, dtype=dtype, nodata=nodata) as target:
            target.write(bands_CHW)
            if path is scene:
                target.scales = (0.0001,) * count
    return [_feature(parcel, COVERS[cover], place) for parcel, cover in zip(parcels, covers, strict=True)]


def _draw_parcels(rng: np.random.Generator, side: int) -> list[Any]:
    """Irregular polygons that cover the scene, in pixels."""
    points = shapely.MultiPoint(rng.uniform(0, side, (round(side / _PARCEL_PX) ** 2, 2)))
    whole = shapely.box(0, 0, side, side)
    return [shapely.intersection(cell, whole) for cell in shapely.voronoi_polygons(points, extend_to=whole).geoms]


def _reflect(rng: np.random.Generator, cover_HW: np.ndarray, parcel_HW: np.ndarray) -> np.ndarray:
    """uint16 CHW from 1."""
    rows_HW, columns_HW = np.indices(cover_HW.shape)
    samples_CHW = np.zeros((4, *cover_HW.shape))
    for index, cover in enumerate(COVERS):
        mean_C, spread = _REFLECTANCE[cover]
        inside_HW = cover_HW == index
        texture_HW = 1 + spread * rng.standard_normal(cover_HW.shape)
        if cover == "town":
            streets_HW = (rows_HW % _GRID_PX < 2) | (columns_HW % _GRID_PX < 2)
            texture_HW *= np.where(streets_HW, 0.6, 1.15)
        elif cover == "field":
            # Every parcel has a crop and a direction of its own.
            vigour = rng.uniform(0.6, 1.3, parcel_HW.max() + 1)[parcel_HW]
            across = rng.integers(0, 2, parcel_HW.max() + 1)[parcel_HW]
            texture_HW *= vigour * (1 + 0.08 * ((np.where(across, rows_HW, columns_HW) % _GRID_PX) < 3))
        samples_CHW += np.array(mean_C)[:, None, None] * (texture_HW * inside_HW)
    light, haze_C = rng.uniform(0.8, 1.2), rng.uniform(0, 150) * np.array([0.6, 0.8, 1.0, 0.2])
    return np.clip(samples_CHW * light + haze_C[:, None, None], 1, 10_000).astype(np.uint16)


def _feature(parcel: Any, cover: str, place: Affine) -> dict[str, Any]:
    on_ground = shapely.transform(parcel, lambda points: points * (place.a, place.e) + (place.c, place.f))
    geometry = transform_geom(_CRS, LONGITUDE_LATITUDE, shapely.geometry.mapping(on_ground))
    return {"type": "Feature", "properties": {LABEL_FIELD: cover}, "geometry": geometry}
