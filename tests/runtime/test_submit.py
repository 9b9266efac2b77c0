"""Jobs on a cluster of its own, started as an operator starts one: ``ray start``, token authentication."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from imgbatch.cli import run
from imgbatch.core.verify import verify
from imgbatch.errors import ExitCode

HOST = "127.0.0.2"
"""Ray rewrites 127.0.0.1 to the interface's address."""
START_S = 60.0
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class TokenCluster:
    url: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def token_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenCluster]:
    """A head that does no work of its own until a job starts it: it is all that the driver of a job needs."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "token").write_text(secrets.token_hex(16))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with contextlib.ExitStack() as stack:
        # Another process may take a port between the moment it was free and the start: once more, with others.
        url = stack.enter_context(head(folder, environment)) or stack.enter_context(head(folder, environment))
        assert url is not None, (folder / "ray.log").read_text()
        yield TokenCluster(url, environment)


@contextlib.contextmanager
def head(folder: Path, environment: dict[str, str]) -> Iterator[str | None]:
    """The URL of its dashboard; none: it did not come."""
    port, dashboard_port, client_port, agent_port = (free_port() for _ in range(4))
    url = f"http://{HOST}:{dashboard_port}"
    command = [
        # Nothing looks for the GPU that it says it has.
        *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=1", "--disable-usage-stats"),
        *(f"--node-ip-address={HOST}", f"--port={port}", f"--object-store-memory={100 * 10**6}"),
        *(f"--dashboard-host={HOST}", f"--dashboard-port={dashboard_port}"),
        *(f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"),
    ]
    with (folder / "ray.log").open("w") as log:
        # In a session of its own, so that all of it can be ended.
        started = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        yield url if dashboard_came(url, started) else None
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def dashboard_came(url: str, head: subprocess.Popen[bytes]) -> bool:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and head.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:
                return True
        except OSError:
            time.sleep(0.2)
    return False


@pytest.fixture
def laptop(token_cluster: TokenCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenCluster:
    """The test runs in an empty working directory, with the cluster's address and token."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in token_cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", token_cluster.url)
    return token_cluster


@pytest.fixture
def night(photo_manifest: Path, tiny_model, tmp_path: Path) -> list[str]:
    """A classification of twelve photos, told by a configuration beside the working directory."""
    (tmp_path / "night.yaml").write_text(
        f"input: {{manifest: {photo_manifest}, limit: 12}}\n"
        f"model: {{path: {tiny_model.path}}}\n"
        f"errors: {{max_rate: 1}}\n"
        f"resources: {{device: cpu, decode_actors: 1, classify_actors: 1}}\n"
    )
    return ["classify", "-c", str(tmp_path / "night.yaml"), "-o", str(tmp_path / "labels")]


