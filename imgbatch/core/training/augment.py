"""Training images varied at random, the same for the same (seed, epoch, row_id) whoever does it.

Legend of shape suffixes: B image of the batch, C channel, H height, W width, K class.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from imgbatch.config import AugmentConfig
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError

_RATIO = (3 / 4, 4 / 3)
"""Width to height of random crops (Szegedy et al., 2015; torchvision's default)."""
_ROOM = 1.25
"""Side of the stored crops as a multiple of what the model sees, at least; leaves random crops something to choose."""


def room_spec(spec: PreprocessSpec, config: AugmentConfig) -> PreprocessSpec:
    """How training images are stored: the square around the crop, with room for random crops."""
    if config.min_scale == 1:
        return spec
    side = max(spec.resize_size, round(spec.crop_size * _ROOM))
    return spec.with_sizes(side, side)


def derived_seed(*key: int) -> int:
    """A seed of 63 bits from a tuple of numbers from 0 up."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def build_augmentation(config: AugmentConfig, spec: PreprocessSpec) -> v2.Transform:
    """uint8 CHW of any square size to uint8 CHW of ``crop_size``; draws from torch's global generator."""
    interpolation = InterpolationMode(spec.interpolation)
    steps: list[v2.Transform] = []
    if config.min_scale < 1:
        steps.append(
            v2.RandomResizedCrop(
                spec.crop_size, scale=(config.min_scale, 1.0), ratio=_RATIO, interpolation=interpolation, antialias=True
            )
        )
    else:
        steps.append(v2.CenterCrop(spec.crop_size))
    if config.flip != "none":
        steps.append(v2.RandomHorizontalFlip())
    if config.flip == "all":
        turns = [v2.Lambda(partial(torch.rot90, k=turns, dims=(-2, -1))) for turns in range(4)]
        steps.append(v2.RandomChoice(turns))
    if config.rand_augment:
        steps.append(v2.RandAugment(magnitude=config.rand_augment, interpolation=interpolation))
    if config.color_jitter:
        strength = config.color_jitter
        if spec.bands is None:
            steps.append(v2.ColorJitter(strength, strength, strength, strength / 4))
        else:
            steps.append(v2.Lambda(partial(_brighten_bands, strength=strength)))
    if config.band_dropout:
        means_C = torch.tensor([round(255 * mean) for mean in spec.mean], dtype=torch.uint8)
        steps.append(v2.Lambda(partial(_drop_bands, probability=config.band_dropout, means_C=means_C)))
    if config.erasing:
        steps.append(v2.RandomErasing(config.erasing, value=[round(255 * mean) for mean in spec.mean]))
    return v2.Compose(steps)


def check_augmentation(config: AugmentConfig, spec: PreprocessSpec) -> None:
    """Raise :class:`UsageError` where an augmentation needs RGB and the model sees other bands."""
    if config.rand_augment and spec.bands is not None:
        raise UsageError("augment.rand_augment: works on RGB only; bands have flip, color_jitter and band_dropout")


def _brighten_bands(image_CHW: Tensor, *, strength: float) -> Tensor:
    """Every band made brighter or darker by a factor of its own."""
    factors_C = 1 + strength * (2 * torch.rand(len(image_CHW)) - 1)
    return (image_CHW * factors_C[:, None, None]).round().clamp(0, 255).to(torch.uint8)


def _drop_bands(image_CHW: Tensor, *, probability: float, means_C: Tensor) -> Tensor:
    """Every band replaced by its mean with a probability, as if the sensor had lost it."""
    dropped_C = torch.rand(len(image_CHW)) < probability
    return torch.where(dropped_C[:, None, None], means_C[:, None, None], image_CHW)


def augment_image(
    image_CHW: Tensor, augmentation: v2.Transform, *, seed: int, epoch: int, row_id: int, times: int = 0
) -> Tensor:
    """One image varied, uint8 in and out, in another way each epoch and each time of ``times`` that the epoch has it.

    torch's global generator is left as it was, and so are those of GPUs.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPU's generator too, which the network's dropout draws from.
        torch.default_generator.manual_seed(derived_seed(seed, epoch, row_id, *([times] if times else [])))
        return augmentation(image_CHW)


def mix_pairs(
    images_BCHW: Tensor, truth_BK: Tensor, row_ids_B: Tensor, config: AugmentConfig, *, seed: int, epoch: int
) -> tuple[Tensor, Tensor]:
    """MixUp (Zhang et al., 2018) or CutMix (Yun et al., 2019) of images 0 and 1, 2 and 3, and so on.

    Both images of a pair become mixtures, with the shares swapped; a last image without a partner stays as it is.
    Pairs are mixed the same way whichever batch they are in.

    Args:
        truth_BK: float, mixed likewise.
    """
    num_pairs = len(images_BCHW) // 2
    if num_pairs == 0 or not (config.mixup or config.cutmix):
        return images_BCHW, truth_BK
    images, truth = images_BCHW.clone(), truth_BK.clone()
    for first in range(0, 2 * num_pairs, 2):
        pair = slice(first, first + 2)
        rng = np.random.default_rng(derived_seed(seed, epoch, int(row_ids_B[first]), int(row_ids_B[first + 1])))
        cut = bool(config.cutmix) and (not config.mixup or rng.random() < 0.5)
        alpha = config.cutmix if cut else config.mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            rows, columns, share = _rectangle(rng, share, *images.shape[2:])
            images[pair, :, rows, columns] = images_BCHW[pair, :, rows, columns].flip(0)
        else:
            images[pair] = share * images_BCHW[pair] + (1 - share) * images_BCHW[pair].flip(0)
        truth[pair] = share * truth_BK[pair] + (1 - share) * truth_BK[pair].flip(0)
    return images, truth


def _rectangle(rng: np.random.Generator, share: float, height: int, width: int) -> tuple[slice, slice, float]:
    """A rectangle of about ``1 - share`` of the image around a random point, and the share that it leaves."""
    half = 0.5 * float(np.sqrt(1 - share))
    y, x = rng.random(2)
    top, bottom = round(height * max(0.0, y - half)), round(height * min(1.0, y + half))
    left, right = round(width * max(0.0, x - half)), round(width * min(1.0, x + half))
    return slice(top, bottom), slice(left, right), 1 - (bottom - top) * (right - left) / (height * width)
