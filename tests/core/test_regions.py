from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from imgbatch.config import StorageConfig
from imgbatch.core import storage
from imgbatch.core.regions import bucket_region, region_warnings
from tests.core.answering import Answer, answering


@pytest.fixture
def bucket_in_europe(s3_bucket: str) -> str:
    """Beside the one of the fixture, which stands where the client is."""
    fs, path = storage.filesystem(f"{s3_bucket}-eu")
    try:
        fs.call_s3("create_bucket", Bucket=path, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    except Exception as error:  # a server of one region only
        pytest.skip(str(error))
    return f"{s3_bucket}-eu"


def test_buckets_elsewhere_are_named_once(s3_bucket: str, bucket_in_europe: str) -> None:
    here = bucket_region(s3_bucket)
    if here is None:
        pytest.skip("the server does not tell regions")
    uris = [f"{s3_bucket}/m.parquet", f"{bucket_in_europe}/1.jpg", f"{bucket_in_europe}/2.jpg", "/local.jpg", None]
    (line,) = region_warnings(uris, [here])
    assert f"{bucket_in_europe} in region eu-west-1" in line
    assert "work in us-east-1" in line
    assert region_warnings(uris, [here, "eu-west-1"]) == []


def test_without_a_region_to_compare_nobody_is_asked() -> None:
    assert region_warnings(["s3://bucket-that-is-nowhere/x"], []) == []


@contextmanager
def telling(status: int, region: str | None = None) -> Iterator[str]:
    """URL of a server that answers everything with ``status``, and with no region but the one given."""
    headers = (("x-amz-bucket-region", region),) if region else ()
    with answering(lambda _: Answer(status, headers=headers)) as (url, _):
        yield url


@pytest.mark.parametrize("status", [200, 403, 404])
def test_a_server_that_does_not_tell_is_met_with_silence(status: int, s3_bucket: str) -> None:
    with telling(status) as url:
        storage.configure(StorageConfig(endpoint_url=url))
        assert bucket_region(s3_bucket) is None
        assert region_warnings([f"{s3_bucket}/x"], ["us-east-1"]) == []


@pytest.mark.parametrize("status", [200, 403])
def test_whoever_may_not_look_at_a_bucket_is_told_its_region_all_the_same(status: int, s3_bucket: str) -> None:
    with telling(status, "eu-west-1") as url:
        storage.configure(StorageConfig(endpoint_url=url))
        assert bucket_region(s3_bucket) == "eu-west-1"
