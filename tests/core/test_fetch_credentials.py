"""Where the clients that get objects have their credentials from, and what becomes of rows where there are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from imgbatch.config import FetchConfig, StorageConfig
from imgbatch.core import fetch_objects, once, storage
from imgbatch.core.fetch import Fetched, Fetcher
from imgbatch.core.fetch_objects import ClientName
from imgbatch.errors import RowError, Status
from tests.core.answering import Answer, Asked, answering

URI = "s3://images/a.jpg"
REFUSED = Answer(503)


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a region, and that the machine has no role."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest) -> ClientName:
    if request.param == "obstore":
        pytest.importorskip("obstore")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def objects() -> Iterator[list[Asked]]:
    """What a server is asked that has every object, and that the process is configured to ask with profile nights."""
    with answering(lambda _: Answer(body=b"image", headers=(("ETag", '"etag"'),))) as (url, requests):
        storage.configure(StorageConfig(endpoint_url=url, profile="nights"))
        yield requests
    storage.configure(StorageConfig())


@pytest.fixture
def of_the_environment(objects: list[Asked]) -> list[Asked]:
    """The same without a profile."""
    storage.configure(storage.settings().model_copy(update={"profile": None}))
    return objects


def fetcher(client: ClientName) -> Fetcher:
    return Fetcher(FetchConfig(client=client, in_flight=8, retries=1))


def keys_used(objects: list[Asked]) -> list[str]:
    """The access key that each request was signed with."""
    return [asked.headers["authorization"].partition("Credential=")[2].partition("/")[0] for asked in objects]


NOBODY = "/nonexistent/file"


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ("", r"profile \(nights\) could not be found"),
        ("[profile nights", "Unable to parse config file"),
        ("[profile nights]\naws_access_key_id = id", "Partial credentials"),
        ("[profile nights]\nregion = eu-west-1", "no credentials in the environment"),
        (f"[profile nights]\ncredential_process = {NOBODY}", f"No such file or directory: '{NOBODY}'"),
        (
            f"[profile nights]\nrole_arn = arn:aws:iam::123456789012:role/n\nweb_identity_token_file = {NOBODY}",
            f"No such file or directory: '{NOBODY}'",
        ),
    ],
    ids=["no profile", "broken file", "half a key", "nothing in it", "no helper", "no token file"],
)
def test_without_credentials_rows_are_forbidden(
    configuration: str,
    reason: str,
    client: ClientName,
    objects: list[Asked],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "config"
    config.write_text(configuration)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with fetcher(client) as files:
        errors = list(files.fetch([URI] * 20))
    assert {(error.status, error.attempts) for error in errors if isinstance(error, RowError)} == {
        (Status.FORBIDDEN, 1)
    }
    for error in errors:
        assert isinstance(error, RowError)
        with pytest.raises(PermissionError, match=reason):
            raise PermissionError(error.message)
    assert objects == []


@pytest.mark.usefixtures("objects")
def test_a_helper_that_fails_is_asked_once(client: ClientName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper, calls, config = tmp_path / "helper.sh", tmp_path / "calls", tmp_path / "config"
    helper.write_text(f"echo called >> {calls}\necho no ticket >&2\nexit 1\n")
    config.write_text(f"[profile nights]\ncredential_process = sh {helper}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    with fetcher(client) as files:
        errors = list(files.fetch([URI] * 50))
    assert {error.status for error in errors if isinstance(error, RowError)} == {Status.FORBIDDEN}
    assert all(isinstance(error, RowError) and "no ticket" in error.message for error in errors)
    assert calls.read_text() == "called\n"


class Metadata:
    """The metadata of a machine with a role, which refuse the next ``num_refused`` requests."""

    def __init__(self, num_refused: int) -> None:
        self.num_refused = num_refused
        self.num_asked = 0

    def __call__(self, asked: Asked) -> Answer:
        self.num_asked += 1
        if self.num_refused > 0:
            self.num_refused -= 1
            return REFUSED
        if asked.method == "PUT":
            return Answer(body=b"token")
        if asked.path.endswith("/security-credentials/"):
            return Answer(body=b"role")
        return credentials("ROLE", timedelta(hours=6))


def credentials(key: str, valid_for: timedelta) -> Answer:
    expires = f"{datetime.now(UTC) + valid_for:%Y-%m-%dT%H:%M:%SZ}"
    return Answer(
        body=json.dumps(
            {"AccessKeyId": key, "SecretAccessKey": "secret", "Token": "token", "Expiration": expires}
        ).encode()
    )


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    """Of this machine; they refuse two requests."""
    answers = Metadata(num_refused=2)
    with answering(answers) as (url, _):
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        yield answers


@pytest.mark.usefixtures("metadata")
def test_metadata_that_do_not_answer_at_once_are_asked_again(
    client: ClientName, of_the_environment: list[Asked]
) -> None:
    with fetcher(client) as files:
        assert list(files.fetch([URI] * 3)) == [b"image"] * 3
    assert keys_used(of_the_environment) == ["ROLE"] * 3


def test_how_often_to_ask_can_be_configured(
    client: ClientName, of_the_environment: list[Asked], metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "2")
    metadata.num_refused = 100
    with fetcher(client) as files:
        (error,) = files.fetch([URI])
    assert isinstance(error, RowError)
    assert error.status is Status.FORBIDDEN
    assert of_the_environment == []
    assert metadata.num_asked == 2 + 2  # for a token, and for the role without one


def test_credentials_that_were_not_there_are_looked_for_a_minute_later(
    client: ClientName, of_the_environment: list[Asked], metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]
    monkeypatch.setattr(once, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    metadata.num_refused = 1000

    def fetch_one(files: Fetcher) -> Fetched:
        (fetched,) = files.fetch([URI])
        return fetched

    with fetcher(client) as files:
        for _ in range(3):
            error = fetch_one(files)
            assert isinstance(error, RowError)
            assert error.status is Status.FORBIDDEN
        num_asked = metadata.num_asked
        metadata.num_refused = 0
        seconds[0] = 59.0
        assert isinstance(fetch_one(files), RowError)
        assert metadata.num_asked == num_asked
        seconds[0] = 61.0
        assert fetch_one(files) == b"image"
    assert keys_used(of_the_environment) == ["ROLE"]


def test_credentials_are_renewed_before_they_expire(
    client: ClientName, of_the_environment: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a container, which botocore renews a quarter of an hour before."""
    monkeypatch.setattr(fetch_objects, "_CREDENTIALS_ASKED_EVERY", timedelta(0))

    def answer(_: Asked) -> Answer:
        was_used = bool(of_the_environment)
        return credentials("SECOND" if was_used else "FIRST", timedelta(minutes=60 if was_used else 12))

    with answering(answer) as (url, _):
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/credentials")
        with fetcher(client) as files:
            for _ in range(3):
                assert list(files.fetch([URI])) == [b"image"]
    assert keys_used(of_the_environment) == ["FIRST", "SECOND", "SECOND"]
