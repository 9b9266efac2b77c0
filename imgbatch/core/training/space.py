"""Whether there is room for decoded images and checkpoints before anything is started."""

from __future__ import annotations

import platform
import shutil
import tempfile

from imgbatch.core import storage
from imgbatch.core.architectures import build_network
from imgbatch.core.training.crops import CropStore
from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.plan import TrainingPlan
from imgbatch.errors import ImgbatchError, UsageError

_CHECKPOINT_COPIES = 11
"""Weights, their average and two moments of the optimiser, with the next checkpoint beside the last; likewise the best
weights; and the first ones."""


def needed_bytes(plan: TrainingPlan, stores: dict[str, CropStore]) -> int:
    """Disk space that a job takes at most beyond what it has taken already, bytes."""
    crops = sum(
        len(store.missing_parts()) * min(store.part_rows, store.num_rows) * store.spec.pixel_bytes
        for store in stores.values()
    )
    network = build_network(
        plan.arch,
        len(plan.labelled.class_names),
        crop_size=plan.spec.crop_size,
        num_channels=plan.spec.num_channels,
        empty=True,
    )
    return crops + _CHECKPOINT_COPIES * 4 * sum(parameter.numel() for parameter in network.parameters())


def check_space(plan: TrainingPlan, stores: dict[str, CropStore]) -> None:
    """Raise :class:`UsageError` if the disk of ``train.storage`` has too little room; other storage is not asked."""
    if not storage.is_local(plan.storage):
        return
    needed, free = needed_bytes(plan, stores), shutil.disk_usage(storage.local_path(plan.storage)).free
    if free < needed:
        raise UsageError(
            f"train.storage {plan.storage}: {free / 1e9:.1f} GB free, but decoded images and checkpoints take "
            f"{needed / 1e9:.1f} GB; make room or choose another place"
        )


def check_copy_space(job: TrainingJob) -> None:
    """Raise :class:`ImgbatchError` if this machine has too little room for copies of crops on other storage."""
    needed, place = sum(store.bytes_to_copy() for store in job.stores.values()), tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ImgbatchError(
            f"training: {place} of {platform.node()}: {free / 1e9:.1f} GB free, but the decoded images take "
            f"{needed / 1e9:.1f} GB there; make room, or set TMPDIR to a larger disk"
        )
