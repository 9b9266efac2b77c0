"""The satellite demo: scenes that it draws itself, labelled tile by tile and put back on the map.

draw -> tile -> train -> classify -> verify -> mosaic -> score
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rich.console import Console

from imgbatch.config import Config
from imgbatch.core.drawn_scenes import COVERS, LABEL_FIELD, LABELS_FILE, draw_scenes
from imgbatch.core.mosaic import write_mosaics
from imgbatch.core.rasters import gdal_env
from imgbatch.core.tiling import TileOptions, tile_scenes
from imgbatch.core.vector_labels import VectorLabels
from imgbatch.demo_steps import TRAIN, DemoJob, Labelled, demo_step, settle_demo, train_and_label

COVER_QUERY = (
    "select label, count(*) tiles, avg(probability) probability, avg((label = target)::int) accuracy "
    "from predictions where split = 'test' group by label order by label"
)
"""The query that the demo shows."""

SCENE_PX = 512

# Small enough to learn in a minute or two on two cores.
_TILE_PX = 32
_OVERLAP = 0.25


@dataclass(frozen=True)
class SatelliteDemoPaths:
    """What the demo leaves behind."""

    out: Path

    @property
    def collection(self) -> Path:
        """``scenes``, ``truth`` and the drawn labels."""
        return self.out / "collection"

    @property
    def tiles(self) -> Path:
        return self.out / "tiles.parquet"

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def labels(self) -> Path:
        return self.out / "labels"

    @property
    def mosaic(self) -> Path:
        return self.out / "mosaic"


@dataclass(frozen=True)
class SatelliteDemoResult(Labelled):
    """What came out; ``accuracy`` is the tiles', ``errors`` start with the image_id."""

    paths: SatelliteDemoPaths
    pixel_accuracy: float
    """Share of the test scenes' pixels whose label in the mosaic is true, 0 to 1."""


def run_satellite_demo(
    config: Config, *, num_scenes: int, seed: int, console: Console, scene_px: int = SCENE_PX
) -> SatelliteDemoResult:
    """Draw ``num_scenes`` scenes and a broken one below ``config.output.path``, and label them all.

    Args:
        config: how the job runs; its manifest, model and output path are the demo's own.
        num_scenes: at least 3, so that every split has one.
        console: where progress goes.
        scene_px: side of a scene.

    Raises:
        UsageError: the output holds a demo of other scenes.
        CheckFailed: the job's output did not pass verification.
    """
    paths = SatelliteDemoPaths(Path(str(config.output.path)))
    settle_demo(paths.out, {"num_scenes": num_scenes, "scene_px": scene_px, "seed": seed})
    if not paths.tiles.exists():
        with demo_step(console, f"drawing {num_scenes:,} scenes of {', '.join(COVERS)}"), gdal_env():
            draw_scenes(paths.collection, num_scenes=num_scenes, side=scene_px, seed=seed)
        with demo_step(console, f"cutting them into tiles of {_TILE_PX} px"):
            labels = VectorLabels(str(paths.collection / LABELS_FILE), LABEL_FIELD)
            options = TileOptions(size=_TILE_PX, overlap=_OVERLAP, min_valid=0.5, labels=labels, split_from="folder")
            tally = tile_scenes([str(paths.collection / "scenes")], str(paths.tiles), options)
            console.print(f"{tally.num_tiles:,} tiles, {tally.num_left_out:,} left out", markup=False)
    job = DemoJob(
        manifest=paths.tiles,
        model=paths.model,
        labels=paths.labels,
        training={
            "preprocess": {"resize_size": _TILE_PX, "crop_size": _TILE_PX},
            "train": {**TRAIN, "epochs": 4, "batch_size": 64, "seed": seed},
            "augment": {"min_scale": 1.0, "flip": "all", "color_jitter": 0.1, "band_dropout": 0.05},
            "geo": {"bands": "all"},
        },
        classifying={},
        query=COVER_QUERY,
        unit="tile",
        shown_id="image_id",
    )
    labelled = train_and_label(config, job, console)
    with demo_step(console, "burning the labels into a map of every scene"):
        write_mosaics(str(paths.labels), str(paths.mosaic))
    return SatelliteDemoResult(**vars(labelled), paths=paths, pixel_accuracy=_score_pixels(paths))


def _score_pixels(paths: SatelliteDemoPaths) -> float:
    right = known = 0
    for truth in sorted((paths.collection / "truth" / "test").glob("*.tif")):
        with rasterio.open(truth) as drawn, rasterio.open(paths.mosaic / "test" / f"{truth.stem}.labels.tif") as mapped:
            labels_HW = mapped.read(1)
            labelled_HW = labels_HW != mapped.nodata
            right += int((labels_HW == drawn.read(1))[labelled_HW].sum())
            known += int(labelled_HW.sum())
    return right / np.maximum(known, 1)
