from __future__ import annotations

import numpy as np
import pytest
import torch

from imgbatch.core.architectures import build_network, forward_features
from imgbatch.core.hog_color import NUM_FEATURES, color_histogram, oriented_gradients
from imgbatch.errors import UsageError


def noise(side: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((2, 3, side, side), np.float32))


def orientations(image_HW: torch.Tensor) -> torch.Tensor:
    """The sum over all blocks and cells of each of the nine orientations."""
    image_BCHW = image_HW.expand(1, 3, -1, -1)
    return oriented_gradients(image_BCHW).reshape(9, -1).sum(dim=1)


def test_every_slope_has_its_orientation():
    ramp = torch.linspace(0, 1, 64)
    across, down = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    assert orientations(across).argmax() == 0
    assert orientations(down).argmax() == 4  # 80 to 100 degrees
    assert orientations((across + down) / 2).argmax() == 2  # 40 to 60


def test_blocks_have_length_one_whatever_the_contrast():
    strong, weak = oriented_gradients(noise()), oriented_gradients(0.1 * noise() + 0.5)
    torch.testing.assert_close(strong, weak, atol=1e-3, rtol=0)
    lengths = strong.reshape(2, 36, 49).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_colours_are_counted_in_quarters():
    image_BCHW = torch.zeros(1, 3, 16, 16)
    image_BCHW[:, 0, :8, 8:] = 1.0
    counted = color_histogram(image_BCHW).reshape(4, 64)
    black, red = torch.eye(64)[0], torch.eye(64)[3 * 16]
    torch.testing.assert_close(counted, torch.stack([black, red, black, black]))


@pytest.mark.parametrize("side", [16, 63, 64, 100])
def test_the_size_of_the_image_does_not_change_the_number_of_features(side):
    features_BD = forward_features(build_network("hog_color", 3, crop_size=side), "hog_color", noise(side))
    assert features_BD.shape == (2, NUM_FEATURES)
    assert features_BD.isfinite().all()


def test_an_image_has_a_pixel_to_a_cell_at_least():
    with pytest.raises(UsageError, match="hog_color: crop_size 15 must be at least 16"):
        build_network("hog_color", 3, crop_size=15)
