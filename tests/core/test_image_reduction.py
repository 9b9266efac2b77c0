"""JPEGs decoded at a part of their size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import ExifTags, Image

from imgbatch.core.images import decode_image
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Status
from tests.core.encoding import MAX_PIXELS, decoded, encode, photograph


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "scale"), [((517, 389), 4), ((389, 1029), 4), ((267, 273), 2)])
def test_a_reduced_jpeg_shows_the_same_crop(orientation: int, size: tuple[int, int], scale: int) -> None:
    """Sizes that the scale does not divide, turned and mirrored in every way: a shift of half a pixel would show."""
    spec = PreprocessSpec(73, 64, reducing_gap=1.25)
    upright = size[::-1] if orientation >= 5 else size
    assert spec.jpeg_scale(*upright) == scale
    y, x = np.mgrid[: size[1], : size[0]]
    waves_HWC = np.stack([np.sin(x / 17 + k) * np.cos(y / 13 - k) for k in range(3)], axis=2)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(np.uint8(128 + 100 * waves_HWC)), "JPEG", exif=exif, quality=98)
    reduced, whole = decoded(data, spec), decoded(data, replace(spec, reducing_gap=0))
    assert (reduced.width, reduced.height) == (whole.width, whole.height) == upright
    difference = np.abs(reduced.pixels_HWC.astype(int) - whole.pixels_HWC)
    assert difference.mean() < 1
    assert difference.max() <= 5


def test_only_jpegs_are_reduced() -> None:
    spec = PreprocessSpec(64, 64, reducing_gap=1)
    image = photograph(640, 512)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(image, kind, **options)
        np.testing.assert_array_equal(
            decoded(data, spec).pixels_HWC, decoded(data, replace(spec, reducing_gap=0)).pixels_HWC
        )
    jpeg = encode(image, "JPEG")
    assert (decoded(jpeg, spec).pixels_HWC != decoded(jpeg, replace(spec, reducing_gap=0)).pixels_HWC).any()


def test_a_cut_jpeg_is_truncated_when_reduced_too() -> None:
    data = encode(photograph(640, 512), "JPEG")
    outcome = decode_image(data[: len(data) // 2], PreprocessSpec(64, 64, reducing_gap=1), max_pixels=MAX_PIXELS)
    assert isinstance(outcome, RowError)
    assert outcome.status == Status.TRUNCATED
