"""From stored crops to batches on the device.

Legend of shape suffixes: B image of the batch, C channel, H height, W width, K class, M image of this worker.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from imgbatch.core.bands import visible_rgb
from imgbatch.core.training.augment import augment_image, build_augmentation
from imgbatch.core.training.crops import Crops
from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.labelled import TRAIN
from imgbatch.core.training.sampling import Draw
from imgbatch.core.training.workers import Worker
from imgbatch.core.transforms import PreprocessSpec

Batch = tuple[Tensor, Tensor, Tensor]
"""images_BCHW uint8, truth_BK float32, row_ids_B int64."""
_SAMPLED_IMAGES, _SAMPLED_EPOCHS = 8, 8


class AugmentedImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Training images as the network sees them, by what was drawn."""

    def __init__(self, job: TrainingJob) -> None:
        self._crops: Crops | None = None
        self._store = job.store_of(TRAIN)
        self._positions = job.positions[TRAIN]
        self._images = job.splits[TRAIN]
        self._num_classes = len(job.class_names)
        self._augmentation = build_augmentation(job.config.augment, job.spec)
        self._seed = job.train.seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor, int]:
        epoch, index, times = draw
        # Opened where it is used: every loader process maps the files itself.
        self._crops = self._crops or self._store.open()
        image_CHW = torch.from_numpy(self._crops[int(self._positions[index])].copy()).permute(2, 0, 1)
        row_id = int(self._images.row_ids_N[index])
        # Every loader process has a copy of this: the whole table, images by classes, would be large.
        truth_K = torch.from_numpy(self._images.take(np.array([index])).dense_truth(self._num_classes)[0])
        seed = self._seed
        varied_CHW = augment_image(image_CHW, self._augmentation, seed=seed, epoch=epoch, row_id=row_id, times=times)
        return varied_CHW, truth_K, row_id


def iter_training_batches(images: AugmentedImages, passes: Iterator[list[Draw]], worker: Worker) -> Iterator[Batch]:
    """A batch for each of ``passes``, prepared ahead where the worker has loader processes."""
    loader: DataLoader[tuple[Tensor, Tensor, int]] = DataLoader(
        images,
        batch_sampler=passes,
        num_workers=worker.loader_processes,
        pin_memory=worker.device.type == "cuda",
        prefetch_factor=4 if worker.loader_processes else None,
    )
    return iter(loader)


class Normaliser:
    """uint8 to float32 on the device, exactly as classification does it."""

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        std_C = 255.0 * torch.tensor(spec.std)
        self._scale_C11 = std_C.reciprocal().view(-1, 1, 1).to(device)
        self._shift_C11 = (-255.0 * torch.tensor(spec.mean) / std_C).view(-1, 1, 1).to(device)
        self._device = device

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        pixels = images_BCHW.to(self._device, non_blocking=True).to(memory_format=torch.channels_last)
        return torch.addcmul(self._shift_C11, pixels.float(), self._scale_C11)


def iter_evaluation_batches(job: TrainingJob, split: str, worker: Worker, batch_size: int) -> Iterator[Tensor]:
    """This worker's images of a split (rank, rank + world_size, ...) as the model will see them, uint8 BCHW."""
    store = job.store_of(split)
    crops = store.open()
    positions_M = job.positions[split][worker.rank :: worker.world_size]
    side = job.spec.crop_size
    for start in range(0, len(positions_M), batch_size):
        images_BCHW = torch.from_numpy(crops.take(positions_M[start : start + batch_size])).permute(0, 3, 1, 2)
        if store.spec.resize_size != job.spec.resize_size:
            # Stored larger, with room for random crops: the model will see another zoom.
            images_BCHW = resize(
                images_BCHW, [job.spec.resize_size] * 2, InterpolationMode(job.spec.interpolation), antialias=True
            )
        yield center_crop(images_BCHW, [side, side]).contiguous()


def sample_augmented(job: TrainingJob) -> tuple[np.ndarray, list[str]]:
    """Some training images as the first epochs will show them: uint8 NHWC RGB, by image, and the class of each."""
    images = job.splits[TRAIN]
    chosen = np.linspace(0, len(images) - 1, min(_SAMPLED_IMAGES, len(images))).round().astype(int)
    augmented = AugmentedImages(job)
    shown = [augmented[epoch, int(index), 0][0] for index in chosen for epoch in range(1, _SAMPLED_EPOCHS + 1)]
    truth_NK = images.take(chosen).dense_truth(len(job.class_names))
    names = [" + ".join(np.array(job.class_names)[row > 0]) for row in truth_NK]
    shown_NHWC = torch.stack(shown).permute(0, 2, 3, 1).numpy()
    return visible_rgb(shown_NHWC), [name for name in names for _ in range(_SAMPLED_EPOCHS)]
