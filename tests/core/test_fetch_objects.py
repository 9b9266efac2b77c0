"""Where the clients that get objects look for them; nothing here is asked of AWS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ClientError, CredentialRetrievalError
from s3fs.errors import translate_boto_error

from imgbatch.config import StorageConfig
from imgbatch.core.fetch_objects import ObstoreClient, RequestFailed, S3fsClient

pytest.importorskip("obstore")

Answer = dict[str, Any] | Exception


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ObstoreClient]:
    """A client, and what HeadBucket is answered."""

    def open_client(*answers: Answer, **settings: Any) -> ObstoreClient:
        config = StorageConfig(**settings)
        s3fs_client = S3fsClient(config, 5.0)
        following = iter(answers)

        def call_s3(method: str, **_: str) -> dict[str, Any]:
            assert method == "head_bucket"
            answer = next(following)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(s3fs_client.fs, "call_s3", call_s3)
        return ObstoreClient(config, 5.0, s3fs_client)

    return open_client


def refusal(status: int, region: str | None = None) -> Exception:
    """What s3fs makes of HeadBucket's answer."""
    headers = {"x-amz-bucket-region": region} if region else {}
    answer = {"Error": {"Code": str(status)}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
    return translate_boto_error(ClientError(answer, "HeadBucket"))


def in_region(region: str) -> Answer:
    return {"BucketRegion": region, "ResponseMetadata": {"HTTPStatusCode": 200, "HTTPHeaders": {}}}


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://bucket.vpce-1a2b3c4d-5e6f.s3.us-west-2.vpce.amazonaws.com",
        "https://vpce-1a2b3c4d-5e6f-us-west-2a.s3.us-west-2.vpce.amazonaws.com",
        "http://objects-123.us-west-2.elb.amazonaws.com",
    ],
)
@pytest.mark.parametrize("by", ["settings", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_a_configured_endpoint_of_aws_stays(
    endpoint: str, by: str, client: Callable[..., ObstoreClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"endpoint_url": endpoint} if by == "settings" else {}
    if not settings:
        monkeypatch.setenv(by, endpoint)
    assert client(in_region("us-west-2"), **settings)._locate("images") == (endpoint, "us-west-2")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "https://s3.ca-central-1.amazonaws.com"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "https://s3-fips.ca-central-1.amazonaws.com"),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "https://s3.dualstack.ca-central-1.amazonaws.com"),
    ],
    ids=["plain", "fips", "dualstack"],
)
@pytest.mark.parametrize("configured", [None, "us-east-1", "us-west-2"])
def test_a_bucket_is_followed_into_its_region_by_the_same_kind_of_endpoint(
    environment: dict[str, str],
    expected: str,
    configured: str | None,
    client: Callable[..., ObstoreClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = client(in_region("ca-central-1"), region=configured)
    assert found._locate("images") == (expected, "ca-central-1")


def test_aws_in_china_has_endpoints_of_its_own(client: Callable[..., ObstoreClient]) -> None:
    found = client(in_region("cn-northwest-1"), region="cn-north-1")
    assert found._locate("images") == ("https://s3.cn-northwest-1.amazonaws.com.cn", "cn-northwest-1")


def test_a_refusal_tells_the_region_as_well(client: Callable[..., ObstoreClient]) -> None:
    found = client(refusal(403, "eu-west-1"), refusal(403), region="us-west-2")
    assert found._locate("images") == ("https://s3.eu-west-1.amazonaws.com", "eu-west-1")
    assert found._locate("silent") == ("https://s3.us-west-2.amazonaws.com", "us-west-2")


@pytest.mark.parametrize("failure", [refusal(503), TimeoutError("too long")], ids=["busy", "no answer"])
def test_a_region_that_could_not_be_asked_for_is_asked_for_again(
    failure: Exception, client: Callable[..., ObstoreClient]
) -> None:
    found = client(failure, in_region("eu-west-1"))
    with pytest.raises(RequestFailed) as failed:
        found.get("images", "a.jpg", max_bytes=1)
    assert failed.value.may_pass
    assert found._store("images").config["region"] == "eu-west-1"
    assert found._store("images") is found._store("images")


def test_without_an_answer_for_want_of_credentials_no_region_is_guessed(client: Callable[..., ObstoreClient]) -> None:
    failure = CredentialRetrievalError(provider="iam-role", error_msg="no answer")
    with pytest.raises(PermissionError, match="no answer"):
        client(failure)._locate("images")


def test_credentials_are_looked_up_once(client: Callable[..., ObstoreClient], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of buckets that share a client, and also where there are none."""
    found = client(endpoint_url="http://127.0.0.1:9")
    lookups: list[None] = []
    get_credentials = botocore.session.Session.get_credentials

    def counted(session: botocore.session.Session) -> Any:
        lookups.append(None)
        return get_credentials(session)

    monkeypatch.setattr(botocore.session.Session, "get_credentials", counted)
    for bucket in ("images", "others"):
        found._store(bucket)
    assert len(lookups) == 1
    monkeypatch.setattr(botocore.session.Session, "get_credentials", lambda _: lookups.append(None))
    without = client(endpoint_url="http://127.0.0.1:9")
    for bucket in ("images", "others", "images"):
        with pytest.raises(PermissionError, match="no credentials"):
            without.get(bucket, "a.jpg", max_bytes=1)
    assert len(lookups) == 2
