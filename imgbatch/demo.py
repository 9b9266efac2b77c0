"""The demo: the whole job on images that it draws itself, so that it needs no data and no network.

draw -> build the manifest -> train -> classify -> verify
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from imgbatch.config import Config
from imgbatch.core.drawing import CLASS_NAMES, draw_collection
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.demo_steps import TRAIN, DemoJob, Labelled, demo_step, settle_demo, train_and_label

LABELS_QUERY = (
    "select label, count(*) images, avg(probability) probability, avg((label = target)::int) accuracy "
    "from predictions where split = 'test' group by label order by accuracy desc, label"
)
"""The query that the demo shows."""


@dataclass(frozen=True)
class DemoPaths:
    """What the demo leaves behind."""

    out: Path

    @property
    def images(self) -> Path:
        return self.out / "images"

    @property
    def manifest(self) -> Path:
        return self.out / "manifest.parquet"

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def labels(self) -> Path:
        return self.out / "labels"


@dataclass(frozen=True)
class DemoResult(Labelled):
    """What came out; ``errors`` start with the uri."""

    paths: DemoPaths


def run_demo(config: Config, *, num_images: int, seed: int, console: Console) -> DemoResult:
    """Draw ``num_images`` images and some broken files below ``config.output.path``, and label them all.

    Args:
        config: how the job runs; its manifest, model and output path are the demo's own.
        num_images: at least 30, so that every class has images in every split.
        console: where progress goes.

    Raises:
        UsageError: the output holds a demo of other images.
        CheckFailed: the job's output did not pass verification.
    """
    paths = DemoPaths(Path(str(config.output.path)))
    settle_demo(paths.out, {"num_images": num_images, "seed": seed})
    if not paths.manifest.exists():
        with demo_step(console, f"drawing {num_images:,} images of {', '.join(CLASS_NAMES)}"):
            draw_collection(paths.images, num_images=num_images, seed=seed)
            options = BuildOptions(targets_from="folder", split_from="folder")
            build_manifest([str(paths.images)], str(paths.manifest), options)
    job = DemoJob(
        manifest=paths.manifest,
        model=paths.model,
        labels=paths.labels,
        training={
            "preprocess": {"resize_size": 32, "crop_size": 32},
            "train": {**TRAIN, "epochs": 30, "batch_size": 32, "seed": seed},
            "augment": {"min_scale": 0.75, "color_jitter": 0.3},
            # Some files are broken on purpose, and in a small demo they are many.
            "errors": {"max_rate": 1.0},
        },
        classifying={"output": {"partition_by": config.output.partition_by or ("split",)}},
        query=LABELS_QUERY,
        unit="image",
        shown_id="uri",
    )
    return DemoResult(**vars(train_and_label(config, job, console)), paths=paths)
