"""What S3, and servers that speak it, need beyond fsspec: settings, one conditional PUT, listings, removals."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from imgbatch.config import StorageConfig
from imgbatch.core.retry import backoff_s, http_answer, http_status, may_pass
from imgbatch.errors import UsageError

_ATTEMPTS = 5
"""Of each request, with botocore's backoff and jitter; s3fs tries again on top where a body broke off."""
_BODY_ATTEMPTS = 3
_PUT_PATIENCE_S = 30.0
"""For which a conditional PUT is tried again, each time with all the attempts above."""
_REMOVAL_PATIENCE_S = 30.0
"""For which objects are deleted again that the server could not delete now."""
_REMOVED_AT_ONCE = 1000
_REMOVALS_AT_ONCE = 3
_CONNECTIONS = 64
_PATIENCE_WITH_METADATA = {"metadata_service_num_attempts": (1, 5), "metadata_service_timeout": (1, 2)}
"""For the credentials of a machine's role, with botocore's own default beside each, seconds for the timeout: one
attempt is not enough where all the actors of a node ask as they start, and nobody asks again soon."""
_READ_AHEAD_BYTES = 8 * 2**20
"""s3fs's own 50 MB are as much memory for every open file, and are fetched for every jump in one."""
_LISTINGS_AT_ONCE = 16
_PAGES_AHEAD = 4
_LEVELS_SPLIT = 3

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Of the environment, in botocore's order."""
_OF_A_REGION = re.compile(
    r"https://(s3(?:-fips)?(?:\.dualstack)?)(?:\.(?:[a-z]{2}[a-z-]*-\d+|aws-global))?(\.amazonaws\.com(?:\.cn)?)"
)
"""Endpoints of AWS that every region has, their region aside; botocore has some of no region."""

_ACCESS_POINT = re.compile(
    r"(?s)(arn:aws[\w-]*:s3[\w-]*:[\w-]*:\d{12}:(?:outpost[:/][^:/]+[:/])?(?:accesspoint|bucket)[:/][^/]+)(?:/(.*))?"
)
"""Its ARN, which stands where a bucket's name does, and a key."""

_PASSING = frozenset({"InternalError", "OperationAborted", "RequestTimeout", "ServiceUnavailable", "SlowDown"})
"""Codes of objects that were not deleted and may be later."""
_FORBIDDEN, _NOT_ALLOWED, _CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 403, 405, 409, 412, 501


class S3Object(NamedTuple):
    """An object as a listing shows it: ``name`` with its bucket, ``size`` in bytes, and its ``etag`` unquoted."""

    name: str
    size: int
    etag: str


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket, or an access point's ARN, and key of an ``s3://`` URI. A key may hold anything, like question marks."""
    path = uri.partition("://")[2]
    found = _ACCESS_POINT.fullmatch(path) if path.startswith("arn:") else None
    if found:
        return found[1], found[2] or ""
    bucket, _, key = path.partition("/")
    return bucket, key


def check_profile(settings: StorageConfig) -> None:
    """Raise :class:`UsageError` where this machine's AWS configuration lacks the profile, or cannot be read."""
    from botocore.exceptions import BotoCoreError, ProfileNotFound
    from botocore.session import Session

    try:
        Session(profile=settings.profile).get_scoped_config()
    except ProfileNotFound as error:
        named = "storage.profile" if settings.profile else "AWS_PROFILE"
        raise UsageError(f"{named}: {error} on this machine") from error
    except BotoCoreError as error:
        raise UsageError(f"the AWS configuration of this machine: {error}") from error


