"""The demo: the whole job on images that it draws itself, so that it needs no data and no network.

draw -> build the manifest -> train a small network -> classify -> verify

Every step leaves its product below the output directory and is skipped where that is there already, so the demo
resumes like the job it shows.

Shape suffixes: N image, B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor, nn

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.architectures import SIMPLE_CNN, build_network
from imgbatch.core.drawing import CLASS_NAMES, draw_collection
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from imgbatch.core.model import DESCRIPTION_FILE, save_bundle
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import CheckFailed, UsageError
from imgbatch.runtime.job import RunResult, classify

LABELS_QUERY = (
    "select label, count(*) images, avg(probability) probability, avg((label = target)::int) accuracy "
    "from predictions where split = 'test' group by label order by accuracy desc"
)
"""The query that the demo shows."""

_ERRORS_QUERY = "select uri, status, error_message from errors order by uri"
_ACCURACY_QUERY = "select avg((label = target)::int) from predictions where split = 'test'"

# Small enough to learn in a minute on two cores; the network sees about two thirds of such an image at once.
_CROP_SIZE = 32
_NUM_EPOCHS = 40
_BATCH_SIZE = 32
_LEARNING_RATE = 1e-2
_MAX_SHIFT = 3


@dataclass(frozen=True)
class DemoPaths:
    """What the demo leaves behind."""

    out: Path

    @property
    def settings(self) -> Path:
        return self.out / "demo.json"

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
    _settle(paths, {"num_images": num_images, "seed": seed})
    if not paths.manifest.exists():
        with _step(console, f"drawing {num_images:,} images of {', '.join(CLASS_NAMES)}"):
            draw_collection(paths.images, num_images=num_images, seed=seed)
            options = BuildOptions(targets_from="folder", split_from="folder")
            build_manifest([str(paths.images)], str(paths.manifest), options)
    if not (paths.model / DESCRIPTION_FILE).exists():
        with _step(console, f"training {SIMPLE_CNN} on the train split"):
            _train_model(paths, seed)
    with _step(console, "classifying every row of the manifest"):
        run = classify(_job_config(config, paths), console)
        if run.already_finished:
            console.print(f"run {run.run_id} is finished already, nothing to do", markup=False)
    with _step(console, "verifying that every row came out exactly once"):
        checks = verify(str(paths.labels))
        if not checks.ok:
            failed = next(check for check in checks.checks if not check.ok)
            raise CheckFailed(f"{paths.labels}: {failed.name}: {failed.detail}")
    with closing(open_views(str(paths.labels))) as views:
        answer = views.execute(LABELS_QUERY)
        columns, rows = [column[0] for column in answer.description or ()], answer.fetchall()
        [(accuracy,)] = views.execute(_ACCURACY_QUERY).fetchall()
        errors = views.execute(_ERRORS_QUERY).fetchall()
    return DemoResult(paths, run, accuracy, columns, rows, errors)


def _settle(paths: DemoPaths, settings: dict[str, int]) -> None:
    """Claim the output directory for these settings."""
    storage.create_if_absent(str(paths.settings), storage.json_bytes(settings))
    if storage.read_json(str(paths.settings)) != settings:
        raise UsageError(f"output {paths.out}: holds a demo of other images; remove it or give another -o")


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
def _step(console: Console, what: str) -> Iterator[None]:
    console.print(f"{what} …", markup=False)
    started = time.monotonic()
    yield
    console.print(f"… {time.monotonic() - started:.1f} s", markup=False)


def _train_model(paths: DemoPaths, seed: int) -> None:
    """A bundle of a small network trained on the train split, with its accuracy on the validation split."""
    spec = PreprocessSpec(resize_size=_CROP_SIZE, crop_size=_CROP_SIZE)
    inputs_NCHW, targets_N = _load_split(paths.manifest, "train", spec)
    with torch.random.fork_rng(), _one_thread():
        torch.manual_seed(seed)
        network = build_network(SIMPLE_CNN, len(CLASS_NAMES)).to(memory_format=torch.channels_last)
        _fit(network, inputs_NCHW, targets_N)
    inputs_NCHW, targets_N = _load_split(paths.manifest, "validation", spec)
    with torch.inference_mode():
        top1 = (network.eval()(inputs_NCHW).argmax(dim=1) == targets_N).float().mean().item()
    save_bundle(
        str(paths.model),
        arch=SIMPLE_CNN,
        task="multiclass",
        class_names=CLASS_NAMES,
        preprocess=spec,
        state_dict=network.state_dict(),
        provenance={"made_by": "imgbatch demo", "seed": seed, "epochs": _NUM_EPOCHS},
        metrics={"validation": {"top1": top1}},
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    # So small a network gains little from a second thread, and where other programs want the cores too, threads
    # that wait for each other take many times as long.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _fit(network: nn.Module, inputs_NCHW: Tensor, targets_N: Tensor) -> None:
    num_batches = max(1, len(inputs_NCHW) // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=_LEARNING_RATE, total_steps=_NUM_EPOCHS * num_batches
    )
    for _ in range(_NUM_EPOCHS):
        for indices_B in torch.randperm(len(inputs_NCHW)).tensor_split(num_batches):
            logits_BK = network(_augment(inputs_NCHW[indices_B]))
            loss = nn.functional.cross_entropy(logits_BK, targets_N[indices_B], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _augment(inputs_BCHW: Tensor) -> Tensor:
    """One random mirroring and shift for the batch, and another light for each of its images."""
    if torch.rand(()) < 0.5:
        inputs_BCHW = inputs_BCHW.flip(3)
    down, right = torch.randint(-_MAX_SHIFT, _MAX_SHIFT + 1, (2,)).tolist()
    contrast_B111 = torch.empty(len(inputs_BCHW), 1, 1, 1).uniform_(0.8, 1.2)
    cast_BC11 = torch.empty(len(inputs_BCHW), 3, 1, 1).uniform_(-0.25, 0.25)
    return inputs_BCHW.roll((down, right), (2, 3)) * contrast_B111 + cast_BC11


def _load_split(manifest: Path, split: str, spec: PreprocessSpec) -> tuple[Tensor, Tensor]:
    """Normalised inputs [N, C, H, W] float32 and class indices [N] int64 of the readable images of a split."""
    rows = pq.read_table(manifest, columns=["uri", "target"], filters=[("split", "=", split)]).to_pylist()
    pixels, targets = [], []
    for row in rows:
        decoded = decode_image(storage.read_bytes(row["uri"]), spec, max_pixels=Config().decode.max_pixels)
        if isinstance(decoded, Decoded):
            pixels.append(decoded.pixels_HWC)
            targets.append(CLASS_NAMES.index(row["target"]))
    mean_C, std_C = (255 * torch.tensor(values) for values in (spec.mean, spec.std))
    pixels_NHWC = torch.from_numpy(np.stack(pixels))
    return ((pixels_NHWC - mean_C) / std_C).permute(0, 3, 1, 2), torch.tensor(targets)
