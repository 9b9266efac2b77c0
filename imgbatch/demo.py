"""The demo: the whole job on images that it draws itself, so that it needs no data and no network.

draw -> build the manifest -> train -> classify -> verify

Every step leaves its product below the output directory and is skipped where that is there already, so the demo
resumes like the job it shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.architectures import SIMPLE_CNN
from imgbatch.core.drawing import CLASS_NAMES, draw_collection
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import CheckFailed, UsageError
from imgbatch.runtime.job import RunResult, classify
from imgbatch.runtime.train import train

LABELS_QUERY = (
    "select label, count(*) images, avg(probability) probability, avg((label = target)::int) accuracy "
    "from predictions where split = 'test' group by label order by accuracy desc, label"
)
"""The query that the demo shows."""

_ERRORS_QUERY = "select uri, status, error_message from errors order by uri"
_ACCURACY_QUERY = "select avg((label = target)::int) from predictions where split = 'test'"

# Small enough to learn in a minute or two on two cores.
_PREPROCESS = {"resize_size": 32, "crop_size": 32}
_TRAIN = {"arch": SIMPLE_CNN, "method": "from_scratch", "epochs": 30, "batch_size": 32, "learning_rate": 1e-2}
_AUGMENT = {"min_scale": 0.75, "color_jitter": 0.3}


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
class DemoResult:
    """What came out."""

    paths: DemoPaths
    run: RunResult
    accuracy: float
    """Share of the test split's predictions that are right, 0 to 1."""
    columns: list[str]
    rows: list[tuple[Any, ...]]
    """The answer to :data:`LABELS_QUERY`."""
    errors: list[tuple[str, str, str]]
    """uri, status and message of every row without a prediction."""


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
    with demo_session(config):
        with demo_step(console, f"training {SIMPLE_CNN} on the train split"):
            train(_train_config(config, paths, seed), console)
        with demo_step(console, "classifying every row of the manifest"):
            run = classify(_job_config(config, paths), console)
            if run.already_finished:
                console.print(f"run {run.run_id} is finished already, nothing to do", markup=False)
    with demo_step(console, "verifying that every row came out exactly once"):
        verify_demo(paths.labels)
    with closing(open_views(str(paths.labels))) as views:
        answer = views.execute(LABELS_QUERY)
        columns, rows = [column[0] for column in answer.description or ()], answer.fetchall()
        [(accuracy,)] = views.execute(_ACCURACY_QUERY).fetchall()
        errors = views.execute(_ERRORS_QUERY).fetchall()
    return DemoResult(paths, run, accuracy, columns, rows, errors)


def settle_demo(out: Path, settings: dict[str, int]) -> None:
    """Claim the output directory for these settings; raises :class:`UsageError` if it holds a demo of others."""
    stored = str(out / "demo.json")
    storage.create_if_absent(stored, storage.json_bytes(settings))
    if storage.read_json(stored) != settings:
        raise UsageError(f"output {out}: holds a demo of other images; remove it or give another -o")


def verify_demo(labels: Path) -> None:
    """Raise :class:`CheckFailed` unless every row of the job came out exactly once."""
    checks = verify(str(labels))
    if not checks.ok:
        failed = next(check for check in checks.checks if not check.ok)
        raise CheckFailed(f"{labels}: {failed.name}: {failed.detail}")


def demo_session(config: Config) -> AbstractContextManager[None]:
    """One Ray for training and classifying: starting a second would cost the seconds twice."""
    if config.classify.engine == "local":
        return nullcontext()
    from imgbatch.runtime.session import ray_session

    return ray_session(config)


def _train_config(config: Config, paths: DemoPaths, seed: int) -> Config:
    return config.model_copy(
        update={
            "input": config.input.model_copy(update={"manifest": str(paths.manifest)}),
            "preprocess": config.preprocess.model_copy(update=_PREPROCESS),
            "train": config.train.model_copy(update={**_TRAIN, "seed": seed}),
            "augment": config.augment.model_copy(update=_AUGMENT),
            # Some files are broken on purpose, and in a small demo they are many.
            "errors": config.errors.model_copy(update={"max_rate": 1.0}),
            "output": config.output.model_copy(update={"path": str(paths.model)}),
        }
    )


def _job_config(config: Config, paths: DemoPaths) -> Config:
    partition_by = config.output.partition_by or ("split",)
    return config.model_copy(
        update={
            "input": config.input.model_copy(update={"manifest": str(paths.manifest)}),
            "model": config.model.model_copy(update={"path": str(paths.model)}),
            "output": config.output.model_copy(update={"path": str(paths.labels), "partition_by": partition_by}),
        }
    )


@contextmanager
def demo_step(console: Console, what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    console.print(f"{what} …", markup=False)
    started = time.monotonic()
    yield
    console.print(f"… {time.monotonic() - started:.1f} s", markup=False)
