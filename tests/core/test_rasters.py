from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from PIL import ExifTags, Image
from rasterio.enums import ColorInterp
from rasterio.shutil import copy

from imgbatch.core.bands import BandSpec
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.raster_samples import RasterRejected, read_samples
from imgbatch.core.rasters import RasterDecoder, gdal_env, open_raster
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from imgbatch.errors import RowError, Status
from tests.core.bad_inputs import png
from tests.rasters import noise, write_raster

MAX_PIXELS = 120_000_000
RGB = PreprocessSpec(resize_size=16, crop_size=16)


@pytest.fixture(autouse=True)
def gdal() -> Iterator[None]:
    with gdal_env():
        yield


def bands_spec(low: float, high: float, *indices: int, side: int = 16, mean: float = 0.5) -> PreprocessSpec:
    count = len(indices)
    spec = BandSpec(indices, (low,) * count, (high,) * count)
    return PreprocessSpec(resize_size=side, crop_size=side, mean=(mean,) * count, std=(0.25,) * count, bands=spec)


def decode(path: Path, spec: PreprocessSpec, window: Window | None = None, **request) -> Decoded | RowError:
    decoder = RasterDecoder(spec, max_pixels=MAX_PIXELS, max_nodata=0.5)
    return decoder.decode(RasterRequest(str(path), window, **request))


def pixels(path: Path, spec: PreprocessSpec, window: Window | None = None, **request) -> np.ndarray:
    outcome = decode(path, spec, window, **request)
    assert isinstance(outcome, Decoded), outcome
    return outcome.pixels_HWC


def failure(path: Path, spec: PreprocessSpec = RGB, window: Window | None = None, **request) -> RowError:
    outcome = decode(path, spec, window, **request)
    assert isinstance(outcome, RowError), outcome
    return outcome