def open_filesystem(settings: StorageConfig, *, attempts: int = _ATTEMPTS) -> Any:
    """An s3fs filesystem of these settings that caches no listing.

    Args:
        attempts: of each request, before it fails.
    """
    import s3fs

    fs = s3fs.S3FileSystem(
        anon=settings.anonymous,
        endpoint_url=settings.endpoint_url,
        requester_pays=settings.requester_pays,
        # Older versions of s3fs say so in few requests of their own.
        s3_additional_kwargs={"RequestPayer": "requester"} if settings.requester_pays else None,
        default_block_size=_READ_AHEAD_BYTES,
        client_kwargs={"region_name": settings.region} if settings.region else {},
        config_kwargs={
            "connect_timeout": settings.connect_timeout_s,
            "read_timeout": settings.read_timeout_s,
            "retries": {"mode": "standard", "total_max_attempts": attempts},
            "max_pool_connections": _CONNECTIONS,
            # Checksums in trailers are more than some servers understand; signatures cover the content already.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        **({"profile": settings.profile} if settings.profile else {}),
    )
    fs.retries = min(attempts, _BODY_ATTEMPTS)
    fs.session = _session(settings.profile)
    return fs


def _session(profile: str | None) -> Any:
    """A session that takes the dates of a listing apart quickly: botocore's own way is half the work of a page."""
    from aiobotocore.session import AioSession

    session = AioSession(profile=profile)
    be_patient_with_metadata(session)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_timestamp)
    return session


def be_patient_with_metadata(session: Any) -> None:
    """Let a session of botocore ask for the credentials of the machine's role more than once, unless it is configured
    how often."""
    from botocore.exceptions import BotoCoreError

    with contextlib.suppress(BotoCoreError):  # no such profile, which is told when credentials are looked for
        for name, (default, patient) in _PATIENCE_WITH_METADATA.items():
            if session.get_config_variable(name) == default:
                session.set_config_variable(name, patient)


def _parse_timestamp(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):
        # Here, because decode actors load this module and most runs need no botocore, which takes 0.2 s to load.
        from botocore.utils import parse_timestamp

        return parse_timestamp(text)


def unquoted_etag(etag: str | None) -> str:
    """An ETag without its quotes, so that every client's is the same."""
    return (etag or "").removeprefix("W/").strip('"')


def configured_endpoint(settings: StorageConfig) -> str | None:
    """The server that the settings name, else the environment; none: AWS."""
    return settings.endpoint_url or next(filter(None, map(os.environ.get, ENDPOINT_VARIABLES)), None)


def endpoint_in(region: str, endpoint: str) -> str:
    """AWS's ``endpoint`` for a bucket of ``region``; one of the user's own, as PrivateLink gives, stays what it is."""
    kind = _OF_A_REGION.fullmatch(endpoint)
    return f"https://{kind[1]}.{region}{kind[2]}" if kind else endpoint


def bucket_region(fs: Any, bucket: str) -> str | None:
    """The region that a bucket is in; none: the server does not say, as where there is no such bucket.

    AWS says so in its refusal too: who may read objects may not be allowed to ask for their bucket.

    Raises:
        Exception: no answer, or one that may pass.
    """
    try:
        found = fs.call_s3("head_bucket", Bucket=bucket)
    except Exception as error:  # clients' exceptions differ
        answer = http_answer(error)
        if not answer or may_pass(error):
            raise
        found = {"ResponseMetadata": answer}
    headers = found.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return found.get("BucketRegion") or headers.get("x-amz-bucket-region") or None


def put_if_absent(fs: Any, path: str, data: bytes) -> bool:
    """One PUT with ``If-None-Match: *``. True: this call created it; False: it was there.

    A lost race is a 412, which clients translate in different ways. A 409, of a race still going on, and failures that
    may pass are tried again for half a minute: much work may have gone into ``data``. A server that knows no such
    condition gets a plain PUT, where nothing is there yet: then the last of several writers at once wins. An answer
    that got lost on the way counts as "was there" when the retry meets what the first attempt wrote.
    """
    bucket, key, _ = fs.split_path(path)
    give_up = time.monotonic() + _PUT_PATIENCE_S
    for attempt in itertools.count(1):
        try:
            fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except FileExistsError:
            return False
        except Exception as error:
            status = http_status(error)
            if status == _PRECONDITION_FAILED:
                return False
            if status == _NOT_IMPLEMENTED:
                return _put_unless_seen(fs, path, data)
            if status is None and getattr(error, "errno", None) == errno.EINVAL and fs.exists(path):
                return False
            if time.monotonic() > give_up or not (status == _CONFLICT or may_pass(error)):
                raise
            time.sleep(backoff_s(attempt))
            continue
        return True
    raise AssertionError("unreachable")


def _put_unless_seen(fs: Any, path: str, data: bytes) -> bool:
    if fs.exists(path):
        return False
    put(fs, path, data)
    return True


