"""The whole as its users run it: a bucket, a cluster of three nodes with a token, and a job from a laptop.

On the way a worker node dies and the S3 server goes away for some seconds. Without more the server is moto in a process
of its own, behind a forwarder that breaks connections and refuses new ones; ``IMGBATCH_TEST_S3`` names another one,
whose keys are in the environment, and ``IMGBATCH_TEST_S3_RESTART`` the shell command that kills it and starts it again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import duckdb
import numpy as np
import psutil
import pytest
from PIL import Image

from imgbatch.cli import run
from imgbatch.core import storage
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths, find_run
from imgbatch.errors import ExitCode
from tests.conftest import TINY_CLASSES, s3_environment

pytestmark = [pytest.mark.ray, pytest.mark.soak]

HEAD, WORKERS, REPLACEMENT = "127.0.0.2", ("127.0.0.3", "127.0.0.4"), "127.0.0.5"
"""Ray rewrites 127.0.0.1 to the interface's address."""
BIN = Path(sys.executable).parent
NUM_IMAGES, NUM_BROKEN = 2_400, 24
UNIT_ROWS = 32
OUTAGE_S = 4.0
BOUNDED_S = 600.0
STORE_BYTES = 200 * 10**6
HEALTH = '{"health_check_initial_delay_ms":500,"health_check_period_ms":1000,"health_check_failure_threshold":3}'


class Forwarder:
    """Passes connections on to ``upstream``, and for the length of an outage breaks and refuses them."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._target = (parts.hostname, parts.port or 80)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listen(0)
        self._port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def _listen(self, port: int) -> None:
        self._listening = socket.create_server(("127.0.0.1", port), backlog=512)
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()
                    continue
                with self._lock:
                    self._open |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        with self._lock:
            self._open -= {source, sink}

    def close(self) -> None:
        # Only a shutdown wakes who waits in accept.
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            broken = list(self._open)
        for connection in broken:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def outage(self) -> None:
        self.close()
        time.sleep(OUTAGE_S)
        self._listen(self._port)


@dataclass(frozen=True)
class Store:
    """An S3 server and how it goes away for a while."""

    url: str
    outage: Callable[[], object]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    named, restart = os.environ.get("IMGBATCH_TEST_S3"), os.environ.get("IMGBATCH_TEST_S3_RESTART")
    if named and restart:
        yield Store(named, lambda: subprocess.run(restart, shell=True, check=True, stdin=subprocess.DEVNULL))
        return
    with contextlib.ExitStack() as stack:
        forwarder = Forwarder(named or stack.enter_context(moto(tmp_path / "moto.log")))
        stack.callback(forwarder.close)
        yield Store(forwarder.url, forwarder.outage)


@contextlib.contextmanager
def moto(log: Path) -> Iterator[str]:
    """URL of a server in a process of its own, which chooses its port."""
    with log.open("w") as output:
        server = subprocess.Popen([BIN / "moto_server", "-H", "127.0.0.1", "-p", "0"], stdout=output, stderr=output)
    try:
        wait_until(lambda: "Running on" in log.read_text(), 60, log)
        (url,) = re.findall(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())
        yield url
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """``s3://`` and a new bucket; the environment tells of the server, as it would on a laptop."""
    for name, value in s3_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setattr(storage, "_filesystems", {})
    name = f"s3://night-{secrets.token_hex(6)}"
    fs, path = storage.filesystem(name)
    fs.mkdir(path)
    yield name
    fs.rm(path, recursive=True)


