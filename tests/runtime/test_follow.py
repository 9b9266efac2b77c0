"""Following a job over connections that break: a job server that speaks Ray's protocol and drops one on purpose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import ray
from aiohttp import web

from imgbatch.errors import ExitCode, ImgbatchError
from imgbatch.runtime import submit
from imgbatch.runtime.submit import JobServer

LOG = ["Running entrypoint\n", "run r1: 12 images\n", "12 rows: 12 predictions\n"]


class DroppingServer:
    """Sends ``LOG`` from its beginning on each connection; the first two end in the middle, without a farewell."""

    def __init__(self) -> None:
        self.connections = 0
        self.ended = False
        self.away = False
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/api/v0/cluster_metadata", self._metadata)
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/{job}", self._job)
        app.router.add_get("/api/jobs/{job}/logs/tail", self._tail)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _metadata(self, _: web.Request) -> web.Response:
        return web.json_response({"data": {"rayVersion": ray.__version__, "pythonVersion": "3.11.0"}})

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__})

    async def _job(self, request: web.Request) -> web.Response:
        if self.away:
            return web.Response(status=502)
        status = {"status": "FAILED", "driver_exit_code": 3} if self.ended else {"status": "RUNNING"}
        return web.json_response(
            {"type": "SUBMISSION", "submission_id": request.match_info["job"], "entrypoint": "imgbatch", **status}
        )

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        if self.away:
            return web.Response(status=502)
        self.connections += 1
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        for line in LOG[: self.connections]:
            await socket.send_str(line)
        if self.connections < len(LOG):
            await asyncio.sleep(0.05)
            assert request.transport is not None
            request.transport.abort()
        else:
            self.ended = True
            await socket.close()
        return socket


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DroppingServer]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(submit, "_POLL_S", 0.01)
    dropping = DroppingServer()
    dropping.start()
    yield dropping
    dropping.stop()


def test_lost_connections_lose_and_repeat_nothing(server):
    written: list[str] = []
    jobs = JobServer(server.url)
    jobs.follow("job", written.append)
    assert server.connections == 3
    assert "".join(written) == "".join(LOG)
    assert jobs.exit_code("job") == ExitCode.ERROR_BUDGET


def test_a_cluster_that_stays_away_is_given_up_but_the_job_is_not(server, monkeypatch):
    monkeypatch.setattr(submit, "_LOST_AFTER_S", 0.2)
    jobs = JobServer(server.url)

    def leave(_: str) -> None:
        server.away = True

    with pytest.raises(ImgbatchError, match="goes on"):
        jobs.follow("job", leave)
