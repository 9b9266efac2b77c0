from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from imgbatch.core.jpeg_header import JpegHeader, read_plain_header


def jpeg(mode: str = "RGB", size: tuple[int, int] = (37, 21), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Software] = "camera"
    return exif


@pytest.mark.parametrize(
    "data",
    [
        jpeg(),
        jpeg("L"),
        jpeg(progressive=True),
        jpeg(subsampling=0),
        jpeg(exif=oriented(1)),
        jpeg(icc_profile=b"profile" * 10_000),
        jpeg(comment=b"\xff\xd8\xff\xc0"),
        jpeg() + b"\0" * 9,
    ],
    ids=["plain", "grey", "progressive", "444", "upright", "icc", "comment", "padded"],
)
def test_size_of_what_every_decoder_reads_alike(data: bytes) -> None:
    assert read_plain_header(data) == JpegHeader(37, 21)


@pytest.mark.parametrize(
    "data",
    [
        jpeg("CMYK"),
        jpeg(keep_rgb=True),
        jpeg(exif=oriented(6)),
        jpeg(exif=b"Exif\0\0no TIFF header"),
        jpeg()[:-40],
        jpeg()[:200],
        b"\xff\xd8\xff",
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=["cmyk", "rgb", "turned", "damaged exif", "cut", "cut in the header", "three bytes", "empty", "png"],
)
def test_anything_else_is_left_to_the_cpu(data: bytes) -> None:
    assert read_plain_header(data) is None


@given(st.integers(0, 700), st.binary(max_size=8))
def test_damaged_headers_do_no_harm(place: int, noise: bytes) -> None:
    data = jpeg(exif=oriented(1))
    read_plain_header(data[:place] + noise + data[place + len(noise) :])


def test_catalogue_photographs_are_plain(test_data: Path) -> None:
    paths = sorted((test_data / "catalog" / "test").rglob("*.jpg"))
    for path in paths:
        header = read_plain_header(path.read_bytes())
        with Image.open(path) as image:
            assert header == JpegHeader(*image.size), path