@dataclass
class Cluster:
    """Nodes as an operator starts them, each the processes of one ``ray start``."""

    folder: Path
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gcs: str = ""
    url: str = ""

    def start_head(self) -> None:
        """Without a core to work on: jobs' drivers run there, and nothing else."""
        assert any(self._start_head() for _ in range(2)), self._log(HEAD).read_text()
        wait_until(lambda: answers(HEAD, urlsplit(self.url).port or 0), 90)

    def _start_head(self) -> bool:
        port, dashboard_port, client_port = (free_port(HEAD) for _ in range(3))
        self.gcs, self.url = f"{HEAD}:{port}", f"http://{HEAD}:{dashboard_port}"
        return self._start(
            HEAD, "--head", "--num-cpus=0", f"--port={port}", f"--temp-dir={self.folder}",
            f"--dashboard-host={HEAD}", f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}", f"--system-config={HEALTH}",
        )  # fmt: skip

    def start_worker(self, address: str) -> None:
        # So that there is work under way when things break.
        options, slowly = (f"--address={self.gcs}", "--num-cpus=4"), "classify.unit=delay:0.4"
        assert any(self._start(address, *options, failpoints=slowly) for _ in range(2)), self._log(address).read_text()

    def _log(self, address: str) -> Path:
        return self.folder / f"{address}.log"

    def _start(self, address: str, *options: str, failpoints: str = "") -> bool:
        """False: it ended at once, as where another process has taken a port that was free a moment ago."""
        command = [
            *(BIN / "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}"),
            *(f"--object-store-memory={STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--dashboard-agent-listen-port={free_port(address)}", *options),
        ]
        log_file = self._log(address)
        with log_file.open("w") as log:
            node = self.nodes[address] = subprocess.Popen(
                command,
                env=os.environ | self.environment | {VARIABLE: failpoints},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        wait_until(lambda: "Ray runtime started" in log_file.read_text() or node.poll() is not None, 90)
        return node.poll() is None

    def kill(self, address: str) -> int:
        """The raylet and whatever else the node consists of, by SIGKILL; returns how many processes those were."""
        node = self.nodes.pop(address)
        victims = [psutil.Process(node.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            victims += victims[0].children(recursive=True)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        node.wait()
        return len(victims)


@pytest.fixture
def cluster(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:  # noqa: ARG001 - its environment first
    """A head and two workers; the test submits to it with its token."""
    # Ray's sockets lie below: their paths must stay under 107 characters, which pytest's own folders do not.
    folder = Path(tempfile.mkdtemp(prefix="night-"))
    (folder / "token").write_text(secrets.token_hex(16))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(folder, environment)
    try:
        cluster.start_head()
        for address in WORKERS:
            cluster.start_worker(address)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.url)
        yield cluster
    finally:
        for address in list(cluster.nodes):
            cluster.kill(address)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.filterwarnings("always:Spark did not read")
def test_a_night(cluster: Cluster, store: Store, bucket: str, tiny_model: ModelBundle, tmp_path: Path) -> None:
    images, model, out = (storage.join(bucket, name) for name in ("images", "model", "out"))
    manifest = storage.join(bucket, "manifest.parquet")
    upload_images(images)
    for path in Path(tiny_model.path).iterdir():
        storage.replace(storage.join(model, path.name), path.read_bytes())
    assert run(["manifest", "build", images, "-o", manifest, "--targets-from", "folder"]) == ExitCode.DONE

    with submitted(tmp_path, model, manifest, out) as (job, log):

        def wait_for_units(number: int) -> None:
            wait_until(lambda: num_committed(out) >= number or job.poll() is not None, 240, log)
            assert job.poll() is None, log.read_text()

        wait_for_units(5)
        assert cluster.kill(WORKERS[0]) >= 3
        wait_for_units(num_committed(out) + 5)
        store.outage()
        cluster.start_worker(REPLACEMENT)
        code = job.wait(BOUNDED_S)
    assert code == ExitCode.DONE, log.read_text()
    assert f"{NUM_IMAGES:,} rows: {NUM_IMAGES - NUM_BROKEN:,} predictions, {NUM_BROKEN} errors" in log.read_text()

    assert run(["verify", out]) == ExitCode.DONE
    counts = counts_by_duckdb(out)
    assert sum(counts.values()) == NUM_IMAGES - NUM_BROKEN
    assert counts_by_spark(out, tmp_path) in (None, counts)


def upload_images(folder: str) -> None:
    """Small JPEGs of noise, in folders of their colour; every hundredth is cut short."""
    rng = np.random.default_rng(0)
    noise_BHWC = rng.normal(80, 40, (16, 48, 48, 3))

    def upload(index: int) -> None:
        pixels = noise_BHWC[index % 16].copy()
        pixels[..., index % 3] += 30 + index % 90
        content = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(content, "jpeg")
        whole = content.getvalue()
        cut = whole[: len(whole) // 2] if index % (NUM_IMAGES // NUM_BROKEN) == 7 else whole
        storage.replace(storage.join(folder, TINY_CLASSES[index % 3], f"{index:05d}.jpg"), cut)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(upload, range(NUM_IMAGES)))


@contextlib.contextmanager
def submitted(folder: Path, model: str, manifest: str, out: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """``imgbatch submit --wait`` from an empty directory, and what it prints."""
    (folder / "laptop").mkdir()
    settings = {
        "classify.unit_rows": UNIT_ROWS,
        "resources.device": "cpu",
        "resources.decode_actors": 2,
        "resources.classify_actors": 2,
        "fetch.retries": 8,  # which lasts for longer than the server is away
        "run.no_progress_s": 240,
        "output.partition_by": "[target]",
    }
    command = [
        *(BIN / "imgbatch", "submit", "--wait", "--", "classify", "-m", model, "--manifest", manifest, "-o", out),
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    ]
    log = folder / "submit.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder / "laptop", stdout=output, stderr=output)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def num_committed(out: str) -> int:
    return sum("/units/unit-" in info.uri for info in storage.iter_files(storage.join(out, "runs")))


def counts_by_duckdb(out: str) -> dict[str, int]:
    """Predictions by target, a partition column."""
    fs, _ = storage.filesystem(out)
    with duckdb.connect() as connection:
        connection.register_filesystem(fs)
        rows = connection.sql(
            f"select target, count(distinct row_id) from read_parquet('{out}/predictions/**/*.parquet', "
            "hive_partitioning = true) group by target"
        ).fetchall()
    return dict(rows)


def counts_by_spark(out: str, folder: Path) -> dict[str, int] | None:
    """The same through the generated program; none, with a warning, where there is no Spark. It reads a copy: Spark's
    own client of S3 is no part of PySpark."""
    if importlib.util.find_spec("pyspark") is None or shutil.which("java") is None:
        warnings.warn("Spark did not read the output: PySpark (extra spark) or Java is not installed", stacklevel=2)
        return None
    prefix = storage.listing_prefix(out)
    for info in storage.list_files(storage.join(out, "predictions")):
        path = folder / "copy" / info.uri.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(storage.read_bytes(info.uri))
    generated = storage.read_bytes(RunPaths(out, find_run(out).run_id).spark_py).decode()
    there = out.replace("s3://", "s3a://")
    assert there in generated
    count = "for row in spark.sql('select target, count(distinct row_id) n from predictions group by 1').collect():"
    program = folder / "spark.py"
    program.write_text(
        f"{generated.replace(there, str(folder / 'copy'))}{count}\n    print('COUNT', row.target, row.n)\n"
    )
    environment = os.environ | {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line.split() for line in done.stdout.splitlines() if line.startswith("COUNT "))
    return {target: int(count) for _, target, count in lines}


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def answers(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def wait_until(holds: Callable[[], bool], timeout_s: float, log: Path | None = None) -> None:
    give_up = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up, log and log.read_text()
        time.sleep(0.2)
