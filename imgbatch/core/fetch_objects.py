"""Clients that get objects: one request each, with the object's ETag; s3fs everywhere, obstore where it is installed.

obstore takes a small part of the CPU that s3fs takes for each request (jobs/results has the figures), which decoding
can use. Both see the same credentials, endpoint and region.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import fsspec.asyn

from imgbatch.config import StorageConfig
from imgbatch.core import s3
from imgbatch.core.byte_ranges import ByteRange
from imgbatch.core.hedging import first_answer
from imgbatch.core.once import Once
from imgbatch.core.retry import CREDENTIAL_ERRORS, THROTTLED_HTTP, TRANSIENT_HTTP, http_status, may_pass

if TYPE_CHECKING:
    from obstore import GetOptions

ClientName = Literal["s3fs", "obstore"]

_CREDENTIALS_ASKED_EVERY = timedelta(minutes=5)
_ANSWERED = re.compile(r"status code: (\d{3})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PARTIAL, _BEYOND_THE_END = 206, 416
_LATE, _NO_CONNECTION = "kind: Timeout", "ConnectError("
_NOT_PARTIAL = "non-partial response"
"""object_store's words: for a request that took too long, perhaps because no connection stood, and for an answer of
the whole object."""
_IGNORES_RANGE = "the server ignores Range: it answers with the whole file, of which a part was asked for"
_HAS_OWN_ENDPOINT = re.compile(r"arn:.*|.*(?:-s3alias|--ol-s3|--x-s3|--xa-s3|\.mrap)")
"""Access points, their aliases and directory buckets: AWS takes them only as a part of the host's name."""
_AWS = (".amazonaws.com", ".amazonaws.com.cn")


class StoredObject(NamedTuple):
    """An object's content, and its ETag without quotes; empty where the server gives none."""

    data: bytes
    etag: str


_NOTHING = StoredObject(b"", "")


class ObjectTooLarge(Exception):
    """Known from the answer's headers; the content was not read."""

    def __init__(self, size: int) -> None:
        super().__init__(f"{size} bytes")
        self.size = size


_FINAL = (FileNotFoundError, PermissionError, ObjectTooLarge)
"""Failures that a second request would meet as well."""


class RequestFailed(OSError):
    """A request that failed in no way that has an exception of its own; ``may_pass``: another try is worth it.

    ``throttled``: turned away for the number of requests, perhaps with the seconds to wait before the next one.
    """

    def __init__(self, message: str, *, may_pass: bool, throttled: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        self.throttled = throttled
        self.retry_after_s = retry_after_s


class ObjectClient(Protocol):
    """Gets objects, for any thread."""

    def get(self, bucket: str, key: str, *, max_bytes: int, byte_range: ByteRange | None = None) -> StoredObject:
        """One attempt: one request, or two where hedging is on. With a ``byte_range`` only those bytes, fewer where the
        object ends before, and none where it ends before their first.

        Raises:
            FileNotFoundError: there is no such object.
            PermissionError: credentials are missing, wrong, or do not suffice.
            ObjectTooLarge: more than ``max_bytes``.
            TimeoutError: longer than the client's timeout.
            RequestFailed: anything else: another answer, a connection that broke, a body that ended early.
        """


def choose_client(configured: Literal["auto", "s3fs", "obstore"]) -> ClientName:
    """``fetch.client`` resolved: obstore where it is installed."""
    if configured != "auto":
        return configured
    return "obstore" if find_spec("obstore") else "s3fs"


def open_client(
    name: ClientName, settings: StorageConfig, *, timeout_s: float, hedge_after_s: float | None = None
) -> ObjectClient:
    """A client of ``settings``.

    Args:
        timeout_s: for one request, its content included.
        hedge_after_s: a second request is sent where the first has not been answered by then; none: never.
    """
    s3fs_client = S3fsClient(settings, timeout_s, hedge_after_s)
    return ObstoreClient(settings, timeout_s, s3fs_client, hedge_after_s) if name == "obstore" else s3fs_client


class S3fsClient:
    """Through the client that s3fs holds, in fsspec's thread."""

    def __init__(self, settings: StorageConfig, timeout_s: float, hedge_after_s: float | None = None) -> None:
        self.fs = s3.open_filesystem(settings, attempts=1)
        self._timeout_s = timeout_s
        self._hedge_after_s = hedge_after_s
        self._connected = Once(self._connect, lasting=(PermissionError,))

    def connect(self) -> None:
        """Have credentials, and a client that uses them.

        Raises:
            PermissionError: there are none; a minute later they are looked for again.
        """
        self._connected.get()

    def _connect(self) -> None:
        # Before s3fs makes its client, which would stay without credentials where there are none now.
        fs = self.fs
        if not fs.anon:
            _require_credentials(partial(fsspec.asyn.sync, fs.loop, fs.session.get_credentials))
        try:
            fs.connect()
        except Exception as error:
            raise _translated(error) from error

    def get(self, bucket: str, key: str, *, max_bytes: int, byte_range: ByteRange | None = None) -> StoredObject:
        """See :class:`ObjectClient`."""
        self.connect()
        try:
            return fsspec.asyn.sync(self.fs.loop, self._get, bucket, key, max_bytes, byte_range)
        except (ObjectTooLarge, PermissionError, RequestFailed):
            raise
        except TimeoutError as error:
            raise _took_too_long(self._timeout_s) from error
        except Exception as error:
            if byte_range and http_status(error) == _BEYOND_THE_END:
                return _NOTHING
            raise _translated(error) from error

    async def _get(self, bucket: str, key: str, max_bytes: int, byte_range: ByteRange | None) -> StoredObject:
        async def ask() -> StoredObject:
            return await asyncio.wait_for(self._read(bucket, key, max_bytes, byte_range), self._timeout_s)

        return await (ask() if self._hedge_after_s is None else first_answer(ask, self._hedge_after_s, _FINAL))

    async def _read(self, bucket: str, key: str, max_bytes: int, byte_range: ByteRange | None) -> StoredObject:
        part = {"Range": byte_range.header} if byte_range else {}
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **part)
        try:
            if byte_range and answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL:
                raise RequestFailed(_IGNORES_RANGE, may_pass=False)
            if answer["ContentLength"] > max_bytes:
                raise ObjectTooLarge(answer["ContentLength"])
            return StoredObject(await answer["Body"].read(), s3.unquoted_etag(answer.get("ETag")))
        finally:
            answer["Body"].close()


