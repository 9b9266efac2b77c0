from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from imgbatch.core.jpeg_header import JpegHeader, read_plain_header
from tests.core.encoding import encode


def jpeg(mode: str = "RGB", size: tuple[int, int] = (37, 21), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)


def of_letters() -> bytes:
    """Components called R, G and B, and no other marker that says that they are."""
    data = jpeg(keep_rgb=True)
    adobe = data.index(b"\xff\xee")
    return data[:adobe] + data[adobe + 2 + int.from_bytes(data[adobe + 2 : adobe + 4]) :]


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
        jpeg(xmp=b'<rdf:Description tiff:Orientation="1"/>'),
        jpeg(icc_profile=b"profile" * 10_000),
        jpeg(comment=b"\xff\xd8\xff\xc0"),
        jpeg() + b"\0" * 9,
    ],
    ids=["plain", "grey", "progressive", "444", "upright", "upright by XMP", "icc", "comment", "padded"],
)
def test_size_of_what_every_decoder_reads_alike(data: bytes) -> None:
    assert read_plain_header(data) == JpegHeader(37, 21)


@pytest.mark.parametrize(
    "data",
    [
        jpeg("CMYK"),
        jpeg(keep_rgb=True),
        of_letters(),
        jpeg(exif=oriented(6)),
        jpeg(xmp=b'<rdf:Description tiff:Orientation="6"/>'),
        jpeg(xmp=b"<tiff:Orientation>8</tiff:Orientation>"),
        jpeg(exif=b"Exif\0\0no TIFF header"),
        jpeg()[:-40],
        jpeg()[:200],
        b"\xff\xd8\xff",
        b"",
        b"\x89PNG\r\n\x1a\n",
    ],
    ids=[
        "cmyk",
        "rgb",
        "rgb by its components' names",
        "turned",
        "turned by XMP",
        "by an element of XMP",
        "damaged exif",
        "cut",
        "cut in the header",
        "three bytes",
        "empty",
        "png",
    ],
)
def test_anything_else_is_left_to_the_cpu(data: bytes) -> None:
    assert read_plain_header(data) is None


UPRIGHT = jpeg(exif=oriented(1))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@settings(deadline=None, derandomize=True)
@given(st.integers(0, 700), st.binary(max_size=8))
def test_a_damaged_header_is_read_as_pillow_reads_it_or_not_at_all(place: int, noise: bytes) -> None:
    data = UPRIGHT[:place] + noise + UPRIGHT[place + len(noise) :]
    header, size = read_plain_header(data), size_by_pillow(data)
    assert header is None or size is None or header == JpegHeader(*size)


def size_by_pillow(data: bytes) -> tuple[int, int] | None:
    """None where it does not open the image, for any of its reasons."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception:
        return None


def test_catalogue_photographs_are_plain(test_data: Path) -> None:
    paths = sorted((test_data / "catalog" / "test").rglob("*.jpg"))
    assert len(paths) > 100
    for path in paths:
        header = read_plain_header(path.read_bytes())
        with Image.open(path) as image:
            assert header == JpegHeader(*image.size), path