def stretched(values_CHW: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(np.rint((values_CHW.astype(np.float64) - low) * 255 / (high - low)), 0, 255).transpose(1, 2, 0)


def test_a_request_survives_the_way_to_the_child():
    for request in (
        RasterRequest("a.tif", Window(1, 2, 3, 4), (4, 1)),
        RasterRequest("a.tif"),
        RasterRequest(None, None, (2,), b"II*\0" * 100),
    ):
        assert RasterRequest.from_bytes(request.to_bytes()) == request


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_every_sample_type_is_stretched_alike(tmp_path, dtype):
    samples = noise(3, 16, 16, dtype=dtype, high=120)
    path = write_raster(tmp_path / "scene.tif", samples)
    np.testing.assert_array_equal(pixels(path, bands_spec(10, 90, 1, 2, 3)), stretched(samples, 10, 90))


def test_negative_values_and_an_inverted_order_of_bands(tmp_path):
    samples = noise(3, 16, 16, dtype="int16") - 5000
    path = write_raster(tmp_path / "scene.tif", samples.astype("int16"))
    expected = stretched(samples[::-1], -4000, 4000)
    np.testing.assert_array_equal(pixels(path, bands_spec(-4000, 4000, 3, 2, 1)), expected)


def test_scale_and_offset_of_each_band_give_the_values(tmp_path):
    samples = noise(2, 16, 16)
    path = write_raster(tmp_path / "scene.tif", samples, scales=(0.0001, 2.0), offsets=(-0.1, 50.0))
    spec = bands_spec(0.0, 0.8, 1)
    np.testing.assert_array_equal(pixels(path, spec), stretched(samples[:1] * 0.0001 - 0.1, 0.0, 0.8))
    np.testing.assert_array_equal(pixels(path, bands_spec(0, 9000, 2)), stretched(samples[1:] * 2.0 + 50, 0, 9000))


def test_a_window_is_read_and_nothing_around_it(tmp_path):
    samples = noise(4, 100, 90)
    path = write_raster(tmp_path / "scene.tif", samples, tiled=True, blockxsize=32, blockysize=32)
    window = Window(70, 20, 16, 16)
    expected = stretched(samples[[3, 0], 20:36, 70:86], 0, 10_000)
    outcome = decode(path, bands_spec(0, 10_000, 4, 1), window)
    assert isinstance(outcome, Decoded)
    np.testing.assert_array_equal(outcome.pixels_HWC, expected)
    assert (outcome.width, outcome.height) == (16, 16)


def test_the_bands_of_a_row_win_over_those_of_the_model(tmp_path):
    samples = noise(4, 16, 16)
    path = write_raster(tmp_path / "scene.tif", samples)
    spec = bands_spec(0, 10_000, 1, 2)
    np.testing.assert_array_equal(pixels(path, spec, bands=(4, 3)), stretched(samples[[3, 2]], 0, 10_000))


@pytest.mark.parametrize(
    "window",
    [Window(0, 0, 17, 16), Window(-1, 0, 4, 4), Window(0, 0, 0, 4), Window(10, 10, 4, 7), Window(99, 0, 4, 4)],
)
def test_a_window_that_is_not_within_the_raster_is_bad(tmp_path, window):
    path = write_raster(tmp_path / "scene.tif", noise(3, 16, 16))
    error = failure(path, window=window)
    assert error.status is Status.BAD_WINDOW
    assert "of a raster of 16 x 16" in error.message


def test_bands_that_are_not_there_or_too_few_are_unsupported(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise(3, 16, 16))
    assert failure(path, bands_spec(0, 1, 1, 4)).message == "band 4 is asked for, but there are 3"
    error = failure(path, bands_spec(0, 1, 1, 2), bands=(1,))
    assert (error.status, error.message) == (
        Status.UNSUPPORTED_FORMAT,
        "1 bands are asked for, but the model takes 2",
    )


def test_missing_samples_become_the_mean_of_the_band(tmp_path):
    samples = noise(2, 16, 16)
    samples[:, :4] = 0
    path = write_raster(tmp_path / "scene.tif", samples, nodata=0)
    crop = pixels(path, bands_spec(0, 10_000, 1, 2, mean=0.4))
    assert (crop[:4] == 102).all()
    np.testing.assert_allclose(crop[4:], stretched(samples, 0, 10_000)[4:], atol=1)


def test_a_float_without_a_number_is_missing(tmp_path):
    samples = noise(1, 16, 16).astype("float32")
    samples[0, 0, :3] = np.nan, np.inf, -np.inf
    path = write_raster(tmp_path / "scene.tif", samples)
    assert (pixels(path, bands_spec(0, 10_000, 1, mean=0.2))[0, :3] == 51).all()


@pytest.mark.parametrize("kind", ["mask", "alpha"])
def test_a_mask_and_alpha_say_what_is_missing(tmp_path, kind):
    samples = noise(3, 16, 16, dtype="uint8", high=255)
    there = np.ones((16, 16), bool)
    there[:, 12:] = False
    if kind == "mask":
        path = write_raster(tmp_path / "scene.tif", samples, mask=there)
    else:
        with_alpha = np.concatenate([samples, there[None].astype("uint8") * 255])
        colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
        path = write_raster(tmp_path / "scene.tif", with_alpha, colorinterp=colours)
    crop = pixels(path, RGB)
    assert (crop[:, 12:] == 255).all()
    np.testing.assert_array_equal(crop[:, :12], samples.transpose(1, 2, 0)[:, :12])


def test_a_tile_with_too_much_missing_is_empty(tmp_path):
    samples = noise(1, 16, 16)
    samples[:, :9] = 0
    path = write_raster(tmp_path / "scene.tif", samples, nodata=0)
    error = failure(path, bands_spec(0, 10_000, 1))
    assert error.status is Status.EMPTY
    assert error.message == "56% of the samples are missing, more than 0.5 (geo.max_nodata)"


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


def test_a_south_up_scene_is_turned_and_one_without_a_place_is_not(tmp_path):
    samples = noise(1, 16, 16)
    spec = bands_spec(0, 10_000, 1)
    expected = stretched(samples, 0, 10_000)
    south_up = write_raster(tmp_path / "south.tif", samples, transform=Affine(10, 0, 0, 0, 10, 0))
    no_place = write_raster(tmp_path / "nowhere.tif", samples, crs=None, transform=Affine(10, 0, 0, 0, 10, 0))
    both = write_raster(tmp_path / "both.tif", samples, transform=Affine(-10, 0, 0, 0, 10, 0))
    np.testing.assert_array_equal(pixels(south_up, spec), expected[::-1])
    np.testing.assert_array_equal(pixels(no_place, spec), expected)
    np.testing.assert_array_equal(pixels(both, spec), expected[::-1, ::-1])


def test_a_rotated_scene_is_read_as_it_is_stored(tmp_path):
    samples_CHW = noise(3, 16, 16, dtype="uint8", high=255)
    turned = Affine(10, 0, 500_000, 0, -10, 5_000_000) * Affine.rotation(30)
    path = write_raster(tmp_path / "a.tif", samples_CHW, transform=turned)
    np.testing.assert_array_equal(pixels(path, bands_spec(0, 255, 1, 2, 3)), samples_CHW.transpose(1, 2, 0))


def test_a_tile_is_resized_as_a_photograph_is(tmp_path):
    samples = noise(3, 40, 30, dtype="uint8", high=255)
    path = write_raster(tmp_path / "scene.tif", samples)
    spec = PreprocessSpec(resize_size=20, crop_size=16, interpolation="bicubic")
    reference = (
        Image.fromarray(np.ascontiguousarray(samples.transpose(1, 2, 0))).resize((20, 26), 3).crop((2, 5, 18, 21))
    )
    assert np.abs(pixels(path, spec).astype(int) - np.asarray(reference)).max() <= 1


def test_a_large_window_takes_the_overviews(tmp_path):
    path = write_raster(tmp_path / "scene.tif", np.full((1, 512, 512), 1000, "uint16"), tiled=True)
    with rasterio.open(path, "r+") as scene:
        scene.build_overviews([4], rasterio.enums.Resampling.average)
    # Overviews that say something else than the pixels show which of the two were read.
    with rasterio.open(path, "r+", overview_level=0) as overview:
        overview.write(np.full((1, 128, 128), 4000, "uint16"))
    spec = bands_spec(0, 10_000, 1)
    assert (pixels(path, spec) == 102).all()
    assert (pixels(path, spec, Window(0, 0, 32, 32)) == 26).all()


def test_a_large_window_without_overviews_is_averaged_without_what_is_missing(tmp_path):
    samples = np.full((1, 256, 256), 4000, "uint16")
    samples[:, ::4, ::4] = 0
    path = write_raster(tmp_path / "scene.tif", samples, nodata=0)
    assert (pixels(path, bands_spec(0, 10_000, 1)) == 102).all()


def test_a_window_of_too_many_pixels_is_too_large(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise(1, 40, 40))
    decoder = RasterDecoder(bands_spec(0, 1, 1), max_pixels=1000, max_nodata=0.5)
    outcome = decoder.decode(RasterRequest(str(path)))
    assert isinstance(outcome, RowError)
    assert outcome.status is Status.TOO_LARGE


def test_an_embedded_raster_is_read_too(tmp_path):
    samples = noise(1, 16, 16)
    data = write_raster(tmp_path / "scene.tif", samples).read_bytes()
    decoder = RasterDecoder(bands_spec(0, 10_000, 1), max_pixels=MAX_PIXELS, max_nodata=0.5)
    outcome = decoder.decode(RasterRequest(None, data=data))
    assert isinstance(outcome, Decoded)
    np.testing.assert_array_equal(outcome.pixels_HWC, stretched(samples, 0, 10_000))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2000:-200] = b"\xff" * 1800
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (cut, Status.TRUNCATED),
        (scramble, Status.CORRUPT),
        (lambda path: path.write_bytes(b""), Status.EMPTY),
        (lambda path: path.write_text("<VRTDataset/>"), Status.NOT_AN_IMAGE),
        (lambda path: path.write_bytes(b"II*\0\x08\0\0\0\0\0"), Status.CORRUPT),
        (lambda path: path.write_bytes(b"8BPS" + bytes(40)), Status.UNSUPPORTED_FORMAT),
    ],
)
def test_what_is_wrong_with_a_file_is_its_status(tmp_path, damage: Callable[[Path], object], status):
    path = write_raster(tmp_path / "scene.tif", noise(1, 64, 64), compress="deflate")
    damage(path)
    assert failure(path).status is status


