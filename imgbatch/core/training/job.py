"""A training job: everything that workers need, settled before they start and stored for those that start again.

STORAGE/crops-*/             decoded images (see ``crops``), shared by jobs on the same images
STORAGE/t<fingerprint>/      the job
    job.json  labels.npz  initial.safetensors
    last.pt  best-00007.safetensors  epochs.jsonl  outcome.json  failure.json
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.config import Config, TrainConfig, parse_config
from imgbatch.core import storage
from imgbatch.core.description import Task
from imgbatch.core.training.crops import CropStore
from imgbatch.core.training.labelled import TRAIN, LabelledSplit
from imgbatch.core.transforms import PreprocessSpec

if TYPE_CHECKING:
    from torch import Tensor

_MOST_HEAD_IMAGES = 20_000
"""Enough to start from, and few enough for fits in float64 that take all images at once."""


@dataclass(frozen=True)
class JobPaths:
    """The files of a job."""

    directory: str

    @property
    def description(self) -> str:
        return storage.join(self.directory, "job.json")

    @property
    def labels(self) -> str:
        return storage.join(self.directory, "labels.npz")

    @property
    def initial(self) -> str:
        return storage.join(self.directory, "initial.safetensors")

    @property
    def last(self) -> str:
        return storage.join(self.directory, "last.pt")

    def best_of(self, epoch: int) -> str:
        """The weights after an epoch that was the best so far; records of epochs say which one that is."""
        return storage.join(self.directory, f"best-{epoch:05d}.safetensors")

    @property
    def epochs(self) -> str:
        return storage.join(self.directory, "epochs.jsonl")

    @property
    def outcome(self) -> str:
        """What was measured, when training is over."""
        return storage.join(self.directory, "outcome.json")

    @property
    def failure(self) -> str:
        """Why trying again would not help."""
        return storage.join(self.directory, "failure.json")


@dataclass(frozen=True)
class TrainingJob:
    """What workers train, as stored in job.json and labels.npz."""

    paths: JobPaths
    config: Config
    arch: str
    baseline: str | None
    method: str
    keeps_head: bool
    """Whether the weights to start from bring the head too."""
    task: Task
    class_names: tuple[str, ...]
    spec: PreprocessSpec
    stores: dict[str, CropStore]
    splits: dict[str, LabelledSplit]
    positions: dict[str, np.ndarray]
    """Of each split: where its images are in their store, int64 (N,)."""

    @property
    def train(self) -> TrainConfig:
        return self.config.train

    @property
    def head_images(self) -> int:
        """Training images that a new head is fitted to: of many some, where all layers are trained afterwards."""
        num_images = len(self.splits[TRAIN])
        return min(num_images, _MOST_HEAD_IMAGES) if self.method == "fine_tune" else num_images

    def store_of(self, split: str) -> CropStore:
        return self.stores["train" if split == TRAIN else "evaluation"]

    def remove_local_copies(self) -> None:
        """Of crops on remote storage, when this machine needs them no more; what is mapped elsewhere stays readable."""
        for store in self.stores.values():
            store.remove_local_copy()


def save_initial(paths: JobPaths, weights: Mapping[str, Tensor]) -> None:
    """Store what a job starts from."""
    import safetensors.torch

    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    storage.replace(paths.initial, safetensors.torch.save(tensors))


def save_job(job: TrainingJob) -> None:
    """Store a job whose first weights are stored; job.json is written last."""
    storage.replace(job.paths.labels, _pack_labels(job))
    storage.write_json(job.paths.description, _description(job))


def load_job(directory: str) -> TrainingJob:
    """The job stored in a directory."""
    paths = JobPaths(directory)
    values = storage.read_json(paths.description)
    with np.load(io.BytesIO(storage.read_bytes(paths.labels))) as arrays:
        names = [name.removesuffix("/truth") for name in arrays if name.endswith("/truth")]
        splits = {name: LabelledSplit(arrays[f"{name}/row_ids"], arrays[f"{name}/truth"]) for name in names}
        positions = {name: arrays[f"{name}/positions"] for name in names}
    stores = {
        name: CropStore(store["directory"], PreprocessSpec.from_dict(store["spec"]), store["num_rows"])
        for name, store in values.pop("stores").items()
    }
    return TrainingJob(
        **values
        | {
            "paths": paths,
            "config": parse_config(values["config"]),
            "class_names": tuple(values["class_names"]),
            "spec": PreprocessSpec.from_dict(values["spec"]),
            "stores": stores,
            "splits": splits,
            "positions": positions,
        }
    )


def _description(job: TrainingJob) -> dict[str, Any]:
    return {
        "config": job.config.model_dump(mode="json"),
        "arch": job.arch,
        "baseline": job.baseline,
        "method": job.method,
        "keeps_head": job.keeps_head,
        "task": job.task,
        "class_names": job.class_names,
        "spec": job.spec.to_dict(),
        "stores": {name: asdict(store) for name, store in job.stores.items()},
    }


def _pack_labels(job: TrainingJob) -> bytes:
    arrays = {}
    for name, images in job.splits.items():
        arrays[f"{name}/row_ids"], arrays[f"{name}/truth"] = images.row_ids_N, images.truth
        arrays[f"{name}/positions"] = job.positions[name]
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()
