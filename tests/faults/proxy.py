"""An HTTP proxy before an S3 server that answers as servers in trouble do: for chosen keys, and so many times."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

CODES = {
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    500: "InternalError",
    503: "SlowDown",
}
FOREVER = 10**9
_NOT_PASSED_ON = {"connection", "transfer-encoding", "keep-alive", "date", "server"}


@dataclass
class Fault:
    """What happens to requests of one method whose ``/bucket/key?query`` holds a match of ``key``.

    ``503`` and the other numbers: that answer, and the server is not asked. ``reset``: the connection is, before the
    server is asked. ``lost``: the server does as it was asked, and the connection is reset in place of its answer.
    ``truncate``: half of the body that was announced; ``parts``: the same, but nothing to a request for a whole object.
    ``slow:S``: half of the body, ``S`` seconds, the other half; an
    answer without a body comes after ``S`` seconds. ``unconditional``: the server does not see an ``If-None-Match``;
    it must be one that checks no signatures. ``undeleted:CODE``: none of the objects is deleted, each for that reason;
    the path of such a request, a POST, is ``/bucket?delete``.
    """

    method: str
    key: str
    action: str
    times: int = FOREVER
    """So many requests for each object, counted by path; ``FOREVER``: all."""
    after: int = 0
    """So many matching requests for each object pass first."""
    seen: dict[str, int] = field(default_factory=dict)

    def acts(self, method: str, path: str) -> bool:
        """Whether it acts on this request, which is counted."""
        if method != self.method or not re.search(self.key, path):
            return False
        count = self.seen[path] = self.seen.get(path, 0) + 1
        return self.after < count <= self.after + self.times


class FaultyServer:
    """Passes requests on to ``upstream`` but for :attr:`faults`, which may change at any time."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.choose: Callable[[str, str], str | None] | None = None
        """Method and path to an action, in place of :attr:`faults`."""
        self.acted: list[tuple[str, str, str]] = []
        """Method, path and action of every request that did not simply pass."""
        self.passed: list[tuple[str, str, int]] = []
        """Method, path and bytes of the answer's body of every request that did."""
        self._lock = threading.Lock()

    def action(self, method: str, path: str) -> str | None:
        with self._lock:
            if self.choose is not None:
                action = self.choose(method, path)
            else:
                acting = [fault for fault in self.faults if fault.acts(method, path)]
                action = acting[0].action if acting else None
            if action is not None:
                self.acted.append((method, path, action))
            return action


@contextmanager
def faulty_server(upstream: str) -> Iterator[tuple[str, FaultyServer]]:
    """Its URL, and itself."""
    state = FaultyServer(upstream)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(state: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            action = state.action(self.command, unquote(self.path))
            if action == "parts":
                action = "truncate" if self.headers.get("Range") else None
            if action is not None and action.startswith("undeleted:"):
                self.leave(action.removeprefix("undeleted:"), body)
                return
            if action is not None and action.isdigit():
                self.refuse(int(action))
                return
            if action != "reset":
                answer, content = self.ask(body, hidden="if-none-match" if action == "unconditional" else "")
            if action in ("reset", "lost"):
                self.reset()
            else:
                self.pass_on(answer, content, action or "")

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = do_request

        def ask(self, body: bytes, hidden: str) -> tuple[http.client.HTTPResponse, bytes]:
            """``hidden``: a header that the server does not see."""
            connection = http.client.HTTPConnection(state.upstream, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect", hidden):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
            return answer, content

        def pass_on(self, answer: http.client.HTTPResponse, content: bytes, action: str) -> None:
            if not action:
                state.passed.append((self.command, unquote(self.path), len(content)))
            half = len(content) // 2
            delay_s = float(action.removeprefix("slow:")) if action.startswith("slow:") else 0.0
            if not half:
                time.sleep(delay_s)
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _NOT_PASSED_ON:
                    self.send_header(name, value)
            if answer.getheader("Content-Length") is None:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:half])
            if action == "truncate":
                # What was sent arrives, and then nothing more does.
                self.close_connection = True
                return
            if half:
                time.sleep(delay_s)
            self.wfile.write(content[half:])

        def refuse(self, status: int) -> None:
            code = CODES[status]
            said = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self.answer(status, b"" if self.command == "HEAD" else said)

        def leave(self, code: str, body: bytes) -> None:
            reason = f"<Code>{code}</Code><Message>as told</Message>".encode()
            errors = [b"<Error>" + key + reason + b"</Error>" for key in re.findall(b"<Key>.*?</Key>", body)]
            self.answer(200, b"<DeleteResult>" + b"".join(errors) + b"</DeleteResult>")

        def answer(self, status: int, content: bytes) -> None:
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def reset(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # whoever asked gave up
                self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Not on the terminal."""

    return Handler
