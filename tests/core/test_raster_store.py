from __future__ import annotations

from pathlib import Path

import pytest

from imgbatch.config import StorageConfig
from imgbatch.core import s3, storage
from imgbatch.core.raster_store import gdal_options, gdal_path, status_of_remote
from imgbatch.errors import Status

PROFILES = """
[profile plain]
region = us-east-1
[profile night]
endpoint_url = https://general.example
[profile other]
endpoint_url = https://general.example
services = ours
[services ours]
s3 =
    endpoint_url = http://127.0.0.1:9/storage/v1/s3
"""


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text(PROFILES)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")


@pytest.mark.usefixtures("profiles")
@pytest.mark.parametrize(
    ("settings", "environment", "endpoint"),
    [
        ({"profile": "night"}, {}, "https://general.example"),
        ({"profile": "other"}, {}, "http://127.0.0.1:9"),
        ({}, {"AWS_PROFILE": "night"}, "https://general.example"),
        ({"profile": "plain"}, {"AWS_PROFILE": "night"}, None),
        ({"profile": "night"}, {"AWS_ENDPOINT_URL": "http://environment"}, "http://environment"),
        ({"profile": "night", "endpoint_url": "http://settings"}, {}, "http://settings"),
        ({"profile": "none"}, {}, None),
    ],
)
def test_gdal_asks_the_server_that_the_other_clients_ask(
    settings: dict[str, str], environment: dict[str, str], endpoint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = StorageConfig(**settings)  # type: ignore[arg-type]
    options = gdal_options(config)
    found = None
    if "AWS_S3_ENDPOINT" in options:
        found = f"{'https' if options['AWS_HTTPS'] == 'YES' else 'http'}://{options['AWS_S3_ENDPOINT']}"
    assert found == endpoint
    if endpoint:
        fs = s3.open_filesystem(config)
        fs.connect()
        assert fs.s3.meta.endpoint_url.removesuffix("/storage/v1/s3") == endpoint


@pytest.mark.parametrize("path", ["", "/", "/storage/v1/s3", "/storage/v1/s3/"])
def test_a_path_of_the_endpoint_stands_before_the_bucket(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GDAL signs it."""
    monkeypatch.setattr(storage, "_settings", StorageConfig(endpoint_url=f"https://host:8443{path}"))
    assert gdal_options(storage.settings())["AWS_S3_ENDPOINT"] == "host:8443"
    above = path.strip("/")
    assert gdal_path("s3://bucket/a//b.tif") == "/vsis3/" + (f"{above}/" if above else "") + "bucket/a//b.tif"
    assert gdal_path("/data/a.tif") == "/data/a.tif"


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
