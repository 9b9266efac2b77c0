"""What of a raster cannot be read, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rasterio.shutil import copy

from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.raster_samples import RasterRejected, read_samples
from imgbatch.core.rasters import RasterDecoder, open_raster
from imgbatch.errors import RowError, Status
from tests.core.raster_decoding import ENCODED, MAX_PIXELS, RGB, bands_spec, decode, encoded, failure, pixels, stretched
from tests.rasters import noise, write_raster

pytestmark = pytest.mark.usefixtures("gdal")


def test_a_tile_with_too_much_missing_is_empty(tmp_path):
    samples = noise(1, 16, 16)
    samples[:, :9] = 0
    path = write_raster(tmp_path / "scene.tif", samples, nodata=0)
    error = failure(path, bands_spec(0, 10_000, 1))
    assert error.status is Status.EMPTY
    assert error.message == "56% of the samples are missing, more than 0.5 (geo.max_nodata)"


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


def test_complex_numbers_are_rejected_before_reading(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise(1, 16, 16).astype("complex64"))
    with open_raster(str(path)) as scene, pytest.raises(RasterRejected, match="complex numbers"):
        read_samples(scene, Window(0, 0, 16, 16), (1,))