ENCODED = {"JPEG": {"quality": 95}, "PNG": {}}


def encoded(kind: str, size: int = 128, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(noise(3, size, size, dtype="uint8", high=255).transpose(1, 2, 0)))
    image.save(buffer, kind, **ENCODED[kind], **options)
    return buffer.getvalue()


def both_ways(tmp_path: Path, data: bytes) -> tuple[Status, Status]:
    """Statuses of a damaged raster as a file, and embedded in the manifest."""
    (tmp_path / "scene.bin").write_bytes(data)
    decoder = RasterDecoder(RGB, max_pixels=MAX_PIXELS, max_nodata=0.5)
    embedded = decoder.decode(RasterRequest(None, data=data))
    assert isinstance(embedded, RowError), embedded
    return failure(tmp_path / "scene.bin").status, embedded.status


@pytest.mark.parametrize("side", [512, 20])
@pytest.mark.parametrize("kind", ENCODED)
def test_a_jpeg_or_png_cut_short_is_truncated(tmp_path, kind, side):
    """20 px are read at full resolution, 512 px of a JPEG as its decoder reduces them."""
    data = encoded(kind, side)
    assert both_ways(tmp_path, data[: len(data) // 2]) == (Status.TRUNCATED, Status.TRUNCATED)


@pytest.mark.parametrize("kind", ENCODED)
def test_a_damaged_jpeg_or_png_is_corrupt_rather_than_filled(tmp_path, kind):
    data = encoded(kind)
    middle = len(data) // 2
    damaged = data[:middle] + b"\xff\x00" * 100 + data[middle + 3000 :]
    assert both_ways(tmp_path, damaged) == (Status.CORRUPT, Status.CORRUPT)


def test_no_tile_below_the_damage_of_a_jpeg_is_filled(tmp_path):
    """libjpeg tells of it once, and what follows in the same reading is grey."""
    data = encoded("JPEG", 512)
    middle = len(data) // 2
    (tmp_path / "scene.jpg").write_bytes(data[:middle] + b"\xff\x00" * 100 + data[middle + 3000 :])
    decoder = RasterDecoder(RGB, max_pixels=MAX_PIXELS, max_nodata=0.5)
    rows = [decoder.decode(RasterRequest(str(tmp_path / "scene.jpg"), Window(0, y, 32, 32))) for y in range(0, 512, 32)]
    damaged = [isinstance(row, RowError) for row in rows]
    assert 4 < damaged.index(True) < 12
    assert all(damaged[damaged.index(True) :])


def test_bytes_before_the_end_of_a_jpeg_cost_nothing_as_in_a_photograph(tmp_path):
    data = encoded("JPEG")
    padded = data[:-2] + bytes(20) + data[-2:]
    (tmp_path / "plain.jpg").write_bytes(data)
    (tmp_path / "scene.jpg").write_bytes(padded)
    assert isinstance(decode_image(padded, RGB, max_pixels=MAX_PIXELS), Decoded)
    assert np.array_equal(pixels(tmp_path / "scene.jpg", RGB), pixels(tmp_path / "plain.jpg", RGB))


def test_a_whole_png_with_a_damaged_header_is_corrupt(tmp_path):
    data = encoded("PNG")
    assert len(data) > 4096
    assert both_ways(tmp_path, data[:16] + b"\x01" + data[17:]) == (Status.CORRUPT, Status.CORRUPT)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", Status.EMPTY),
        (b"no raster at all", Status.NOT_AN_IMAGE),
        (b"8BPS" + bytes(40), Status.UNSUPPORTED_FORMAT),
        (b"II*\0\x08\0\0\0\0\0", Status.CORRUPT),
        (b"II*\0\x08\0\0\1\0\0", Status.TRUNCATED),
    ],
)
def test_an_embedded_raster_that_cannot_be_opened_says_why(tmp_path, data, status):
    assert both_ways(tmp_path, data) == (status, status)


