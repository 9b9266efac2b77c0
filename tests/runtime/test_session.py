"""What a Ray of our own is made of, and what a cluster's labels say, on real nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imgbatch.config import Config

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("imgbatch"))
STORE_BYTES = 100 * 10**6


IN_A_RAY_OF_OUR_OWN = """
import json, psutil, ray, time
from imgbatch.config import Config
from imgbatch.runtime.session import ray_session

with ray_session(Config()):
    sum_of_two = ray.get(ray.remote(lambda: 1 + 2).remote())
    commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    time.sleep(3)  # a process would report what it did within one
    events = ray.timeline()
print(json.dumps([sum_of_two, commands, events]))
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without work, a CPU node and a GPU node (which has none), each with a zone of its own."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes = [
        {"num_cpus": 0, "labels": labels("eu-central-1c")},
        {"num_cpus": 2, "labels": labels("eu-central-1a")},
        {"num_cpus": 1, "num_gpus": 1, "labels": labels("eu-central-1b")},
    ]
    for number, node in enumerate(nodes, start=2):
        node |= {"node_ip_address": f"127.0.0.{number}", "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=nodes[0] | {"include_dashboard": False})
    for node in nodes[1:]:
        cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def labels(zone: str) -> dict[str, str]:
    return {"ray.io/availability-zone": zone, "ray.io/availability-region": zone[:-1]}


@pytest.mark.soak
def test_plan_warns_of_zones_and_regions_that_differ(photo_config: Config, s3_bucket: str, cluster: Any) -> None:
    command = [COMMAND, "plan", "--manifest", str(photo_config.input.manifest), "-m", str(photo_config.model.path)]
    command += ["-o", f"{s3_bucket}/out", "--set", f"ray.address={cluster.address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "CPU nodes stand in eu-central-1a and GPU nodes in eu-central-1b" in told
    assert f"{s3_bucket} in region us-east-1, and the work in eu-central-1: " in told
    assert "1 classify actors (GPU each)" in " ".join(done.stdout.split())


def test_a_ray_of_our_own_works_without_what_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code = [sys.executable, "-c", IN_A_RAY_OF_OUR_OWN]
    done = subprocess.run(code, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    sum_of_two, commands, events = json.loads(done.stdout)
    assert sum_of_two == 3
    assert any("raylet" in command for command in commands)
    idle = ("monitor.py", "dashboard.py")
    assert [command for command in commands if any(name in command for name in idle)] == []
    assert events == []
