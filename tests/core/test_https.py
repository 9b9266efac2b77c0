"""The https reader against a real server that means no good."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from imgbatch.config import FetchConfig
from imgbatch.core import addresses, fetch, retry
from imgbatch.core.fetch import Fetcher
from imgbatch.errors import RowError, Status

IMAGE = b"\xff\xd8 as far as fetching is concerned"


class Server(BaseHTTPRequestHandler):
    """Says what the path asks for."""

    def do_GET(self) -> None:
        action, _, argument = self.path.lstrip("/").partition("/")
        if not self.headers.get("User-Agent", "").startswith("imgbatch/"):
            self.send_error(403)
        elif action == "redirect":
            self.send_response(302)
            self.send_header("Location", argument)
            self.end_headers()
        elif action == "moved":  # as servers do that write a Location as they have it, without encoding it
            self.send_response(302)
            self.send_header("Location", unquote(argument, "latin-1"))
            self.end_headers()
        elif action == "named" and argument != "a%20%C3%A4.jpg":
            self.send_response(404)
            self.end_headers()
        elif action == "status":
            self.send_response(int(argument))
            self.end_headers()
        elif action == "busy":
            self.send_response(503)
            self.send_header("Retry-After", unquote(argument, "latin-1"))
            self.end_headers()
        elif action == "unmeasured":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(IMAGE)
        elif action == "chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(IMAGE), IMAGE) + (b"" if argument == "cut" else b"0\r\n\r\n"))
        elif action == "endless":
            self.send_response(200)
            self.end_headers()
            self._write_for_ever(b"x" * 4096, every_s=0)
        elif action == "drip":
            self.send_response(200)
            self.end_headers()
            self._write_for_ever(b"x", every_s=0.05)
        elif action == "announced":
            self.send_response(200)
            self.send_header("Content-Length", argument)
            self.end_headers()
            self.wfile.write(IMAGE)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(IMAGE)))
            self.end_headers()
            self.wfile.write(IMAGE)

    def _write_for_ever(self, data: bytes, every_s: float) -> None:
        stopped = self.server.stopped  # type: ignore[attr-defined]
        try:
            while not stopped.wait(every_s):
                self.wfile.write(data)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "imgbatch")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def server(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address; this process trusts it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.stopped = threading.Event()  # type: ignore[attr-defined]
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    httpd.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield f"https://127.0.0.1:{httpd.server_port}"
    httpd.stopped.set()  # type: ignore[attr-defined]
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def fetched(uri: str, **settings: object) -> bytes | RowError:
    allowed = {"schemes": ("https",), "private_addresses": True, "retries": 0, "timeout_s": 20.0, "max_bytes": 10_000}
    with Fetcher(FetchConfig.model_validate(allowed | settings)) as fetcher:
        (outcome,) = fetcher.fetch([uri])
    return outcome


def failure(uri: str, **settings: object) -> RowError:
    outcome = fetched(uri, **settings)
    assert isinstance(outcome, RowError), outcome
    return outcome


def error(uri: str, **settings: object) -> tuple[Status, str]:
    outcome = failure(uri, **settings)
    return outcome.status, outcome.message


def test_a_file(server: str) -> None:
    assert fetched(f"{server}/image.jpg") == IMAGE
    assert fetched(f"{server}/a b/ä.jpg?x=1&y=ü") == IMAGE
    assert fetched(f"{server}/redirect//image.jpg") == IMAGE


def test_a_file_whose_size_is_not_announced(server: str) -> None:
    assert fetched(f"{server}/chunked/whole") == IMAGE
    assert fetched(f"{server}/unmeasured") == IMAGE


@pytest.mark.parametrize("action", ["redirect", "moved"])
def test_a_redirect_to_a_name_beyond_ascii_is_followed_however_it_is_written(action: str, server: str) -> None:
    assert fetched(f"{server}/named/a ä.jpg") == IMAGE
    assert fetched(f"{server}/{action}//named/a%20%C3%A4.jpg") == IMAGE


def test_a_part_of_a_tar_file_is_refused(server: str) -> None:
    status, message = error(f"{server}/000.tar#bytes=0-9")
    assert status is Status.REFUSED
    assert "local files and s3:// only" in message


def test_https_is_off_unless_it_is_asked_for(server: str) -> None:
    assert error(f"{server}/image.jpg", schemes=("file", "s3"))[0] is Status.REFUSED
    status, message = error(f"{server}/image.jpg", private_addresses=False)
    assert status is Status.REFUSED
    assert "127.0.0.1, which is no public address" in message


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("https://127.0.0.2/", "127.0.0.2, which is no public address"),
        ("https://169.254.169.254/latest/meta-data/", "no public address"),
        ("http://example.com/", "http:// after a redirect"),
        ("file:///etc/passwd", "file:// after a redirect"),
        ("https://user:secret@127.0.0.1/", "holds credentials"),
    ],
)
def test_a_redirect_is_judged_like_a_first_request(
    target: str, words: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = addresses.is_public
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or judge(address))
    status, message = error(f"{server}/redirect/{target}", private_addresses=False)
    assert status is Status.REFUSED
    assert words in message
    assert "secret" not in message


def test_redirects_end(server: str) -> None:
    status, message = error(f"{server}/redirect/" + "/redirect/" * 10)
    assert (status, message) == (Status.REFUSED, "more than 5 redirects")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("status/404", Status.NOT_FOUND),
        ("status/403", Status.FORBIDDEN),
        ("status/503", Status.FETCH_FAILED),
        ("status/400", Status.FETCH_FAILED),
        ("endless", Status.TOO_LARGE),
        ("announced/1000000000", Status.TOO_LARGE),
        ("announced/5000", Status.FETCH_FAILED),
    ],
)
def test_what_a_server_may_answer(path: str, status: Status, server: str) -> None:
    assert error(f"{server}/{path}")[0] is status


@pytest.mark.parametrize(
    ("path", "attempts"),
    [
        ("status/503", 2),
        ("status/408", 2),
        ("status/522", 2),
        ("announced/5000", 2),
        ("chunked/cut", 2),
        ("status/400", 1),
        ("status/501", 1),
    ],
)
def test_what_may_pass_is_asked_for_again(
    path: str, attempts: int, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(fetch, "THROTTLED_PATIENCE_S", 0.0)
    outcome = failure(f"{server}/{path}", retries=1)
    assert (outcome.status, outcome.attempts) == (Status.FETCH_FAILED, attempts)


@pytest.mark.parametrize(
    ("said", "seconds"), [("7", 7.0), ("0", 0.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0), ("-5", 0.0), ("²", 0.0)]
)
def test_a_busy_server_says_when_to_come_back(
    said: str, seconds: float, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def backoff_s(_attempt: int, *, at_least_s: float) -> float:
        asked.append(at_least_s)
        return 0.0

    monkeypatch.setattr(fetch, "backoff_s", backoff_s)
    monkeypatch.setattr(fetch, "THROTTLED_PATIENCE_S", 0.0)
    assert failure(f"{server}/busy/{quote(said)}", retries=2).attempts == 3
    assert asked == [seconds] * 2


def test_an_answer_that_never_ends_runs_out_of_time(server: str) -> None:
    status, message = error(f"{server}/drip", timeout_s=0.5)
    assert status is Status.FETCH_FAILED
    assert "no whole answer in 0.5 s (fetch.timeout_s)" in message


def test_a_certificate_that_nobody_signed_is_not_trusted(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    status, message = error(f"{server}/image.jpg")
    assert status is Status.FETCH_FAILED
    assert "CERTIFICATE_VERIFY_FAILED" in message


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("https://", Status.REFUSED),
        ("https://host:99999/", Status.REFUSED),
        ("https://user:password@example.com/", Status.REFUSED),
        ("https://[::1/", Status.REFUSED),
        ("http://example.com/", Status.REFUSED),
        ("ftp://example.com/", Status.REFUSED),
    ],
)
def test_what_is_no_url_is_never_asked_for(uri: str, status: Status) -> None:
    outcome = error(uri)
    assert outcome[0] is status
    assert "password" not in outcome[1]
