"""How GDAL reaches rasters in object stores: the project's settings of S3 in GDAL's words (its ``/vsis3/``).

Ranges of a few blocks are requested, never whole scenes: fsspec's files, which rasterio can open too, fetch two to four
times the bytes, or ask 18 to 33 times as often (``jobs/results/2026-11-27-raster_s3.md``). Credentials come from the
environment, a profile or a role, which GDAL looks up itself; of a profile, it knows no ``credential_process``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from imgbatch.config import StorageConfig
from imgbatch.core import s3, storage
from imgbatch.errors import Status

_AWS_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
"""Where botocore looks for profiles."""
_NOT_FOUND = (
    "key does not exist",
    "bucket does not exist",
    "does not exist in the file system",
    "http response code: 404",
    "nosuchkey",
    "nosuchbucket",
    "no such file",
)
_FORBIDDEN = (
    "http response code: 403",
    "access denied",
    "accessdenied",
    "access key id you provided",
    "invalidaccesskeyid",
    "request signature we calculated",
    "signaturedoesnotmatch",
)
_RETRIES, _RETRY_DELAY_S = 4, 0.5


def gdal_path(uri: str) -> str:
    """What GDAL calls a local path or an ``s3://`` URI."""
    if storage.is_s3(uri):
        endpoint = _endpoint(storage.settings())
        # GDAL would sign a path of the endpoint as if it were part of the host's name.
        above = endpoint.path.strip("/") if endpoint else ""
        return "/vsis3/" + (f"{above}/" if above else "") + uri.split("://", 1)[1]
    return str(storage.local_path(uri))


def gdal_options(settings: StorageConfig) -> dict[str, str]:
    """GDAL's configuration options for S3."""
    options = {
        "GDAL_HTTP_CONNECTTIMEOUT": f"{settings.connect_timeout_s:g}",
        "GDAL_HTTP_TIMEOUT": f"{settings.read_timeout_s:g}",
        "GDAL_HTTP_MAX_RETRY": str(_RETRIES),
        "GDAL_HTTP_RETRY_DELAY": f"{_RETRY_DELAY_S:g}",
        # Otherwise a scene that failed once would fail for as long as the process lives.
        "CPL_VSIL_CURL_NON_CACHED": "/vsis3/",
    }
    endpoint = _endpoint(settings)
    if endpoint:
        options["AWS_S3_ENDPOINT"] = endpoint.netloc
        options["AWS_HTTPS"] = "YES" if endpoint.scheme == "https" else "NO"
        options["AWS_VIRTUAL_HOSTING"] = "FALSE"
    if settings.region:
        options["AWS_REGION"] = settings.region
    if settings.profile:
        options["AWS_PROFILE"] = settings.profile
    if settings.anonymous:
        options["AWS_NO_SIGN_REQUEST"] = "YES"
    if settings.requester_pays:
        options["AWS_REQUEST_PAYER"] = "requester"
    return options


def _endpoint(settings: StorageConfig) -> SplitResult | None:
    """Of a server other than AWS; the one that botocore finds, in the same order."""
    url = s3.configured_endpoint(settings)
    if not url:
        files = tuple(os.environ.get(name) or path for name, path in _AWS_FILES.items())
        named = settings.profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        # Most machines have no such file, and botocore takes 0.2 s to load.
        if any(Path(file).expanduser().is_file() for file in files):
            url = _endpoint_of_profile(named, files)
    return urlsplit(url) if url else None


@lru_cache(maxsize=4)
def _endpoint_of_profile(profile: str | None, _files: tuple[str, ...]) -> str | None:
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        session = Session(profile=profile)
        said = session.get_scoped_config()
        services = session.full_config.get("services", {}).get(said.get("services"), {})
    except BotoCoreError:  # of which whoever asks for an object tells
        return None
    return services.get("s3", {}).get("endpoint_url") or said.get("endpoint_url")


def status_of_remote(message: str) -> Status | None:
    """The status of a raster in an object store that GDAL cannot open, by what GDAL says; none: that does not tell."""
    lowered = message.lower()
    if any(words in lowered for words in _FORBIDDEN):
        return Status.FORBIDDEN
    if any(words in lowered for words in _NOT_FOUND):
        return Status.NOT_FOUND
    return None
