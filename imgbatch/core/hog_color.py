"""Hand-made features as a network without weights: histograms of oriented gradients and of colours.

What textbooks did before networks learnt their features; a yardstick for those that did. In torch rather than by
scikit-image, so that a bundle is classified wherever others are, on its device and in batches.

Legend of shape suffixes: B image of the batch, C channel, H height, W width, O orientation, L cell, D feature, K class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_GRID = 8
"""Cells to a side, whatever the size of the image."""
_ORIENTATIONS = 9
_BLOCK = 2
"""Cells to a side of what is normalised together."""
_CLIP = 0.2
_EPSILON = 1e-5
_COLOR_GRID = 2
_LEVELS = 4
"""Of each channel of the colour histogram."""

NUM_FEATURES = (_GRID - _BLOCK + 1) ** 2 * _BLOCK**2 * _ORIENTATIONS + _COLOR_GRID**2 * _LEVELS**3


class HogColor(nn.Module):
    """Takes RGB images of 0 to 1, ``[B, 3, H, W]`` float32, square and of 16 px at least; gives logits ``[B, K]``."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        side = images_BCHW.shape[-1] // _GRID * _GRID
        images_BCHW = images_BCHW[..., :side, :side].float()
        return self.head(torch.cat([oriented_gradients(images_BCHW), color_histogram(images_BCHW)], dim=1))


def oriented_gradients(images_BCHW: Tensor) -> Tensor:
    """HOG (Dalal and Triggs, 2005) of 8 x 8 cells in blocks of 2 x 2, ``[B, D]``, each block of length 1.

    As ``skimage.feature.hog`` with ``L2-Hys`` and 9 orientations, which uses the channel with the steepest slope of
    every pixel: the values of version 0.26 within 1e-7.

    Args:
        images_BCHW: float32, sides a multiple of 8 px.
    """
    down_BCHW, across_BCHW = torch.zeros_like(images_BCHW), torch.zeros_like(images_BCHW)
    down_BCHW[:, :, 1:-1] = images_BCHW[:, :, 2:] - images_BCHW[:, :, :-2]
    across_BCHW[..., 1:-1] = images_BCHW[..., 2:] - images_BCHW[..., :-2]
    steepness_B1HW, channel_B1HW = torch.hypot(down_BCHW, across_BCHW).max(dim=1, keepdim=True)
    angle_B1HW = torch.atan2(down_BCHW.gather(1, channel_B1HW), across_BCHW.gather(1, channel_B1HW)) % math.pi
    orientation_B1HW = (angle_B1HW * (_ORIENTATIONS / math.pi)).long().clamp(max=_ORIENTATIONS - 1)
    cells_BLO = _histogram(orientation_B1HW[:, 0], steepness_B1HW[:, 0], grid=_GRID, num_bins=_ORIENTATIONS)
    cells_BOHW = cells_BLO.permute(0, 2, 1).unflatten(2, (_GRID, _GRID))
    blocks = functional.unfold(cells_BOHW, _BLOCK)
    for limit in (_CLIP, math.inf):
        blocks = (blocks / (blocks.square().sum(dim=1, keepdim=True) + _EPSILON**2).sqrt()).clamp(max=limit)
    return blocks.flatten(1)


def color_histogram(images_BCHW: Tensor) -> Tensor:
    """Square roots of the shares of 4 x 4 x 4 colours in each quarter of an image, ``[B, D]``, 0 to 1."""
    levels_BCHW = (images_BCHW * _LEVELS).long().clamp(0, _LEVELS - 1)
    red_BHW, green_BHW, blue_BHW = levels_BCHW.unbind(dim=1)
    bins_BHW = (red_BHW * _LEVELS + green_BHW) * _LEVELS + blue_BHW
    ones_BHW = torch.ones_like(images_BCHW[:, 0])
    return _histogram(bins_BHW, ones_BHW, grid=_COLOR_GRID, num_bins=_LEVELS**3).flatten(1).sqrt()


def _histogram(bins_BHW: Tensor, amounts_BHW: Tensor, *, grid: int, num_bins: int) -> Tensor:
    """The mean amount per pixel that falls in each bin of each cell, ``[B, grid * grid, num_bins]``."""
    num_images, side, _ = bins_BHW.shape
    line = torch.arange(side, device=bins_BHW.device) * grid // side
    places_BHW = (line[:, None] * grid + line) * num_bins + bins_BHW
    sums = amounts_BHW.new_zeros(num_images, grid * grid * num_bins)
    sums.scatter_add_(1, places_BHW.flatten(1), amounts_BHW.flatten(1))
    return sums.unflatten(1, (grid * grid, num_bins)) * (grid / side) ** 2