@pytest.fixture
def late_agent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cluster that says twice that it does not start jobs yet, as one does that has just started; what it said."""
    submit, said = JobSubmissionClient.submit_job, []

    def submit_late(client: JobSubmissionClient, **job: Any) -> str:
        if len(said) < 2:
            said.append("status code 500: No available agent to submit job, please try again later.")
            raise RuntimeError(said[-1])
        return submit(client, **job)

    monkeypatch.setattr(JobSubmissionClient, "submit_job", submit_late)
    return said


@pytest.mark.usefixtures("laptop")
def test_a_command_that_makes_something_for_gpus_gets_one(monkeypatch):
    submit, num_gpus = JobSubmissionClient.submit_job, []

    def noted(client: JobSubmissionClient, **job: Any) -> str:
        if not job["entrypoint"].startswith("imgbatch "):
            return submit(client, **job)
        num_gpus.append(job["entrypoint_num_gpus"])
        return "noted"

    monkeypatch.setattr(JobSubmissionClient, "submit_job", noted)
    optimize = ["model", "optimize", "/m", "--calibration", "/c.parquet", "--target"]
    for options, target in (([], "onnx-int8"), ([], "mnn-fp32"), (["--entrypoint-gpus", "2"], "mnn-fp32")):
        assert run(["submit", "--no-wait", *options, "--", *optimize, target]) == ExitCode.DONE
    assert num_gpus == [1, None, 2]


@pytest.mark.usefixtures("laptop")
def test_a_night_from_a_laptop(night, tmp_path, capfd, late_agent):
    """One cluster, one after the other: each start of Ray costs ten seconds."""
    assert run(["submit", "--", *night, "--engine", "local"]) == ExitCode.DONE
    assert len(late_agent) == 2
    assert "12 rows: 11 predictions, 1 errors" in capfd.readouterr().out
    assert verify(str(tmp_path / "labels")).ok

    assert run(["submit", "--", "verify", str(tmp_path / "nothing")]) == ExitCode.USAGE
    output = capfd.readouterr()
    assert "nothing" in output.out
    assert "exit code 2" in output.err.splitlines()[-1]

    assert run(["jobs", "list"]) == ExitCode.DONE
    listed = capfd.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in listed] == ["FAILED", "SUCCEEDED"]
    assert all("imgbatch" in line for line in listed)

    assert run(["jobs", "logs", listed[1].split()[0]]) == ExitCode.DONE
    assert "12 rows" in capfd.readouterr().out
    for words in (["logs"], ["logs", "-f"], ["stop"]):
        assert run(["jobs", *words, "nobody"]) == ExitCode.USAGE
        (line,) = capfd.readouterr().err.splitlines()
        assert "nobody" in line


def test_a_cluster_that_never_starts_jobs_is_one_line(laptop, night, late_agent, monkeypatch, capfd):
    monkeypatch.setattr("imgbatch.runtime.submit._AGENT_S", 0.0)
    assert run(["submit", "--", *night, "--engine", "local"]) == ExitCode.FAILED
    (line,) = capfd.readouterr().err.splitlines()
    assert f"--address {laptop.url}: no node starts jobs" in line
    assert len(late_agent) == 1


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
    ],
)
@pytest.mark.usefixtures("laptop")
def test_another_token_or_none_is_one_line(night, variables, named, monkeypatch, capfd):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for words in (["submit", "--", *night], ["jobs", "list"]):
        assert run(words) == ExitCode.USAGE
        (line,) = capfd.readouterr().err.splitlines()
        assert named in line


@pytest.mark.parametrize(("program", "version"), [("ray", "2.59.0"), ("Python", "3.10.1"), ("imgbatch", "9.9.9")])
@pytest.mark.usefixtures("laptop")
def test_another_version_is_refused(night, program, version, monkeypatch, capfd):
    target = {
        "ray": "ray.__version__",
        "imgbatch": "imgbatch.runtime.submit.__version__",
        "Python": "platform.python_version",
    }[program]
    monkeypatch.setattr(target, (lambda: version) if program == "Python" else version)
    assert run(["submit", "--no-wait", "--", *night]) == ExitCode.USAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert program.lower() in line.lower()
    assert version.removesuffix(".1") in line


@contextlib.contextmanager
def submitted(words: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``imgbatch submit`` as a process that can be interrupted, once the cluster has the job; and the job's id."""
    command = [BIN / "imgbatch", "submit", "--", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("job "), line + process.stderr.read()
        try:
            yield process, line.split()[1]
        finally:
            process.kill()


@pytest.mark.soak
@pytest.mark.usefixtures("laptop")
def test_ctrl_c_detaches_and_the_job_goes_on_to_its_end(night, tmp_path, capfd):
    with submitted([*night, "--engine", "local"]) as (process, job_id):
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert f"imgbatch jobs logs -f {job_id}" in errors

    assert run(["jobs", "logs", "-f", job_id]) == ExitCode.DONE
    assert "12 rows" in capfd.readouterr().out
    assert verify(str(tmp_path / "labels")).ok


@pytest.mark.soak
@pytest.mark.usefixtures("laptop")
def test_a_job_that_is_stopped_says_so_and_the_same_command_continues(night, tmp_path, capfd):
    slowly = [*night, "--limit", "120", "--set", "classify.unit_rows=1"]
    with submitted(slowly) as (process, job_id):
        wait_for_unit(tmp_path / "labels")
        assert run(["jobs", "stop", job_id]) == ExitCode.DONE
        assert capfd.readouterr().out.split()[-1] == "STOPPED"
        _, errors = process.communicate(timeout=60)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "the same command continues" in errors

    assert run(["submit", "--", *slowly]) == ExitCode.DONE
    assert "continuing" in capfd.readouterr().out
    assert verify(str(tmp_path / "labels")).ok


def wait_for_unit(out: Path) -> None:
    give_up = time.monotonic() + 120
    while not list(out.glob("runs/*/units/*.parquet")):
        assert time.monotonic() < give_up
        time.sleep(0.05)


class Proxy:
    """Forwards connections to the cluster, and cuts them on demand."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._listening = socket.create_server((HOST, 0))
        self._open: list[socket.socket] = []
        self.url = f"http://{HOST}:{self._listening.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._target)
                self._open += [client, server]
                for source, sink in ((client, server), (server, client)):
                    Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> int:
        """How many connections were open."""
        number = 0
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                number += 1
            connection.close()
        self._open.clear()
        return number

    def close(self) -> None:
        self._listening.close()
        self.cut()


@pytest.mark.soak
def test_a_lost_connection_loses_and_repeats_nothing(laptop, night, tmp_path, monkeypatch):
    proxy = Proxy(laptop.url)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", proxy.url)
    with submitted([*night, "--limit", "120", "--set", "classify.unit_rows=1"]) as (process, _):
        wait_for_unit(tmp_path / "labels")
        assert proxy.cut()
        output, _ = process.communicate(timeout=120)
    proxy.close()
    assert process.returncode == ExitCode.DONE
    assert output.count("Running entrypoint") == 1
    assert output.count("120 rows:") == 1


@pytest.mark.soak
@pytest.mark.usefixtures("laptop")
def test_ray_itself_can_submit_the_entry_points(night, tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [BIN / "ray", "job", "submit", "--", "python", root / "jobs" / "classify.py", *night[1:]]
    assert subprocess.run(command, check=False).returncode == 0
    assert verify(str(tmp_path / "labels")).ok
