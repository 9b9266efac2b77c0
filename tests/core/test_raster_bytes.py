from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from imgbatch.config import StorageConfig
from imgbatch.core import storage
from imgbatch.core.raster_bytes import RasterBytes, read_raster_bytes
from imgbatch.core.raster_samples import RasterRejected
from imgbatch.errors import Status
from tests.core.test_signatures import tiff
from tests.faults.proxy import Fault, FaultyServer, faulty_server

CONTENT = bytes(range(256)) * 40
ENDS = (CONTENT[:4096], CONTENT[-4096:], len(CONTENT))


@pytest.fixture
def server(s3_bucket: str, s3_server: str) -> Iterator[FaultyServer]:
    """Holds ``scene.tif`` in the bucket, and no other object."""
    storage.replace(f"{s3_bucket}/scene.tif", CONTENT)
    with faulty_server(s3_server) as (url, server):
        storage.configure(StorageConfig(endpoint_url=url))
        yield server


@pytest.mark.usefixtures("server")
def test_an_object_is_read_whole_up_to_a_size_and_a_larger_one_at_its_ends(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/scene.tif"
    assert read_raster_bytes(uri, max_bytes=len(CONTENT)) == RasterBytes(*ENDS, CONTENT)
    assert read_raster_bytes(uri, max_bytes=len(CONTENT) - 1) == RasterBytes(*ENDS)
    assert read_raster_bytes(uri.replace("s3://", "s3a://")) == RasterBytes(*ENDS)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("size", [0, 1, 4096])
def test_an_object_that_is_all_ends(size: int, s3_bucket: str) -> None:
    storage.replace(f"{s3_bucket}/small.tif", CONTENT[:size])
    found = read_raster_bytes(f"{s3_bucket}/small.tif")
    assert (found.head, found.tail, found.size) == (CONTENT[:size], CONTENT[:size], size)


def test_a_local_file_is_read_at_its_ends(tmp_path: Path) -> None:
    (tmp_path / "scene.tif").write_bytes(CONTENT)
    assert read_raster_bytes(str(tmp_path / "scene.tif")) == RasterBytes(*ENDS)


@pytest.mark.parametrize("max_bytes", [0, len(CONTENT)], ids=["ends", "whole"])
@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("truncate", Status.FETCH_FAILED),
        ("reset", Status.FETCH_FAILED),
        ("503", Status.FETCH_FAILED),
        ("403", Status.FORBIDDEN),
        ("404", Status.NOT_FOUND),
    ],
)
def test_an_object_that_cannot_be_had_is_asked_for_once(
    action: str, status: Status, max_bytes: int, server: FaultyServer, s3_bucket: str
) -> None:
    server.faults = [Fault("GET", r"/scene\.tif", action)]
    with pytest.raises(RasterRejected) as failure:
        read_raster_bytes(f"{s3_bucket}/scene.tif", max_bytes=max_bytes)
    assert failure.value.status is status
    # aiohttp itself may ask again where a connection is reset that it had kept.
    assert len(server.acted) in ((1, 2) if action == "reset" else (1,))


@pytest.mark.usefixtures("server")
def test_an_object_that_is_not_there_is_not_found(s3_bucket: str) -> None:
    with pytest.raises(RasterRejected) as failure:
        read_raster_bytes(f"{s3_bucket}/none.tif", max_bytes=10)
    assert failure.value.status is Status.NOT_FOUND


def test_a_tiff_is_cut_before_its_directory_and_anything_else_before_its_end() -> None:
    whole = tiff("<", big=False, directory=9000, size=10_000)
    assert not RasterBytes.of(whole).are_of_a_cut("TIFF")
    assert RasterBytes.of(whole[:9000]).are_of_a_cut("TIFF")
    assert RasterBytes(whole[:4096], whole[-4096:], 9000).are_of_a_cut("TIFF")
    assert not RasterBytes.of(bytes(5000) + b"IEND\xaeB\x60\x82").are_of_a_cut("PNG")
    assert RasterBytes.of(bytes(5000)).are_of_a_cut("PNG")