def test_an_embedded_tiff_cut_short_is_truncated(tmp_path):
    data = write_raster(tmp_path / "scene.tif", noise(3, 64, 64)).read_bytes()
    assert both_ways(tmp_path, data[:-300]) == (Status.TRUNCATED, Status.TRUNCATED)


def test_of_bands_stored_one_after_the_other_those_that_are_there_are_read(tmp_path):
    samples = noise(3, 64, 64)
    path = write_raster(tmp_path / "scene.tif", samples, interleave="band")
    path.write_bytes(path.read_bytes()[:-3000])
    first_two = pixels(path, bands_spec(0, 10_000, 1, 2, side=64))
    np.testing.assert_allclose(first_two, stretched(samples[:2], 0, 10_000), atol=1)
    assert isinstance(decode(path, bands_spec(0, 10_000, 1, 2)), Decoded)
    for side in (64, 16):
        assert failure(path, bands_spec(0, 10_000, 1, 3, side=side)).status is Status.TRUNCATED


def test_a_raster_that_is_gone_or_may_not_be_read_is_not_called_empty(tmp_path):
    with pytest.raises(RasterRejected) as gone:
        open_raster(str(tmp_path / "gone.tif"))
    assert gone.value.status is Status.NOT_FOUND
    path = write_raster(tmp_path / "secret.tif", noise(1, 16, 16))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert failure(path).status is Status.FORBIDDEN


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


