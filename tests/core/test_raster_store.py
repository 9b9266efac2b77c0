from __future__ import annotations

import pytest

from imgbatch.core.raster_store import status_of_remote
from imgbatch.errors import Status


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("The AWS Access Key Id you provided does not exist in our records.", Status.FORBIDDEN),
        (
            "The request signature we calculated does not match the signature you provided. Check your key and method.",
            Status.FORBIDDEN,
        ),
        ("Access Denied", Status.FORBIDDEN),
        ("HTTP response code: 403", Status.FORBIDDEN),
        ("The specified key does not exist.", Status.NOT_FOUND),
        ("The specified bucket does not exist", Status.NOT_FOUND),
        ("HTTP response code: 404", Status.NOT_FOUND),
        (
            "'/vsis3/b/a.tif' does not exist in the file system, and is not recognized as a supported dataset name.",
            Status.NOT_FOUND,
        ),
        ("'/vsis3/b/a.txt' not recognized as being in a supported file format.", None),
        ("The security token included in the request does not exist any more.", None),
        ("HTTP response code: 503", None),
        ("Could not resolve host: s3.example", None),
    ],
)
def test_what_gdal_says_of_an_object_is_a_status_or_none(said: str, status: Status | None) -> None:
    assert status_of_remote(said) is status
