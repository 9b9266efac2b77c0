"""The bytes behind URIs, in order, many requests in flight; whatever goes wrong is the row's outcome."""

from __future__ import annotations

import asyncio
import errno
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import fsspec.asyn

from imgbatch.config import FetchConfig
from imgbatch.core import storage
from imgbatch.core.retry import TRANSIENT_HTTP, backoff_s, http_status
from imgbatch.errors import RowError, Stage, Status, row_error

ALLOWED_SCHEMES = ("file", "s3")

_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT}
)
_NETWORK_PACKAGES = ("aiohttp", "botocore", "urllib3")
_CREDENTIAL_ERRORS = ("CredentialRetrievalError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
_RANGE_NOT_SATISFIABLE = 416

Fetched = bytes | RowError


class _Rejected(Exception):
    """The outcome is known and trying again would not change it."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Fetcher:
    """Fetches files; a context manager, for one thread.

    Local files are read when they are asked for: handing a read of some 20 µs to another thread costs more than the
    read. Everything else is requested up to ``config.in_flight`` rows ahead.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._executor: ThreadPoolExecutor | None = None
        self._closing = threading.Event()
        self.fetch_s = 0.0
        """Seconds for which whoever consumes the files has waited, in all."""

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is in flight; for good."""
        self._closing.set()
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def fetch(self, uris: Sequence[str | None]) -> Iterator[Fetched]:
        """The content of each of ``uris``, or why there is none, in order.

        Holds at most ``config.in_flight`` files, of at most ``config.max_bytes`` each. A file over that size is
        ``TOO_LARGE`` and not read on; a null or a scheme that is not allowed is an error row as well.
        """
        following = iter(uris)
        # A local file waits as its URI, anything else as the request under way.
        ahead: deque[Future[Fetched] | str] = deque()
        try:
            for _ in uris:
                started = time.perf_counter()
                for uri in islice(following, self._config.in_flight - len(ahead)):
                    ahead.append(self._submit(uri) if _is_remote(uri) else uri or "")
                first = ahead.popleft()
                fetched = first.result() if isinstance(first, Future) else self._fetch_one(first, self._read_local)
                self.fetch_s += time.perf_counter() - started
                yield fetched
        finally:
            for pending in ahead:
                if isinstance(pending, Future):
                    pending.cancel()

    def _submit(self, uri: str) -> Future[Fetched]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._config.in_flight, thread_name_prefix="fetch")
        return self._executor.submit(self._fetch_one, uri, self._read_remote)

    def _fetch_one(self, uri: str, read: Callable[[str], bytes]) -> Fetched:
        attempt = 0
        while True:
            attempt += 1
            try:
                return read(uri)
            except _Rejected as rejected:
                return row_error(rejected.status, Stage.FETCH, rejected, attempt)
            except Exception as error:
                status, may_pass = _judge(error)
                out_of_tries = not may_pass or attempt > self._config.retries
                if out_of_tries or self._closing.wait(backoff_s(attempt)):
                    return row_error(status, Stage.FETCH, f"{type(error).__name__}: {error}", attempt)

    def _read_local(self, uri: str) -> bytes:
        if not uri:
            raise _Rejected(Status.NOT_FOUND, "the uri is empty")
        path = storage.local_path(uri)
        # Looked at before it is opened, because opening a named pipe waits for a writer.
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise _Rejected(Status.NOT_FOUND, "a directory, not a file")
        if not stat.S_ISREG(found.st_mode):
            raise _Rejected(Status.REFUSED, "not a regular file")
        if found.st_size > self._config.max_bytes:
            raise self._too_large(f"{found.st_size} bytes, more")
        with path.open("rb", buffering=0) as file:
            return file.read()

    def _read_remote(self, uri: str) -> bytes:
        scheme = urlsplit(uri).scheme
        if scheme not in ALLOWED_SCHEMES:
            raise _Rejected(Status.REFUSED, f"{scheme}:// is not among {', '.join(ALLOWED_SCHEMES)}")
        fs, path = storage.filesystem(uri)
        try:
            data = fsspec.asyn.sync(fs.loop, self._cat, fs, path)
        except OSError as error:
            # Of an empty object there is no range to give.
            if http_status(error) != _RANGE_NOT_SATISFIABLE:
                raise
            return b""
        if len(data) > self._config.max_bytes:
            raise self._too_large("more")
        return data

    async def _cat(self, fs: Any, path: str) -> bytes:
        # A range bounds what comes back without a request for the size first.
        request = fs._cat_file(path, start=0, end=self._config.max_bytes + 1)
        return await asyncio.wait_for(request, self._config.timeout_s)

    def _too_large(self, size: str) -> _Rejected:
        return _Rejected(Status.TOO_LARGE, f"{size} than fetch.max_bytes ({self._config.max_bytes}) allows")


def _is_remote(uri: str | None) -> TypeGuard[str]:
    return uri is not None and not storage.is_local(uri)


def _judge(error: Exception) -> tuple[Status, bool]:
    """The status of a failed attempt, and whether another attempt may succeed."""
    status = http_status(error)
    if status in TRANSIENT_HTTP:
        return Status.FETCH_FAILED, True
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status == 404:
        return Status.NOT_FOUND, False
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in _CREDENTIAL_ERRORS:
        return Status.FORBIDDEN, False
    transient = (
        isinstance(error, TimeoutError | ConnectionError)
        or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO)
        or (status is None and type(error).__module__.partition(".")[0] in _NETWORK_PACKAGES)
    )
    return Status.FETCH_FAILED, transient
