"""What is asked of a raster that it cannot give, or that cannot be asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.rasters import RasterDecoder, gdal_env
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Status
from tests.core.test_signatures import tiff
from tests.rasters import noise, write_raster


@pytest.fixture(autouse=True)
def gdal() -> Iterator[None]:
    with gdal_env():
        yield


def refused(request: RasterRequest) -> RowError:
    error = RasterDecoder(PreprocessSpec(16, 16), max_pixels=10**6, max_nodata=0.5).decode(request)
    assert isinstance(error, RowError)
    return error


def test_a_window_with_a_null_is_bad(tmp_path: Path) -> None:
    """As in a manifest with image_ids of its own, which need no window."""
    path = str(write_raster(tmp_path / "scene.tif", noise(3, 16, 16)))
    error = refused(RasterRequest(path, Window(0, None, 16, 16)))  # type: ignore[arg-type]
    assert (error.status, error.message) == (Status.BAD_WINDOW, "a field of the window is null: 0, None, 16, 16")


@pytest.mark.parametrize(("bands", "stranger"), [((0, 2, 3), 0), ((1, -1, 2), -1), ((1, None, 2), None)])
def test_the_band_that_is_not_there_is_named(tmp_path: Path, bands: tuple[int, ...], stranger: int | None) -> None:
    path = str(write_raster(tmp_path / "scene.tif", noise(3, 16, 16)))
    error = refused(RasterRequest(path, bands=bands))
    assert error.status is Status.UNSUPPORTED_FORMAT
    assert error.message == f"band {stranger} is asked for, but there are 3"


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_cut_bigtiff_is_truncated_and_one_with_a_damaged_directory_is_not(tmp_path: Path, order: str) -> None:
    for size, status in ((1000, Status.TRUNCATED), (5000, Status.CORRUPT)):
        data = tiff(order, big=True, directory=4000, size=size)
        (tmp_path / "scene.tif").write_bytes(data)
        assert refused(RasterRequest(str(tmp_path / "scene.tif"))).status is status
        assert refused(RasterRequest(data=data)).status is status