def put(fs: Any, path: str, data: bytes) -> None:
    """One PUT, whatever the size: readers see the old object or the new one."""
    bucket, key, _ = fs.split_path(path)
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data)


def iter_objects(fs: Any, path: str) -> Iterator[S3Object]:
    """Every object below a path, in the order of the keys, with several prefixes listed at once.

    Holds a few pages of each of the listings under way.
    """
    bucket, key, _ = fs.split_path(path)
    prefix = key.rstrip("/") + "/" if key else ""
    parts = _iter_parts(fs, bucket, prefix, _LEVELS_SPLIT)
    with _Listings() as listings:
        yield from listings.iter_ordered(
            [part] if isinstance(part, S3Object) else partial(_iter_pages, fs, bucket, part) for part in parts
        )


def iter_stems(fs: Any, path: str, stems: Iterable[str]) -> Iterator[S3Object]:
    """The objects directly or at any depth below a path whose names begin with one of ``stems``, listed at once."""
    bucket, key, _ = fs.split_path(path)
    prefix = key.rstrip("/") + "/" if key else ""
    with _Listings() as listings:
        yield from listings.iter_ordered(partial(_iter_pages, fs, bucket, prefix + stem) for stem in stems)


def list_names(fs: Any, path: str) -> set[str]:
    """Names of the objects and prefixes directly below a path: one request for a thousand of them."""
    bucket, key, _ = fs.split_path(path)
    entries = _iter_level(fs, bucket, key.rstrip("/") + "/" if key else "")
    uris = (entry if isinstance(entry, str) else entry.name for entry in entries)
    return {uri.rstrip("/").rsplit("/", 1)[-1] for uri in uris}


def _iter_parts(fs: Any, bucket: str, prefix: str, levels: int) -> Iterator[S3Object | str]:
    """A tree as objects and prefixes that make it up, in the order of the keys; few prefixes are split further."""
    first = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix)
    if not first.get("IsTruncated"):
        yield from _objects_of(bucket, first)
        return
    entries = _iter_level(fs, bucket, prefix)
    head = list(itertools.islice(entries, _LISTINGS_AT_ONCE + 1))
    is_narrow = len(head) <= _LISTINGS_AT_ONCE and levels > 0
    for entry in itertools.chain(head, entries):
        if isinstance(entry, str) and is_narrow:
            yield from _iter_parts(fs, bucket, entry, levels - 1)
        else:
            yield entry


def _iter_level(fs: Any, bucket: str, prefix: str) -> Iterator[S3Object | str]:
    """Objects and prefixes directly below a prefix, in the order of the keys."""
    for page in _iter_answers(fs, bucket, Prefix=prefix, Delimiter="/"):
        prefixes = [entry["Prefix"] for entry in page.get("CommonPrefixes", ())]
        entries: list[S3Object | str] = [*_objects_of(bucket, page), *prefixes]
        yield from sorted(entries, key=lambda entry: entry if isinstance(entry, str) else entry.name[len(bucket) + 1 :])


def _iter_pages(fs: Any, bucket: str, prefix: str) -> Iterator[list[S3Object]]:
    for page in _iter_answers(fs, bucket, Prefix=prefix):
        yield _objects_of(bucket, page)


def _iter_answers(fs: Any, bucket: str, **arguments: str) -> Iterator[dict[str, Any]]:
    while True:
        answer = fs.call_s3("list_objects_v2", Bucket=bucket, **arguments)
        yield answer
        if not answer.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = answer["NextContinuationToken"]


def _objects_of(bucket: str, page: dict[str, Any]) -> list[S3Object]:
    # A key that ends in a slash stands for a folder in consoles that know folders.
    return [
        S3Object(f"{bucket}/{entry['Key']}", entry["Size"], unquoted_etag(entry.get("ETag")))
        for entry in page.get("Contents", ())
        if not entry["Key"].endswith("/")
    ]


