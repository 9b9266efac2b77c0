"""Files over https, where ``fetch.schemes`` allows it.

The manifest is not trusted: the address is judged after the name is resolved and is the one connected to, so a name
cannot point elsewhere in between; redirects are judged like first requests; seconds and bytes are bounded for the
answer as a whole. Neither proxies nor credentials of the environment are used.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import string
import threading
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from imgbatch import __version__
from imgbatch.config import FetchConfig
from imgbatch.core.access import Refused
from imgbatch.core.addresses import resolve
from imgbatch.core.fetch_objects import ObjectTooLarge, RequestFailed
from imgbatch.core.retry import THROTTLED_HTTP, TRANSIENT_HTTP

MAX_REDIRECTS = 5
_HEADERS = {
    "Accept": "image/*",
    # Some servers refuse whoever does not say who is asking.
    "User-Agent": f"imgbatch/{__version__}",
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK_BYTES = 1 << 18
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"


class HttpsReader:
    """Reads files over https; for any thread."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._context = ssl.create_default_context()

    def read(self, uri: str) -> bytes:
        """The whole file.

        Raises:
            Refused: a host, an address or a redirect that is not allowed.
            FileNotFoundError, PermissionError: the server says so.
            ObjectTooLarge: more than ``fetch.max_bytes``.
            TimeoutError: longer than ``fetch.timeout_s``, redirects not counted.
            RequestFailed: anything else.
        """
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._request(_split(uri))
            if isinstance(answer, bytes):
                return answer
            uri = urljoin(uri, answer)
        raise Refused(f"more than {MAX_REDIRECTS} redirects")

    def _request(self, parts: SplitResult) -> bytes | str:
        """The content, or where it is instead."""
        assert parts.hostname is not None
        try:
            address = resolve(parts.hostname, parts.port or 443, private=self._config.private_addresses)
            with self._connection(parts.hostname, address, parts.port or 443) as connection:
                path = quote(parts.path or "/", safe=_SAFE_IN_PATH)
                query = f"?{quote(parts.query, safe=_SAFE_IN_PATH + '?')}" if parts.query else ""
                connection.request("GET", path + query, headers=_HEADERS)
                return self._answer(connection.getresponse())
        except socket.gaierror as error:
            raise RequestFailed(
                f"{parts.hostname}: {error.strerror}", may_pass=error.errno == socket.EAI_AGAIN
            ) from None
        except ssl.SSLError as error:
            # A server with too much to do breaks off in the middle of the handshake.
            ended = isinstance(error, ssl.SSLEOFError)
            raise RequestFailed(f"{parts.hostname}: {error.reason}", may_pass=ended) from None
        except http.client.InvalidURL as error:
            raise Refused(str(error)) from None
        except http.client.HTTPException as error:
            raise RequestFailed(f"{parts.hostname}: {type(error).__name__}: {error}", may_pass=True) from None

    @contextlib.contextmanager
    def _connection(self, host: str, address: str, port: int) -> Iterator[http.client.HTTPSConnection]:
        """A connection that ends when the time is up, whatever the server is doing then."""
        timeout_s = self._config.timeout_s
        connection = http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._context)
        plain = socket.create_connection((address, port), timeout_s)
        out_of_time = threading.Event()

        def give_up() -> None:
            out_of_time.set()
            with contextlib.suppress(OSError):
                plain.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            # Sharing the descriptor, so that the timer ends the encrypted connection as well.
            connection.sock = self._context.wrap_socket(plain.dup(), server_hostname=host)
            yield connection
        except (OSError, http.client.HTTPException):
            # What a connection raises that give_up has ended.
            if not out_of_time.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
            plain.close()
        if out_of_time.is_set():
            raise TimeoutError(f"{host}: no whole answer in {timeout_s:g} s (fetch.timeout_s)")

    def _answer(self, response: http.client.HTTPResponse) -> bytes | str:
        if response.status in _REDIRECTS and (location := response.getheader("Location")):
            # What a server wrote as it is, http.client took for Latin-1; the bytes are what it meant.
            return quote(location.encode("latin-1"), safe=string.punctuation)
        if response.status in (404, 410):
            raise FileNotFoundError(f"the server answered {response.status}")
        if response.status in (401, 403):
            raise PermissionError(f"the server answered {response.status}")
        if response.status != 200:
            raise RequestFailed(
                f"the server answered {response.status}",
                may_pass=response.status in TRANSIENT_HTTP,
                throttled=response.status in THROTTLED_HTTP,
                retry_after_s=_seconds(response.getheader("Retry-After")),
            )
        announced = response.length
        if announced is not None and announced > self._config.max_bytes:
            raise ObjectTooLarge(announced)
        parts: list[bytes] = []
        size = 0
        while data := response.read(_CHUNK_BYTES):
            parts.append(data)
            size += len(data)
            if size > self._config.max_bytes:
                raise ObjectTooLarge(size)
        if announced is not None and size < announced:
            raise RequestFailed(f"the answer ended after {size} of {announced} bytes", may_pass=True)
        return b"".join(parts)


def _seconds(retry_after: str | None) -> float:
    """Of a ``Retry-After``; none where it is a date, which clocks may disagree about."""
    return float(retry_after) if retry_after and re.fullmatch(r"[0-9]{1,9}", retry_after) else 0.0


def _split(uri: str) -> SplitResult:
    try:
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise Refused(str(error)) from None
    if parts.scheme != "https":
        raise Refused(f"{parts.scheme}:// after a redirect from https://")
    if not parts.hostname or port == 0:
        raise Refused("names no host")
    if "@" in parts.netloc:
        raise Refused("holds credentials, which would end up in the output; take them out")
    return parts
