"""What decoding rasters takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def gdal() -> Iterator[None]:
    """GDAL set up as in the child that decodes."""
    from imgbatch.core.rasters import gdal_env

    with gdal_env():
        yield
