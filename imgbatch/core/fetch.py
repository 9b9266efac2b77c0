"""The bytes behind URIs, in order, many requests in flight; whatever goes wrong is the row's outcome."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, repeat
from pathlib import Path
from typing import TypeGuard

from imgbatch.config import FetchConfig, IfChanged
from imgbatch.core import storage
from imgbatch.core.access import Refused, allowed_path, check_scheme
from imgbatch.core.byte_ranges import ByteRange, split_range
from imgbatch.core.failpoints import failpoint
from imgbatch.core.fetch_objects import ObjectClient, ObjectTooLarge, RequestFailed, choose_client, open_client
from imgbatch.core.https import HttpsReader
from imgbatch.core.retry import THROTTLED_PATIENCE_S, Throttling, backoff_s
from imgbatch.core.s3 import split_uri, unquoted_etag
from imgbatch.errors import RowError, Stage, Status, row_error

_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT}
    | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
_NO_SUCH_PATH_ERRNO = frozenset({errno.ELOOP, errno.ENAMETOOLONG})
# Should a named pipe have taken the file's place since it was looked at, no writer is waited for.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_READ_BYTES = 1 << 16

Fetched = bytes | RowError


class _Rejected(Exception):
    """The outcome is known and trying again would not change it."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Tries:
    """The tries of one request; those that were turned away for the number of requests count by the clock."""

    def __init__(self, retries: int, throttling: Throttling, server: str) -> None:
        self.made = 0
        self._retries = retries
        self._throttling = throttling
        self._server = server
        self._began = time.monotonic()
        self._num_throttled = 0

    def wait_s(self, error: Exception) -> float | None:
        """Seconds until the next try after a failure that may pass; none: there is to be no other."""
        if not (isinstance(error, RequestFailed) and error.throttled):
            return backoff_s(self.made) if self.made - self._num_throttled <= self._retries else None
        self._num_throttled += 1
        is_waited_out = self._throttling.turned_away(self._server, self._began, time.monotonic())
        if not is_waited_out and self.made > self._retries:
            return None
        return backoff_s(self.made, at_least_s=error.retry_after_s)


