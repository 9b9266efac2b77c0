"""A tiny labelled collection on disk: three colours, told apart by anything that learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from imgbatch.config import Config, load_config
from imgbatch.core.training.crops import FailedImage, decode_crops
from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.plan import plan_training, settle_job, store_start

COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 60), "red": (200, 40, 30)}
WriteManifest = Callable[..., Path]


def settle(config: Config) -> tuple[TrainingJob, list[FailedImage]]:
    """Everything up to the first step, without an engine."""
    plan = plan_training(config)
    stores = plan.stores()
    store_start(plan)
    for store in stores.values():
        decode_crops(store, config)
    return settle_job(plan, stores)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take many times as long where something else wants the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def colour_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """16 noisy PNGs of 20 x 16 px of each colour."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    paths: dict[str, list[str]] = {}
    for name, colour in COLOURS.items():
        for index in range(16):
            pixels = np.clip(rng.normal(colour, 60, (16, 20, 3)), 0, 255).astype(np.uint8)
            path = folder / f"{name}{index}.png"
            Image.fromarray(pixels).save(path)
            paths.setdefault(name, []).append(str(path))
    return paths


@pytest.fixture
def write_manifest(tmp_path: Path) -> WriteManifest:
    """Writes a manifest from columns."""

    def write(name: str = "manifest.parquet", **columns: Sequence[object] | pa.Array) -> Path:
        path = tmp_path / name
        pq.write_table(pa.table(columns), path)
        return path

    return write


@pytest.fixture
def colour_manifest(colour_images: dict[str, list[str]], write_manifest: WriteManifest) -> Path:
    """Of each colour ten images for training, three for validation and three for the test."""
    rows = [(uri, name, i) for name, uris in colour_images.items() for i, uri in enumerate(uris)]
    split = ["train" if i < 10 else "validation" if i < 13 else "test" for _, _, i in rows]
    return write_manifest(uri=[uri for uri, _, _ in rows], target=[name for _, name, _ in rows], split=split)


@pytest.fixture
def colour_config(colour_manifest: Path, tmp_path: Path) -> Config:
    """Trains simple_cnn on the colours for two epochs of three steps in this process."""
    return load_config(
        flags={
            "input.manifest": str(colour_manifest),
            "output.path": str(tmp_path / "model"),
            "classify.engine": "local",
            "resources.device": "cpu",
            "preprocess.resize_size": 16,
            "preprocess.crop_size": 16,
            "train.arch": "simple_cnn",
            "train.epochs": 2,
            "train.batch_size": 10,
            "train.learning_rate": 0.01,
            "train.storage": str(tmp_path / "work"),
        }
    )
