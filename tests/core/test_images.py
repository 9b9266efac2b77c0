"""What becomes of the colours of every format and mode."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from tests.core.bad_inputs import png, png_chunk
from tests.core.encoding import GREY, assert_uniform, decoded, encode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_keeps_its_colour_and_size(kind: str) -> None:
    data = encode(Image.new("RGB", (20, 10), GREY), kind)
    assert_uniform(data, GREY, tolerance=3)
    assert (decoded(data).width, decoded(data).height) == (20, 10)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32768, 128), (40000, 156), (65535, 255)])
def test_16_bit_grey_is_scaled(kind: str, value: int, expected: int) -> None:
    samples_HW = np.full((10, 10), value, np.uint16)
    assert_uniform(encode(Image.fromarray(samples_HW), kind), (expected,) * 3)


def test_16_bit_grey_png_with_a_transparent_value_shows_the_background() -> None:
    samples_HW = np.full((10, 10), 1000, np.uint16)
    data = encode(Image.fromarray(samples_HW), "PNG", transparency=1000)
    assert_uniform(data, (255, 255, 255))
    assert_uniform(encode(Image.fromarray(samples_HW), "PNG", transparency=1001), (4, 4, 4))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
        ([0.0, 1e9, 2e9], [0, 128, 255]),
        ([-5.0, float("nan"), 1.0], [0, 0, 255]),
        ([0.0, 0.5, float("inf")], [0, 128, 255]),
    ],
)
def test_float_tiff_is_scaled_by_the_range_it_fits(samples: list[float], expected: list[int]) -> None:
    samples_HW = np.repeat(np.array(samples, np.float32), 10)[None, :].repeat(30, axis=0)
    data = encode(Image.fromarray(samples_HW), "TIFF")
    middle_C = decoded(data, PreprocessSpec(resize_size=30, crop_size=30)).pixels_HWC[15, 5::10, 0]
    assert np.abs(middle_C.astype(int) - expected).max() <= 1


def test_32_bit_integers_are_read_as_16_bit_ones() -> None:
    data = encode(Image.fromarray(np.full((9, 9), 32768, np.int32)), "TIFF")
    assert_uniform(data, (128, 128, 128))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [0, 64, 200, 255])
def test_alpha_is_composited_on_the_background(kind: str, alpha: int) -> None:
    background = (255, 0, 128)
    spec = PreprocessSpec(resize_size=8, crop_size=8, decode=DecodePolicy(background=background))
    data = encode(Image.new("RGBA", (10, 10), (*GREY, alpha)), kind, **({"lossless": True} if kind == "WEBP" else {}))
    share = alpha / 255
    expected = [c * share + b * (1 - share) for c, b in zip(GREY, background, strict=True)]
    assert np.abs(decoded(data, spec).pixels_HWC - np.array(expected)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA"])
def test_transparent_values_of_every_mode_show_the_background(mode: str) -> None:
    image = Image.new("RGB", (10, 10), 0).convert(mode)
    if mode == "LA":
        image.putalpha(0)
    options = {} if mode == "LA" else {"transparency": (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))}
    assert_uniform(encode(image, "PNG", **options), (255, 255, 255))


@pytest.mark.parametrize(("bits", "value", "grey"), [(1, 1, 255), (2, 2, 170), (4, 8, 136), (8, 99, 99)])
def test_a_transparent_value_of_few_bits_shows_the_background(bits: int, value: int, grey: int) -> None:
    line = b"\0" + bytes([sum(value << shift for shift in range(0, 8, bits))]) * (2 * bits)
    for transparent, expected in ((value, (255, 255, 255)), (value - 1, (grey,) * 3)):
        chunk = png_chunk(b"tRNS", struct.pack(">H", transparent))
        assert_uniform(png(16, 16, bits, 0, line * 16, chunk), expected)


def test_palette_and_bilevel_become_colours() -> None:
    assert_uniform(encode(Image.new("RGB", (10, 10), GREY).quantize(4), "PNG"), GREY)
    assert_uniform(encode(Image.new("1", (10, 10), 1), "PNG"), (255, 255, 255))


def test_cmyk_follows_the_ink_formula() -> None:
    cyan, magenta, yellow, black = 30, 100, 180, 60
    expected = tuple(round((255 - ink) * (255 - black) / 255) for ink in (cyan, magenta, yellow))
    image = Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black))
    assert_uniform(encode(image, "TIFF"), expected, tolerance=2)  # type: ignore[arg-type]
    assert_uniform(encode(image, "JPEG", quality=100), expected, tolerance=4)  # type: ignore[arg-type]


def test_lab_and_ycbcr_become_rgb() -> None:
    assert_uniform(encode(Image.new("LAB", (10, 10), (136, 128, 128)), "TIFF"), (128, 128, 128), tolerance=3)
    assert_uniform(encode(Image.new("RGB", (16, 16), GREY), "TIFF", compression="jpeg", quality=100), GREY, 4)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in (GREY, (255, 0, 0))]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert_uniform(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options), GREY, 3)


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert_uniform(encode(Image.new("RGB", (10, 10), GREY), "PNG", icc_profile=profile), GREY)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_median_filter_takes_single_pixels_out(kind: str) -> None:
    speckled = Image.new("RGB", (16, 16), GREY)
    speckled.putpixel((6, 9), (255, 255, 255))
    data = encode(speckled, kind, **({"quality": 100} if kind == "JPEG" else {}))
    clean, plain = (decoded(data, PreprocessSpec(16, 16, median_size=size)).pixels_HWC for size in (3, 0))
    assert np.abs(clean.astype(int) - GREY).max() <= 6
    assert plain.max() > 200
