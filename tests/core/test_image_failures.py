"""What is no whole image of a format that is allowed."""

from __future__ import annotations

import struct
import warnings

import numpy as np
import pytest
from PIL import Image

from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from imgbatch.errors import RowError, Status
from tests.core.encoding import GREY, MAX_PIXELS, SPEC, assert_uniform, encode, photograph, status


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_anywhere_is_truncated(kind: str) -> None:
    data = encode(photograph(), kind)
    for share in (0.3, 0.6, 0.9):
        assert status(data[: int(len(data) * share)]) is Status.TRUNCATED


def test_damaged_jpeg_data_is_corrupt_rather_than_grey_stripes() -> None:
    data = encode(photograph(256, 256), "JPEG", quality=95)
    middle = len(data) // 2
    assert status(data[:middle] + bytes(200) + data[middle + 3000 :]) is Status.CORRUPT


def test_damaged_png_data_is_corrupt() -> None:
    data = bytearray(encode(photograph(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert status(bytes(data)) is Status.CORRUPT


def test_float_tiff_of_nothing_but_nan_is_corrupt() -> None:
    data = encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    assert status(data) is Status.CORRUPT


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html></html>", b"{}", b"\0" * 100, b"x", b"%PDF-1.7\n"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    assert status(data) is Status.NOT_AN_IMAGE


def test_no_bytes_is_empty() -> None:
    assert status(b"") is Status.EMPTY


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "JPEG2000", "DDS", "SGI", "PCX"])
def test_an_image_of_another_format_is_never_decoded(kind: str) -> None:
    data = encode(Image.new("RGB", (32, 32), GREY), kind)
    expected = Status.NOT_AN_IMAGE if kind == "PCX" else Status.UNSUPPORTED_FORMAT
    assert status(data) is expected


def test_the_allow_list_is_the_policys() -> None:
    spec = PreprocessSpec(decode=DecodePolicy(formats=("PNG",)))
    assert status(encode(photograph(), "JPEG"), spec) is Status.UNSUPPORTED_FORMAT


def test_pixels_are_counted_before_anything_is_decoded() -> None:
    data = encode(Image.new("1", (2000, 1000)), "PNG")
    assert status(data, max_pixels=1_999_999) is Status.TOO_LARGE
    assert isinstance(decode_image(data, SPEC, max_pixels=2_000_000), Decoded)


def test_a_header_that_claims_billions_of_pixels_is_too_large() -> None:
    data = bytearray(encode(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", 2_000_000, 2_000_000)
    assert status(bytes(data)) is Status.TOO_LARGE


def test_broken_exif_spoils_nothing() -> None:
    data = encode(Image.new("RGB", (16, 16), GREY), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert_uniform(data, GREY, tolerance=3)


def test_memory_that_runs_out_while_exif_is_read_leaves_no_photograph_lying(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise MemoryError

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (16, 16), GREY), "PNG", exif=exif)
    monkeypatch.setattr(Image.Exif, "load", load)
    assert status(data) is Status.OUT_OF_MEMORY


def test_other_than_three_channels_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="1 channels"):
        decode_image(b"x", PreprocessSpec(mean=(0.5,), std=(0.5,)), max_pixels=1)


def test_no_byte_string_raises_or_warns() -> None:
    rng = np.random.default_rng(1)
    originals = [encode(photograph(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in originals:
            for _ in range(60):
                damaged = np.frombuffer(data, np.uint8).copy()
                damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
                assert isinstance(decode_image(damaged.tobytes(), SPEC, max_pixels=MAX_PIXELS), Decoded | RowError)
