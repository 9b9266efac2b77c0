"""Windows and bands of rasters, and the values in them."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp

from imgbatch.core.images import Decoded
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.raster_samples import read_samples
from imgbatch.core.rasters import RasterDecoder, open_raster
from imgbatch.errors import RowError, Status
from tests.core.raster_decoding import MAX_PIXELS, RGB, bands_spec, decode, failure, pixels, stretched
from tests.rasters import noise, write_raster

pytestmark = pytest.mark.usefixtures("gdal")


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
