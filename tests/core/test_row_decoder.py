from __future__ import annotations

import pytest

from imgbatch.config import FetchConfig
from imgbatch.core.row_decoder import find_raster
from imgbatch.errors import RowError, Status


@pytest.mark.parametrize("shard", ["/shards/000.tar", "s3://bucket/000.tar", "https://host/000.tar"])
def test_a_raster_in_a_tar_file_is_refused(shard: str) -> None:
    place = find_raster(f"{shard}#bytes=512-1023", FetchConfig(schemes=("file", "s3", "https")))
    assert isinstance(place, RowError)
    assert (place.status, place.message) == (Status.REFUSED, "rasters are not read out of tar files; unpack the shard")
