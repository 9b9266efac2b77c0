"""From a finished job to a model bundle that says what it is worth and where it came from."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from typing import Any

from imgbatch import __version__
from imgbatch.core import storage
from imgbatch.core.machine import num_cpus
from imgbatch.core.model import ModelBundle, save_bundle
from imgbatch.core.training.checkpoint import load_best
from imgbatch.core.training.crops import FailedImage
from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.labelled import describe_counts
from imgbatch.core.training.plan import TrainingPlan

_PACKAGES = ("numpy", "pillow", "ray", "safetensors", "torch", "torchvision")


def save_trained(
    plan: TrainingPlan, job: TrainingJob, failed: list[FailedImage], *, hardware: dict[str, Any]
) -> ModelBundle:
    """Write the bundle of a job whose outcome.json is there to ``output.path``."""
    outcome = storage.read_json(job.paths.outcome)
    left_out = Counter(image.status for image in failed)
    metrics = {
        **outcome["metrics"],
        "best_epoch": outcome["best_epoch"],
        "epochs": outcome["epochs"],
        "steps": outcome["steps"],
        "images_left_out": dict(left_out),
    }
    return save_bundle(
        str(plan.config.output.path),
        arch=job.arch,
        task=job.task,
        class_names=job.class_names,
        preprocess=job.spec,
        state_dict=load_best(job.paths, outcome["best_epoch"]),
        thresholds=outcome["thresholds"],
        provenance={
            "made_by": f"imgbatch train ({job.baseline or job.method})",
            "fingerprint": plan.fingerprint,
            "manifest": plan.manifest_identity,
            **describe_counts(plan.labelled),
            "rows_in_no_split": plan.labelled.num_unused,
            "weights": _name_of(plan.config.train.weights),
            "weights_identity": plan.weights_identity,
            "train": plan.config.train.model_dump(mode="json", exclude={"weights", "storage"}),
            "augment": plan.config.augment.model_dump(mode="json"),
            "train_seconds": outcome["train_seconds"],
            **({"thresholds": "of the best F1 on the validation split"} if outcome["thresholds"] else {}),
            "hardware": hardware,
            "versions": {"imgbatch": __version__, "python": platform.python_version(), **_versions()},
        },
        metrics=metrics,
    )


def describe_hardware(*, num_workers: int, device: str) -> dict[str, Any]:
    """This machine, as plain values."""
    import torch

    return {
        "workers": num_workers,
        "device": torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device,
        "cpus": num_cpus(),
        "system": platform.platform(),
    }


def _name_of(weights: str | None) -> str | None:
    """Without the directories, which mean nothing elsewhere."""
    return weights.rstrip("/").rsplit("/", 1)[-1] if weights else None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}