class Fetcher:
    """Fetches files; a context manager. Several threads may fetch at once, each its own files.

    Local files are read when they are asked for: handing a read of some 20 µs to another thread costs more than the
    read. Everything else is requested up to ``config.in_flight`` rows ahead.
    """

    def __init__(self, config: FetchConfig, *, if_changed: IfChanged = "error") -> None:
        """``if_changed``: what becomes of an object whose ETag is not the one expected."""
        self._config = config
        self._if_changed = if_changed
        self._executor: ThreadPoolExecutor | None = None
        self._client: ObjectClient | None = None
        self._https: HttpsReader | None = None
        self._throttling = Throttling(THROTTLED_PATIENCE_S if config.retries else 0.0)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self.fetch_s = 0.0
        """Seconds for which whoever consumes the files has waited, in all."""
        self.num_changed = 0
        """Objects with another ETag than expected, in all."""

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is in flight; for good."""
        self._closing.set()
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def fetch(self, uris: Sequence[str | None], etags: Sequence[str | None] | None = None) -> Iterator[Fetched]:
        """The content of each of ``uris``, or why there is none, in order. The first requests leave at once.

        Holds at most ``config.in_flight`` files, of at most ``config.max_bytes`` each. A file over that size is
        ``TOO_LARGE`` and not read on; a null or a scheme that is not allowed is an error row as well.

        Args:
            etags: what the ETag of each object was when it was listed, null where unknown; none: all unknown.
        """
        following = zip(uris, etags if etags is not None else repeat(None), strict=False)
        # A local file waits as its URI, anything else as the request under way.
        ahead: deque[Future[Fetched] | str] = deque()
        self._request(following, ahead)
        return self._receive(len(uris), following, ahead)

    def _request(self, following: Iterator[tuple[str | None, str | None]], ahead: deque[Future[Fetched] | str]) -> None:
        for uri, etag in islice(following, self._config.in_flight - len(ahead)):
            ahead.append(self._submit(uri, etag) if _is_remote(uri) else uri or "")

    def _receive(
        self, count: int, following: Iterator[tuple[str | None, str | None]], ahead: deque[Future[Fetched] | str]
    ) -> Iterator[Fetched]:
        try:
            for _ in range(count):
                started = time.perf_counter()
                self._request(following, ahead)
                first = ahead.popleft()
                fetched = (
                    first.result()
                    if isinstance(first, Future)
                    else self._fetch_one(lambda uri=first: self._read_local(uri))  # type: ignore[misc]
                )
                self.fetch_s += time.perf_counter() - started
                yield fetched
        finally:
            for pending in ahead:
                if isinstance(pending, Future):
                    pending.cancel()

    def _submit(self, uri: str, etag: str | None) -> Future[Fetched]:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix="fetch")
        return self._executor.submit(self._fetch_one, lambda: self._read_remote(uri, etag), _server(uri))

    def _fetch_one(self, read: Callable[[], bytes], server: str = "") -> Fetched:
        tries = _Tries(self._config.retries, self._throttling, server)
        while True:
            tries.made += 1
            try:
                failpoint("fetch.file")
                data = read()
                self._throttling.let_through(server)
                return data
            except _Rejected as rejected:
                return row_error(rejected.status, Stage.FETCH, rejected, tries.made)
            except Refused as refused:
                return row_error(Status.REFUSED, Stage.FETCH, refused, tries.made)
            except Exception as error:
                status, may_pass = _judge(error)
                wait_s = tries.wait_s(error) if may_pass else None
                if wait_s is None or self._closing.wait(wait_s):
                    return row_error(status, Stage.FETCH, f"{type(error).__name__}: {error}", tries.made)

    def _read_local(self, uri: str) -> bytes:
        if not uri:
            raise _Rejected(Status.NOT_FOUND, "the uri is empty")
        if "\0" in uri:
            raise _Rejected(Status.NOT_FOUND, "a NUL in the uri, which no path holds")
        uri, byte_range = split_range(uri)
        path = allowed_path(uri, self._config)
        # Looked at before it is opened: opening a device may start something, and a named pipe's writer would go on.
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise _Rejected(Status.NOT_FOUND, "a directory, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise _Rejected(Status.REFUSED, "not a regular file")
        size = byte_range.size if byte_range else found.st_size
        if size > self._config.max_bytes:
            raise self._too_large(f"{size} bytes, more")
        if byte_range is not None:
            return _whole(_read_file(path, byte_range.first, at_most=size, expected=size), byte_range)
        data = _read_file(path, 0, at_most=self._config.max_bytes + 1, expected=size)
        if len(data) > self._config.max_bytes:
            raise self._too_large("the file has grown to more")
        return data

    def _read_remote(self, uri: str, etag: str | None) -> bytes:
        place, byte_range = split_range(uri)
        if check_scheme(uri, self._config) != "https":
            return self._read_object(place, byte_range, etag)
        if byte_range is not None:
            raise _Rejected(Status.REFUSED, "a part of a tar file is read from local files and s3:// only")
        with self._lock:
            reader = self._https = self._https or HttpsReader(self._config)
        try:
            return reader.read(uri)
        except ObjectTooLarge as error:
            raise self._too_large(f"{error.size} bytes, more") from error

    def _read_object(self, uri: str, byte_range: ByteRange | None, etag: str | None) -> bytes:
        bucket, key = split_uri(uri)
        if not bucket or not key:
            raise _Rejected(Status.NOT_FOUND, "a bucket, not an object")
        if byte_range is not None and not byte_range.size:
            return b""  # for which HTTP has no range
        try:
            client = self._object_client()
            found = client.get(bucket, key, max_bytes=self._config.max_bytes, byte_range=byte_range)
        except ObjectTooLarge as error:
            raise self._too_large(f"{error.size} bytes, more") from error
        if etag and self._if_changed != "ignore" and found.etag and found.etag != unquoted_etag(etag):
            with self._lock:
                self.num_changed += 1
            if self._if_changed == "error":
                raise _Rejected(Status.CHANGED, f"the object's etag is {found.etag}, the manifest's {etag}")
        return _whole(found.data, byte_range)

    def _object_client(self) -> ObjectClient:
        with self._lock:
            if self._client is None:
                name = choose_client(self._config.client)
                config = self._config
                self._client = open_client(
                    name, storage.settings(), timeout_s=config.timeout_s, hedge_after_s=config.hedge_after_s
                )
            return self._client

    def _too_large(self, size: str) -> _Rejected:
        return _Rejected(Status.TOO_LARGE, f"{size} than fetch.max_bytes ({self._config.max_bytes}) allows")


def _read_file(path: Path, first: int, *, at_most: int, expected: int) -> bytes:
    """Bytes of a file from ``first`` up to its end, or ``at_most`` of them; ``expected``: how many there seem to be."""
    # The file object of Path.open costs more than opening, reading and closing.
    descriptor = os.open(path, _OPEN_FLAGS)
    try:
        parts: list[bytes] = []
        size = 0
        # One read may bring less than there is, on file systems in user space above all.
        while size < at_most:
            data = os.pread(descriptor, min(at_most - size, max(expected + 1 - size, _READ_BYTES)), first + size)
            if not data:
                break
            parts.append(data)
            size += len(data)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _whole(data: bytes, byte_range: ByteRange | None) -> bytes:
    if byte_range is not None and len(data) < byte_range.size:
        raise _Rejected(Status.CHANGED, f"the file ends before byte {byte_range.last}, which the manifest names")
    return data


def _server(uri: str) -> str:
    """What limits the number of requests: a bucket, or a host of https."""
    return "/".join(uri.split("/", 3)[:3])


def _is_remote(uri: str | None) -> TypeGuard[str]:
    return uri is not None and not storage.is_local(uri)


def _judge(error: Exception) -> tuple[Status, bool]:
    """The status of a failed attempt, and whether another attempt may succeed."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Status.NOT_FOUND, False
    if isinstance(error, PermissionError):
        return Status.FORBIDDEN, False
    if isinstance(error, RequestFailed):
        return Status.FETCH_FAILED, error.may_pass
    if isinstance(error, OSError) and error.errno in _NO_SUCH_PATH_ERRNO:
        return Status.NOT_FOUND, False
    transient = isinstance(error, TimeoutError | ConnectionError) or (
        isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO
    )
    return Status.FETCH_FAILED, transient
