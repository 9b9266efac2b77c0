from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from imgbatch.core.transforms import DecodePolicy, PreprocessSpec


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (640, 480),
        (480, 640),
        (256, 256),
        (257, 256),
        (500, 333),
        (333, 500),
        (31, 1000),
        (1000, 31),
        (1, 1),
        (223, 224),
    ],
)
@pytest.mark.parametrize(("resize_size", "crop_size"), [(256, 224), (232, 224), (64, 64), (73, 64), (342, 299)])
def test_the_geometry_is_torchvisions(width, height, resize_size, crop_size):
    from torchvision.transforms import functional

    spec = PreprocessSpec(resize_size, crop_size)
    geometry = spec.geometry(width, height)
    resized = functional.resize(Image.new("RGB", (width, height)), resize_size)
    assert (geometry.resized_width, geometry.resized_height) == resized.size

    # A picture whose pixels say where they stand tells where torchvision cuts.
    ruler = np.arange(resized.width * resized.height, dtype=np.int32).reshape(resized.height, resized.width)
    first = functional.center_crop(Image.fromarray(ruler), crop_size).getpixel((0, 0))
    assert first == geometry.top * resized.width + geometry.left


def test_stretching_brings_both_sides_to_the_size():
    geometry = PreprocessSpec(64, 60, resize_mode="stretch").geometry(640, 480)
    assert (geometry.resized_width, geometry.resized_height) == (64, 64)
    assert (geometry.left, geometry.top) == (2, 2)


@pytest.mark.parametrize("options", [{}, {"resize_mode": "stretch", "median_size": 3}, {"reducing_gap": 2.5}])
def test_a_spec_survives_json(options):
    policy = DecodePolicy(background=(0, 0, 0), formats=("PNG",))
    spec = PreprocessSpec(73, 64, "bicubic", decode=policy, **options)
    assert PreprocessSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_what_a_spec_does_not_do_is_not_in_its_description():
    """Models from before these keys keep their model_id."""
    assert not {"resize_mode", "median_size", "reducing_gap"} & PreprocessSpec().to_dict().keys()


def test_an_unknown_key_is_refused():
    with pytest.raises(TypeError, match="sharpness"):
        PreprocessSpec.from_dict(PreprocessSpec().to_dict() | {"sharpness": 1})


@pytest.mark.parametrize(
    "arguments",
    [
        {"resize_size": 100, "crop_size": 224},
        {"crop_size": 0},
        {"mean": (0.5,)},
        {"mean": (), "std": ()},
        {"median_size": 4},
        {"reducing_gap": 0.5},
        {"reducing_gap": float("nan")},
        {"reducing_gap": 2.0, "median_size": 3},
    ],
)
def test_a_spec_that_cannot_work_is_refused(arguments):
    messages = (
        r"resize_size|mean and std|median_size must be one of 0, 3, 5, 7, not 4"
        r"|reducing_gap must be 0 or at least 1, not (0.5|nan)|reducing_gap and median_size exclude each other"
    )
    with pytest.raises(ValueError, match=messages):
        PreprocessSpec(**arguments)


def test_one_decoded_image_takes_its_pixels_in_bytes():
    assert PreprocessSpec().pixel_bytes == 150_528
    assert PreprocessSpec(64, 64, mean=(0.5,), std=(0.5,)).pixel_bytes == 4096


@pytest.mark.parametrize(
    ("resize_size", "crop_size", "expected"),
    [
        (None, None, (256, 224)),
        (None, 112, (128, 112)),
        (300, None, (300, 224)),
        (200, None, (200, 200)),
        (80, 64, (80, 64)),
    ],
)
def test_other_sizes_keep_what_was_not_given(resize_size, crop_size, expected):
    spec = PreprocessSpec().with_sizes(resize_size, crop_size)
    assert (spec.resize_size, spec.crop_size) == expected


def test_a_configuration_overrides_what_it_gives():
    spec = PreprocessSpec(median_size=3)
    assert spec.overridden(crop_size=None, median_size=None) == spec
    changed = spec.overridden(resize_size=64, crop_size=64, resize_mode="stretch", median_size=0)
    assert changed == PreprocessSpec(64, 64, resize_mode="stretch")
    assert changed.overridden(reducing_gap=2).overridden(reducing_gap=0) == changed


@pytest.mark.parametrize(
    ("gap", "size", "scale"),
    [
        (0, (8000, 8000), 1),
        (1, (255, 400), 1),
        (1, (512, 512), 2),
        (1, (511, 2000), 1),
        (1, (3872, 2592), 8),
        (2, (3872, 2592), 4),
        (3, (3872, 2592), 2),
        (1.5, (768, 5000), 2),
    ],
)
def test_a_jpeg_is_reduced_as_long_as_it_stays_so_many_times_as_large(gap, size, scale):
    assert PreprocessSpec(256, 224, reducing_gap=gap).jpeg_scale(*size) == scale


def test_both_sides_count_where_an_image_is_stretched():
    spec = PreprocessSpec(100, 100, resize_mode="stretch", reducing_gap=1)
    assert spec.jpeg_scale(800, 200) == 2


def test_a_spec_prints_as_one_line():
    assert (
        PreprocessSpec(64, 64, resize_mode="stretch", median_size=5)
        .describe()
        .startswith("decode | median(5) | stretch(64, bilinear) | center_crop(64) | ")
    )
    assert PreprocessSpec(reducing_gap=1.5).describe().startswith("decode(reducing_gap 1.5) | resize(256, ")
    assert PreprocessSpec().describe() == (
        "decode | resize(256, bilinear) | center_crop(224) | normalise(0.485, 0.456, 0.406; 0.229, 0.224, 0.225)"
    )
