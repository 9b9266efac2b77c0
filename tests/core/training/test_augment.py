from __future__ import annotations

import pytest
import torch

from imgbatch.config import AugmentConfig
from imgbatch.core.training.augment import augment_image, build_augmentation, mix_pairs, room_spec
from imgbatch.core.transforms import PreprocessSpec

SPEC = PreprocessSpec(resize_size=36, crop_size=32)
EVERYTHING = AugmentConfig(min_scale=0.3, flip="all", color_jitter=0.4, rand_augment=9, erasing=0.5)


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_key_decides_the_result_and_nothing_else_does(image):
    augmentation = build_augmentation(EVERYTHING, SPEC)
    first = augment_image(image, augmentation, seed=1, epoch=2, row_id=3)
    assert first.shape == (3, 32, 32)
    assert first.dtype == torch.uint8
    torch.rand(7)
    assert torch.equal(augment_image(image, augmentation, seed=1, epoch=2, row_id=3), first)
    for key in ({"seed": 2}, {"epoch": 3}, {"row_id": 4}, {"times": 1}):
        other = augment_image(image, augmentation, **{"seed": 1, "epoch": 2, "row_id": 3, **key})
        assert not torch.equal(other, first)


def test_the_global_generator_is_left_alone(image):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    augment_image(image, build_augmentation(EVERYTHING, SPEC), seed=1, epoch=2, row_id=3)
    assert torch.equal(torch.rand(3), expected)


def test_the_generators_of_gpus_are_left_alone(image, monkeypatch):
    def refuse(seed):
        raise AssertionError(f"the GPUs are seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    augment_image(image, build_augmentation(EVERYTHING, SPEC), seed=1, epoch=2, row_id=3)


def test_no_augmentation_is_the_centre_crop(image):
    augmentation = build_augmentation(AugmentConfig(min_scale=1, flip="none"), SPEC)
    assert torch.equal(augment_image(image, augmentation, seed=0, epoch=1, row_id=0), image[:, 4:36, 4:36])


def test_quarter_turns_and_flips_reach_all_eight_positions():
    corner = torch.zeros((3, 32, 32), dtype=torch.uint8)
    corner[:, 0, 5] = 255
    augmentation = build_augmentation(AugmentConfig(min_scale=1, flip="all"), SPEC)
    seen = {
        tuple(augment_image(corner, augmentation, seed=0, epoch=epoch, row_id=0)[0].nonzero()[0].tolist())
        for epoch in range(60)
    }
    assert len(seen) == 8


def test_room_is_kept_only_for_random_crops():
    assert room_spec(SPEC, AugmentConfig()).crop_size == 40
    assert room_spec(SPEC, AugmentConfig(min_scale=1)) == SPEC


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=1, cutmix=1)]
)
def test_pairs_are_mixed_with_swapped_shares_wherever_they_are(config):
    images = torch.rand((5, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    truth_BK, row_ids = torch.eye(5), torch.arange(5)
    mixed, mixed_truth = mix_pairs(images, truth_BK, row_ids, config, seed=1, epoch=2)
    assert torch.equal(mixed[4], images[4])
    torch.testing.assert_close(mixed_truth.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(mixed[0] + mixed[1], images[0] + images[1])
    assert mixed_truth[0, 0] == mixed_truth[1, 1]
    alone, alone_truth = mix_pairs(images[2:4], truth_BK[2:4], row_ids[2:4], config, seed=1, epoch=2)
    torch.testing.assert_close(alone, mixed[2:4])
    torch.testing.assert_close(alone_truth, mixed_truth[2:4])


def test_cutmix_counts_the_pixels():
    images = torch.stack([torch.zeros(3, 10, 10), torch.ones(3, 10, 10)])
    mixed, truth_BK = mix_pairs(images, torch.eye(2), torch.arange(2), AugmentConfig(cutmix=1.0), seed=5, epoch=1)
    torch.testing.assert_close(truth_BK[0, 1], mixed[0].mean())


def test_without_mixing_nothing_changes():
    images, truth_BK = torch.rand(4, 3, 4, 4), torch.eye(4)
    mixed, mixed_truth = mix_pairs(images, truth_BK, torch.arange(4), AugmentConfig(), seed=0, epoch=1)
    assert mixed is images
    assert mixed_truth is truth_BK
