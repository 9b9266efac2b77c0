"""Jobs on a Ray cluster, through the job server of its dashboard: submit, follow, list, stop.

The token is that of Ray's own conventions (``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``, ``~/.ray/auth_token``). It
travels in the header of every request and never in a job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import re
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from imgbatch import __version__
from imgbatch.errors import ExitCode, ImgbatchError, Interrupted, UsageError, normalise_message
from imgbatch.runtime.package import Package

TOKEN_FILE = Path("~/.ray/auth_token")
_ANSWER_S = 20.0
_PROBE_S = 120.0
_POLL_S = 1.0
_AGENT_S = 60.0
"""That a cluster which has just started may take until it starts jobs."""
_MOST_NODES = 10_000
"""That the dashboard lists."""
_LOST_AFTER_S = 600.0
"""How long the cluster may be out of reach before following a job gives up; the job goes on."""

_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_NO_AGENT = "No available agent"
_CHATTY_LOGGERS = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_PROBE = (
    "from importlib.util import find_spec; "
    "print('imgbatch', __import__('imgbatch').__version__ if find_spec('imgbatch') else 'none')"
)
_PROBED = re.compile(r"^imgbatch (\S+)$", re.MULTILINE)
_PROBE_MARK = {"imgbatch": "version"}
"""Metadata of jobs that only ask for the version. They stay, unlisted: one that is deleted comes back as failed."""
_CONNECTION_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)
"""What Ray's client raises when the cluster is out of reach or answers half; those of requests are ``OSError``."""


@dataclass(frozen=True)
class Job:
    """A submitted job as the cluster tells of it."""

    job_id: str
    status: str
    command: str
    started: float | None
    """Seconds since the epoch."""
    seconds: float | None
    """How long it ran, or has been running."""


