"""Rasters for models of photographs, and photographs read as rasters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import rasterio
from PIL import ExifTags, Image
from rasterio.enums import ColorInterp

from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.raster_request import Window
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from tests.core.bad_inputs import png
from tests.core.raster_decoding import MAX_PIXELS, RGB, bands_spec, decode, encoded, pixels, stretched
from tests.rasters import noise, write_raster

pytestmark = pytest.mark.usefixtures("gdal")


def test_a_tile_is_resized_as_a_photograph_is(tmp_path):
    samples = noise(3, 40, 30, dtype="uint8", high=255)
    path = write_raster(tmp_path / "scene.tif", samples)
    spec = PreprocessSpec(resize_size=20, crop_size=16, interpolation="bicubic")
    reference = (
        Image.fromarray(np.ascontiguousarray(samples.transpose(1, 2, 0))).resize((20, 26), 3).crop((2, 5, 18, 21))
    )
    assert np.abs(pixels(path, spec).astype(int) - np.asarray(reference)).max() <= 1


def test_without_bands_in_the_model_the_raster_says_which_are_red_green_and_blue(tmp_path):
    samples = noise(3, 16, 16, dtype="uint8", high=255)
    colours = (ColorInterp.blue, ColorInterp.green, ColorInterp.red)
    path = write_raster(tmp_path / "scene.tif", samples, colorinterp=colours, photometric="minisblack")
    np.testing.assert_array_equal(pixels(path, RGB), samples[::-1].transpose(1, 2, 0))


def test_without_bands_in_the_model_16_bits_are_scaled_and_one_band_is_grey(tmp_path):
    samples = noise(2, 16, 16, high=60_000)
    crop = pixels(write_raster(tmp_path / "scene.tif", samples), RGB)
    grey = np.rint(samples[0] * (255 / 65535))
    np.testing.assert_array_equal(crop, np.stack([grey] * 3, axis=-1))


def test_a_palette_gives_its_colours(tmp_path):
    codes = np.arange(16, dtype="uint8").repeat(16).reshape(1, 16, 16)
    path = write_raster(tmp_path / "scene.tif", codes, photometric="palette")
    with rasterio.open(path, "r+") as scene:
        scene.write_colormap(1, {code: (code, 255 - code, 7, 255) for code in range(16)})
    assert pixels(path, RGB)[3, 0].tolist() == [3, 252, 7]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_read_as_a_raster_is_turned_as_a_photograph_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    ramp_HWC = np.linspace(0, 200, 65)[None, :, None] * (1.0, 0.7, 0.4) + np.linspace(0, 40, 80)[:, None, None]
    Image.fromarray(ramp_HWC.astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    spec = PreprocessSpec(resize_size=48, crop_size=48)
    raster = decode(tmp_path / "a.jpg", spec)
    photograph = decode_image((tmp_path / "a.jpg").read_bytes(), spec, max_pixels=MAX_PIXELS)
    assert isinstance(raster, Decoded)
    assert isinstance(photograph, Decoded)
    assert (raster.width, raster.height) == (photograph.width, photograph.height)
    assert np.abs(raster.pixels_HWC.astype(int) - photograph.pixels_HWC).max() <= 4
    stored = replace(spec, decode=DecodePolicy(apply_orientation=False))
    as_stored = decode(tmp_path / "a.jpg", stored)
    assert isinstance(as_stored, Decoded)
    assert (as_stored.width, as_stored.height) == (65, 80)


@pytest.mark.parametrize(
    ("dtype", "bits", "value", "grey"),
    [
        ("uint8", 1, 1, 255),
        ("uint8", 2, 2, 170),
        ("uint8", 4, 8, 136),
        ("uint16", 12, 2048, 128),
        ("int8", 8, 127, 255),
    ],
)
def test_without_bands_in_the_model_few_bits_are_scaled_from_what_they_can_hold(tmp_path, dtype, bits, value, grey):
    options = {"nbits": bits} if bits != 8 else {}
    path = write_raster(tmp_path / "scene.tif", np.full((1, 16, 16), value, dtype), **options)
    assert (pixels(path, RGB) == grey).all()


def test_a_png_of_few_bits_has_the_greys_of_a_photograph(tmp_path):
    for bits, line in ((1, b"\x0f\x0f"), (2, b"\x1b" * 4), (4, b"\x08\x9f" * 4)):
        data = png(16, 16, bits, 0, (b"\0" + line) * 16)
        (tmp_path / "scene.png").write_bytes(data)
        photograph = decode_image(data, RGB, max_pixels=MAX_PIXELS)
        assert isinstance(photograph, Decoded)
        np.testing.assert_array_equal(pixels(tmp_path / "scene.png", RGB), photograph.pixels_HWC)


def test_jpeg_in_tiff_and_a_progressive_jpeg_are_read(tmp_path):
    samples = noise(3, 128, 128, dtype="uint8", high=255)
    path = write_raster(tmp_path / "scene.tif", samples, compress="jpeg", photometric="ycbcr")
    assert isinstance(decode(path, RGB), Decoded)
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", progressive=True) + b"\0\0 padding")
    assert isinstance(decode(tmp_path / "a.jpg", RGB), Decoded)


def test_a_window_of_jpeg_2000(tmp_path):
    if "JP2OpenJPEG" not in rasterio.Env().drivers():
        pytest.skip("this GDAL has no JPEG 2000")
    samples_CHW = noise(3, 128, 128)
    lossless = {"driver": "JP2OpenJPEG", "QUALITY": 100, "REVERSIBLE": "YES"}
    path = write_raster(tmp_path / "scene.jp2", samples_CHW, **lossless)
    window, spec = Window(40, 24, 64, 64), bands_spec(0, 10_000, 3, 1, side=64)
    found = pixels(path, spec, window)
    np.testing.assert_array_equal(found, stretched(samples_CHW[[2, 0], 24:88, 40:104], 0, 10_000))