class _Listings:
    """Listings that run ahead of whoever reads them, each in a thread of its own and a few pages at most."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def __enter__(self) -> _Listings:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def iter_ordered(
        self, parts: Iterable[list[S3Object] | Callable[[], Iterator[list[S3Object]]]]
    ) -> Iterator[S3Object]:
        """The objects of each part in turn: a list as it is, a listing from the thread that runs it."""
        following = iter(parts)
        ahead: deque[Iterable[list[S3Object]]] = deque()
        while True:
            for part in itertools.islice(following, _LISTINGS_AT_ONCE - len(ahead)):
                ahead.append([part] if isinstance(part, list) else self._run(part))
            if not ahead:
                return
            for page in ahead.popleft():
                yield from page

    def _run(self, listing: Callable[[], Iterator[list[S3Object]]]) -> Iterator[list[S3Object]]:
        pages: queue.Queue[list[S3Object] | BaseException | None] = queue.Queue(_PAGES_AHEAD)

        def put(item: list[S3Object] | BaseException | None) -> None:
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    pages.put(item, timeout=0.1)
                    return

        def pump() -> None:
            try:
                for page in listing():
                    put(page)
                    if self._stop.is_set():
                        return
            except BaseException as error:  # raised where the pages are read
                put(error)
            else:
                put(None)

        threading.Thread(target=pump, name="listing", daemon=True).start()
        return _received(pages)


def _received(pages: queue.Queue[list[S3Object] | BaseException | None]) -> Iterator[list[S3Object]]:
    while (item := pages.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item


def remove(fs: Any, path: str) -> None:
    """Delete the object at a path and all below it, some thousands at once; nothing happens where there is none.

    Raises:
        PermissionError: an object may not be deleted, the first named.
        OSError: one could not be for half a minute, or for another reason.
    """
    bucket, key, _ = fs.split_path(path)
    first = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
    keys = [entry["Key"] for entry in first.get("Contents", ()) if entry["Key"] == key]
    for page in _iter_answers(fs, bucket, Prefix=key.rstrip("/") + "/" if key else ""):
        keys += [entry["Key"] for entry in page.get("Contents", ())]
    parts = [keys[start : start + _REMOVED_AT_ONCE] for start in range(0, len(keys), _REMOVED_AT_ONCE)]
    with ThreadPoolExecutor(_REMOVALS_AT_ONCE) as pool:
        for _ in pool.map(partial(_delete, fs, bucket), parts):
            pass


def _delete(fs: Any, bucket: str, keys: Sequence[str]) -> None:
    """Delete up to a thousand objects. The answer is 200 whatever becomes of each: it lists those that are left."""
    give_up = time.monotonic() + _REMOVAL_PATIENCE_S
    for attempt in itertools.count(1):
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        errors = fs.call_s3("delete_objects", Bucket=bucket, Delete=request).get("Errors", ())
        left = [error for error in errors if error.get("Code") != "NoSuchKey"]  # another command was faster
        if not left:
            return
        lasting = [error for error in left if error.get("Code") not in _PASSING]
        if lasting or time.monotonic() > give_up:
            error = (lasting or left)[0]
            number = errno.EACCES if error.get("Code") == "AccessDenied" else errno.EIO  # the former: PermissionError
            said = f"not deleted: {error.get('Code')} {error.get('Message', '')}".rstrip()
            raise OSError(number, said, f"s3://{bucket}/{error['Key']}")
        keys = [error["Key"] for error in left]
        time.sleep(backoff_s(attempt))


def abort_uploads(fs: Any, path: str, *, older_than_s: float) -> int:
    """End multipart uploads below a path that nobody completed, and free what they hold; returns how many.

    The right to list uploads is rarely granted, and some servers cannot: nothing but space is lost without.
    """
    bucket, key, _ = fs.split_path(path)
    prefix = key.rstrip("/") + "/" if key else ""
    before = datetime.now(UTC) - timedelta(seconds=older_than_s)
    count = 0
    position: dict[str, str] = {}
    while True:
        try:
            answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **position)
        except OSError as error:
            if http_status(error) not in (_FORBIDDEN, _NOT_ALLOWED, _NOT_IMPLEMENTED):
                raise
            return count
        for upload in answer.get("Uploads", ()):
            if upload["Initiated"] <= before:
                with contextlib.suppress(OSError):  # not ours to end, or another command just did
                    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                    count += 1
        if not answer.get("IsTruncated"):
            return count
        position = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