class JobServer:
    """The job server at ``address``, the URL of a Ray dashboard.

    Raises:
        UsageError: nothing answers there, or it wants another token.
    """

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--address {address}: expected the URL of the dashboard, like http://127.0.0.1:8265")
        self.address = address.rstrip("/")
        token = read_token()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._cluster = self._ask("/api/v0/cluster_metadata")
        for chatty in _CHATTY_LOGGERS:
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with _no_other_address():
            self._client = JobSubmissionClient(self.address, headers=dict(self._headers))

    def check_versions(self, package: Package) -> None:
        """Refuse a cluster with another Ray or Python, or on which a job with ``package`` finds another imgbatch."""
        here = {"Ray": ray.__version__, "Python": _minor(platform.python_version())}
        there = {"Ray": self._cluster.get("rayVersion"), "Python": _minor(self._cluster.get("pythonVersion"))}
        if here == there:
            here["imgbatch"] = __version__
            there["imgbatch"] = self._version_found_by_jobs(package)
        for name, version in here.items():
            if there[name] != version:
                raise UsageError(
                    f"{self.address} has {name} {there[name]}, this machine {version}; "
                    f"install the same on both (one requirements.lock, one image)"
                )

    def has_gpus(self) -> bool:
        """Whether a node is there that has one."""
        nodes = self._ask(f"/api/v0/nodes?limit={_MOST_NODES}")["result"]["result"]
        return any(node["state"] == "ALIVE" and (node.get("resources_total") or {}).get("GPU") for node in nodes)

    def submit(self, words: Sequence[str], package: Package, *, num_gpus: int = 0) -> str:
        """Start ``imgbatch`` with ``words`` in the working directory of ``package``; returns the job's id.

        Args:
            num_gpus: for that process; it waits for a node that has them free, and without any runs on the head.
        """
        return self._start(shlex.join(["imgbatch", *words]), package, num_gpus=num_gpus)

    def follow(self, job_id: str, write: Callable[[str], object]) -> None:
        """Pass on what the job prints until it ends, across lost connections.

        Raises:
            ImgbatchError: the cluster has been out of reach for ten minutes.
        """
        self._info(job_id)
        log = _LogTail(write)
        lost_since: float | None = None
        while True:
            before = log.num_written
            try:
                asyncio.run(log.read(self._client, job_id))
                if self._info(job_id).status.is_terminal():
                    return
                lost_since = None
            except _CONNECTION_ERRORS as error:
                now = time.monotonic()
                if lost_since is None or log.num_written > before:
                    lost_since = now
                if now - lost_since > _LOST_AFTER_S:
                    raise ImgbatchError(f"{self.address} does not answer any more; job {job_id} goes on") from error
            time.sleep(_POLL_S)

    def exit_code(self, job_id: str) -> int:
        """That of the ended job's command.

        Raises:
            Interrupted: somebody stopped it.
            ImgbatchError: its command never ran to an end.
        """
        info = self._info(job_id)
        if info.status == JobStatus.SUCCEEDED:
            return ExitCode.DONE
        if info.status == JobStatus.STOPPED:
            raise Interrupted(f"job {job_id} was stopped; the same command continues")
        if info.driver_exit_code is None:
            raise ImgbatchError(f"job {job_id} failed: {normalise_message(info.message)}")
        return int(info.driver_exit_code)

    def jobs(self) -> list[Job]:
        """Every submitted job that the cluster remembers, the newest first."""
        found = [info for info in self._client.list_jobs() if info.type == JobType.SUBMISSION]
        asked_for = [info for info in found if not _PROBE_MARK.items() <= (info.metadata or {}).items()]
        return [_job(info) for info in sorted(asked_for, key=lambda info: info.start_time or 0, reverse=True)]

    def logs(self, job_id: str) -> str:
        """What the job has printed so far."""
        self._info(job_id)
        return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> str:
        """Stop the job and wait until it has ended; returns how."""
        self._info(job_id)
        self._client.stop_job(job_id)
        return self._wait(job_id, _PROBE_S).status.value

    def _version_found_by_jobs(self, package: Package) -> str:
        job_id = self._start(shlex.join(["python", "-c", _PROBE]), package, _PROBE_MARK)
        info = self._wait(job_id, _PROBE_S)
        found = _PROBED.search(self._client.get_job_logs(job_id))
        if not found:
            raise ImgbatchError(f"{self.address} cannot run Python: {normalise_message(info.message)}")
        return found[1]

    def _start(
        self, entrypoint: str, package: Package, metadata: dict[str, str] | None = None, *, num_gpus: int = 0
    ) -> str:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "working_dir.zip"
            package.write_zip(archive)
            give_up = time.monotonic() + _AGENT_S
            while True:
                try:
                    return self._client.submit_job(
                        entrypoint=entrypoint,
                        runtime_env={"working_dir": str(archive)},
                        metadata=metadata,
                        entrypoint_num_gpus=num_gpus or None,
                    )
                except RuntimeError as error:
                    # The head answers before the agent is there that starts jobs; then nothing was submitted.
                    if _NO_AGENT not in str(error):
                        raise
                    if time.monotonic() > give_up:
                        raise ImgbatchError(
                            f"--address {self.address}: no node starts jobs after {_AGENT_S:.0f} s; look at its Ray "
                            f"(`ray status`), and submit again"
                        ) from error
                    time.sleep(_POLL_S)

    def _wait(self, job_id: str, timeout_s: float) -> JobDetails:
        give_up = time.monotonic() + timeout_s
        while not (info := self._info(job_id)).status.is_terminal():
            if time.monotonic() > give_up:
                raise ImgbatchError(f"job {job_id} is still {info.status} after {timeout_s:.0f} s")
            time.sleep(_POLL_S / 5)
        return info

    def _info(self, job_id: str) -> JobDetails:
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            if "does not exist" in str(error):
                raise UsageError(f"job {job_id}: {self.address} knows none of this name") from error
            raise

    def _ask(self, path: str) -> dict[str, Any]:
        request = urllib.request.Request(self.address + path, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            error.close()
            raise UsageError(f"--address {self.address}: {_refusal(error.code, bool(self._headers))}") from error
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise UsageError(f"--address {self.address}: no cluster answers ({normalise_message(reason)})") from error
        except (ValueError, KeyError) as error:
            raise UsageError(f"--address {self.address}: what answers there is no Ray dashboard") from error


def read_token() -> str | None:
    """The token for a cluster, from the places that Ray looks in; none where there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else TOKEN_FILE.expanduser()
    try:
        return path.read_text().strip() or None
    except OSError as error:
        if named:
            raise UsageError(f"RAY_AUTH_TOKEN_PATH {named}: {error.strerror or error}") from error
        return None


class _LogTail:
    """Passes on a log that every connection sends from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.num_written = 0

    async def read(self, client: JobSubmissionClient, job_id: str) -> None:
        position = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, self.num_written - position) :]
            position += len(text)
            if new:
                self._write(new)
                self.num_written = position


@contextmanager
def _no_other_address() -> Iterator[None]:
    """Ray's client takes the address from the environment even where one is given."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(normalise_message(error)) from error
    finally:
        os.environ.update(hidden)


def _refusal(status: int, sent_token: bool) -> str:
    if status == 401 or (status == 403 and not sent_token):
        return "the cluster wants a token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    if status == 403:
        return "the cluster refuses the token; set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its own"
    return f"what answers there is no Ray dashboard (HTTP {status})"


def _minor(version: str | None) -> str | None:
    """``3.11`` of ``3.11.7``."""
    return version and ".".join(version.split(".")[:2])


def _job(info: JobDetails) -> Job:
    started = info.start_time / 1000 if info.start_time else None
    ended = info.end_time / 1000 if info.end_time else time.time()
    return Job(
        job_id=info.submission_id or "",
        status=info.status.value,
        command=info.entrypoint,
        started=started,
        seconds=ended - started if started else None,
    )