def test_a_tile_that_cannot_be_read_says_nothing_about_the_next(tmp_path):
    path = write_raster(tmp_path / "a.tif", noise(3, 192, 192), tiled=True, blockxsize=64, blockysize=64)
    decoder = RasterDecoder(RGB, max_pixels=10**6, max_nodata=0.5)
    whole = decoder.decode(RasterRequest(str(path), Window(0, 0, 32, 32)))
    broken = write_raster(tmp_path / "b.tif", noise(3, 192, 192), tiled=True, blockxsize=64, blockysize=64)
    cut(broken)
    for _ in range(2):
        lost = decoder.decode(RasterRequest(str(broken), Window(160, 160, 32, 32)))
        assert isinstance(lost, RowError)
        assert lost.status == Status.TRUNCATED
        for uri in (path, broken):
            found = decoder.decode(RasterRequest(str(uri), Window(0, 0, 32, 32)))
            assert isinstance(found, Decoded)
            np.testing.assert_array_equal(found.pixels_HWC, whole.pixels_HWC)


def test_a_file_that_names_another_is_not_followed(tmp_path):
    target = write_raster(tmp_path / "scene.tif", noise(1, 16, 16))
    copy(str(target), str(tmp_path / "link.vrt"), driver="VRT")
    assert failure(tmp_path / "link.vrt").status is Status.NOT_AN_IMAGE


def test_scenes_stay_open_up_to_a_limit(tmp_path):
    paths = [write_raster(tmp_path / f"{index}.tif", noise(1, 16, 16, seed=index)) for index in range(12)]
    decoder = RasterDecoder(bands_spec(0, 10_000, 1), max_pixels=MAX_PIXELS, max_nodata=0.5)
    for path in [*paths, *paths]:
        assert isinstance(decoder.decode(RasterRequest(str(path))), Decoded)
    assert len(decoder._scenes) == 8


def test_every_real_file_has_the_values_that_rasterio_reads(test_data):
    files = sorted(path for path in (test_data / "geotiff").rglob("*") if path.suffix.lower() in (".tif", ".tiff"))
    assert len(files) > 30
    failed = {}
    for path in files:
        with open_raster(str(path)) as scene:
            window, bands = Window(0, 0, scene.width, scene.height), scene.indexes
            try:
                values = read_samples(scene, window, bands).values()
            except rasterio.errors.RasterioIOError:
                failed[path.name] = failure(path, bands_spec(0, 255, *bands)).status
                continue
            scales, offsets = (np.array(per_band)[:, None, None] for per_band in (scene.scales, scene.offsets))
            there = (scene.read_masks() > 0) & np.isfinite(scene.read())
            expected = np.where(there, scene.read() * scales + offsets, np.nan)
        np.testing.assert_array_equal(values, expected, err_msg=str(path))
    assert failed == {"corrupt.tif": Status.TRUNCATED}


def test_every_real_file_becomes_a_crop_or_says_why_not(test_data):
    files = sorted(path for path in (test_data / "geotiff").rglob("*") if path.suffix.lower() in (".tif", ".tiff"))
    decoder = RasterDecoder(RGB, max_pixels=MAX_PIXELS, max_nodata=0.9)
    outcomes = {path.name: decoder.decode(RasterRequest(str(path))) for path in files}
    statuses = {name: outcome.status for name, outcome in outcomes.items() if isinstance(outcome, RowError)}
    assert statuses == {
        "all-nodata.tif": Status.EMPTY,
        "inverted_lat.tif": Status.EMPTY,  # nodata throughout
        "corrupt.tif": Status.TRUNCATED,
    }


def test_complex_numbers_are_rejected_before_reading(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise(1, 16, 16).astype("complex64"))
    with open_raster(str(path)) as scene, pytest.raises(RasterRejected, match="complex numbers"):
        read_samples(scene, Window(0, 0, 16, 16), (1,))