def _translated(error: Exception) -> OSError:
    status = http_status(error)
    if status is None and isinstance(error, FileNotFoundError):
        # Of a file or a program that credentials come from, which botocore may read at any request.
        return _without_credentials(error)
    if status in (401, 403) or type(error).__name__ in CREDENTIAL_ERRORS:
        return PermissionError(str(error))
    if status == 404:
        return FileNotFoundError(str(error))
    throttled = status in THROTTLED_HTTP
    return RequestFailed(f"{type(error).__name__}: {error}", may_pass=may_pass(error), throttled=throttled)


def _took_too_long(timeout_s: float) -> TimeoutError:
    return TimeoutError(
        f"no whole answer in {timeout_s:g} s (fetch.timeout_s); for large files raise it or lower fetch.in_flight"
    )


def _require_credentials(find: Callable[[], Any]) -> Any:
    """What ``find`` finds in botocore's chain; whatever goes wrong there is a PermissionError."""
    try:
        credentials = find()
    except Exception as error:
        raise _without_credentials(error) from error
    if credentials is None:
        raise PermissionError("no credentials in the environment, a profile or a role")
    return credentials


def _without_credentials(error: Exception) -> PermissionError:
    return PermissionError(f"no credentials: {type(error).__name__}: {error}")


class ObstoreClient:
    """Through object_store in Rust. Where the server is and who asks is what s3fs found."""

    def __init__(
        self, settings: StorageConfig, timeout_s: float, s3fs_client: S3fsClient, hedge_after_s: float | None = None
    ) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._s3fs = s3fs_client
        self._hedge_after_s = hedge_after_s
        self._stores: dict[str, Once[Any]] = {}
        # Where the metadata of the machine do not answer, it takes a second to learn that there are none.
        self._credentials = Once(self._find_credentials, lasting=(PermissionError,))

    def get(self, bucket: str, key: str, *, max_bytes: int, byte_range: ByteRange | None = None) -> StoredObject:
        """See :class:`ObjectClient`."""
        from obstore import exceptions

        store = self._store(bucket) if _is_normal(key) else None
        if store is None:
            return self._s3fs.get(bucket, key, max_bytes=max_bytes, byte_range=byte_range)
        try:
            return self._ask(store, key, max_bytes, byte_range)
        except FileNotFoundError as error:
            raise FileNotFoundError(_first_line(error)) from error
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise PermissionError(_first_line(error)) from error
        except exceptions.BaseError as error:
            if _LATE in str(error):
                raise self._late(error) from error
            message = _first_line(error)
            answered = _ANSWERED.search(message)
            status = int(answered[1]) if answered else None
            if byte_range and status == _BEYOND_THE_END:
                return _NOTHING
            if byte_range and _NOT_PARTIAL in message:
                raise RequestFailed(_IGNORES_RANGE, may_pass=False) from error
            passes = status is None or status in TRANSIENT_HTTP
            raise RequestFailed(message, may_pass=passes, throttled=status in THROTTLED_HTTP) from error

    def _ask(self, store: Any, key: str, max_bytes: int, byte_range: ByteRange | None) -> StoredObject:
        import obstore

        options: GetOptions | None = {"range": (byte_range.first, byte_range.last + 1)} if byte_range else None

        def judged(found: Any) -> Any:
            first, end = found.range
            if end - first > max_bytes:
                raise ObjectTooLarge(end - first)
            return found

        async def ask() -> StoredObject:
            found = judged(await obstore.get_async(store, key, options=options))
            return StoredObject(bytes(await found.bytes_async()), s3.unquoted_etag(found.meta["e_tag"]))

        if self._hedge_after_s is not None:
            # In the thread where s3fs waits for its answers.
            return fsspec.asyn.sync(self._s3fs.fs.loop, first_answer, ask, self._hedge_after_s, _FINAL)
        found = judged(obstore.get(store, key, options=options))
        return StoredObject(bytes(found.bytes()), s3.unquoted_etag(found.meta["e_tag"]))

    def _late(self, error: Exception) -> TimeoutError:
        if _NO_CONNECTION in str(error):
            return TimeoutError(f"no connection in {self._settings.connect_timeout_s:g} s (storage.connect_timeout_s)")
        return _took_too_long(self._timeout_s)

    def _store(self, bucket: str) -> Any:
        """obstore's store of a bucket; none: one for s3fs, which makes up hosts' names from buckets'."""
        store = self._stores.get(bucket)
        if store is None:
            opened = Once(partial(self._open_store, bucket), lasting=(PermissionError,))
            store = self._stores.setdefault(bucket, opened)
        return store.get()

    def _open_store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        if _HAS_OWN_ENDPOINT.fullmatch(bucket):
            return None
        settings = self._settings
        signing = {"skip_signature": True} if settings.anonymous else {"credential_provider": self._credentials.get()}
        endpoint, region = self._locate(bucket)
        if self._wants_virtual_hosts() and not endpoint.endswith(_AWS):
            return None
        return S3Store(
            bucket,
            endpoint=endpoint,
            region=region,
            virtual_hosted_style_request=False,
            request_payer=settings.requester_pays,
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": timedelta(seconds=self._timeout_s),
                "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
            },
            retry_config={"max_retries": 0},
            **signing,
        )

    def _locate(self, bucket: str) -> tuple[str, str]:
        """Endpoint and region of a bucket: unlike s3fs, obstore does not follow it into another region."""
        self._s3fs.connect()
        fs = self._s3fs.fs
        endpoint, region = fs.s3.meta.endpoint_url, fs.s3.meta.region_name or "us-east-1"
        if not endpoint.endswith(_AWS):
            return endpoint, region
        try:
            region = s3.bucket_region(fs, bucket) or region
        except Exception as error:
            # Not a guess, which would hold for as long as the store does.
            raise _translated(error) from error
        return s3.endpoint_in(region, endpoint), region

    def _wants_virtual_hosts(self) -> bool:
        """Whether AWS's configuration asks for buckets in hosts' names, without which some servers do not do."""
        return (self._s3fs.fs.s3.meta.config.s3 or {}).get("addressing_style") == "virtual"

    def _find_credentials(self) -> Any:
        """What obstore asks for credentials: botocore's chain, which renews those that expire."""
        import botocore.session

        session = botocore.session.Session(profile=self._settings.profile)
        s3.be_patient_with_metadata(session)
        credentials = _require_credentials(session.get_credentials)

        def provide() -> dict[str, Any]:
            frozen = credentials.get_frozen_credentials()
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": datetime.now(UTC) + _CREDENTIALS_ASKED_EVERY,
            }

        return provide


def _is_normal(key: str) -> bool:
    """Whether the key is one that object_store takes as it is: no empty or dotted segments, no control characters."""
    return not _CONTROL.search(key) and not any(part in ("", ".", "..") for part in key.split("/"))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
