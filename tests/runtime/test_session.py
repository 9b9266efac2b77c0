"""What a Ray of our own is made of, and what a cluster's labels say, on real nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from imgbatch.config import Config, ResourcesConfig
from imgbatch.core import machine
from imgbatch.core.machine import Gpu, num_cpus
from imgbatch.errors import UsageError
from imgbatch.runtime import session
from imgbatch.runtime.job import Hardware, hardware
from imgbatch.runtime.pools import Machine
from imgbatch.runtime.session import gpus_of_nodes, is_selected, machine_of_nodes, ray_session
from tests.conftest import changed
from tests.core.cuda_driver import CudaDriver

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("imgbatch"))
STORE_BYTES = 100 * 10**6


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


TERMINATED_MEANWHILE = """
import os, signal, time
import ray
from imgbatch.config import Config
from imgbatch.runtime.interrupts import stop_on_signals
from imgbatch.runtime.session import ray_session

def meanwhile():
    until = time.monotonic() + 60
    while time.monotonic() < until and not (ray.is_initialized() and signal.getsignal(signal.SIGTERM) is ours):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1)

with stop_on_signals():
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with ray_session(Config(), meanwhile=meanwhile):
            print("started")
    except KeyboardInterrupt as error:
        print("interrupted by", error, ray.is_initialized())
"""


def test_sigterm_while_the_sample_is_looked_at_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = [sys.executable, "-c", TERMINATED_MEANWHILE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted by SIGTERM False\n"), done.stderr


@pytest.mark.usefixtures("ray_local")
def test_a_ray_that_was_there_before_is_not_our_own() -> None:
    with ray_session(Config()) as is_our_own:
        assert not is_our_own
    assert ray.is_initialized()


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("backend", ["auto", "torch_bf16"])
def test_a_cluster_is_asked_for_its_gpus_where_a_choice_hangs_on_them(photo_config: Config, backend: str) -> None:
    """It has none yet, of which the machine that plans must not take its own for them."""
    config = changed(photo_config, classify__engine="ray", ray__address="auto", classify__backend=backend)
    with hardware(changed(config, resources__device="cuda")) as there:
        assert there == Hardware("cuda", () if backend == "auto" else None)
    with hardware(config) as there:
        assert there == Hardware("cpu", None)


def test_a_device_that_is_named_for_a_cluster_is_not_held_against_this_machine(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgbatch.runtime.job.this_machine", lambda: Machine(2, 1, unfit_gpus="torch is for CUDA 13"))
    config = changed(photo_config, classify__engine="ray", classify__backend="torch", resources__device="cuda")
    with hardware(changed(config, ray__address="127.0.0.1:1")) as there:
        assert there == Hardware("cuda", None)
    with pytest.raises(UsageError, match=r"^resources\.device cuda: torch"), hardware(config):
        pass


@pytest.mark.parametrize(
    ("visible", "driver", "num_gpus"),
    [
        ("MIG-a,MIG-b,MIG-c", CudaDriver([(b"NVIDIA A100 MIG 1g.5gb", 8, 0)]), 3),
        ("0", CudaDriver([], starts=False), 0),
    ],
)
def test_a_ray_of_our_own_has_the_gpus_that_cuda_counts(
    monkeypatch: pytest.MonkeyPatch, visible: str, driver: CudaDriver, num_gpus: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(machine, "_load_driver", lambda: driver)
    told: dict[str, Any] = {}
    monkeypatch.setattr(ray, "init", lambda **given: told.update(given))
    session._start(Config(), None)
    assert (told["address"], told["num_cpus"], told["num_gpus"]) == ("local", num_cpus(), num_gpus)


def test_each_pool_has_the_nodes_that_its_labels_select(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "cuda_of_torch", lambda: 13)
    nodes = [
        {"Resources": {"CPU": 4.0, "GPU": 1.0, "accelerator_type:T4": 1.0}, "Labels": {"role": "classify"}},
        {"Resources": {"CPU": 4.0, "GPU": 1.0, "accelerator_type:T4": 1.0}, "Labels": {"role": "classify"}},
        {"Resources": {"CPU": 96.0, "GPU": 8.0, "accelerator_type:V100": 1.0}, "Labels": {"role": "train"}},
        {"Resources": {"CPU": 16.0}, "Labels": {"role": "decode"}},
        {"Resources": {"GPU": 1.0}, "Labels": {}},
    ]
    resources = ResourcesConfig(decode_labels={"role": "decode"}, classify_labels={"role": "classify"})
    assert machine_of_nodes(nodes, resources) == Machine(16, 2, node_cpus=4, model_cpus=8)
    whole = machine_of_nodes(nodes, ResourcesConfig())
    assert (whole.num_cpus, whole.num_gpus, whole.node_cpus, whole.model_cpus) == (120, 11, 4, 120)
    assert "which V100 is below" in whole.unfit_gpus
    assert machine_of_nodes([], ResourcesConfig()) == Machine(0, 0, model_cpus=0)


def test_the_gpus_of_nodes_are_those_of_types_that_ray_knows() -> None:
    nodes = [
        {"Resources": {"CPU": 8.0, "node:10.0.0.1": 1.0}, "Labels": {}},
        {"Resources": {"GPU": 1.0, "accelerator_type:V100": 1.0}, "Labels": {"pool": "old"}},
        {"Resources": {"GPU": 4.0, "accelerator_type:A100": 1.0}, "Labels": {"pool": "new"}},
        {"Resources": {"GPU": 4.0, "accelerator_type:A100": 1.0}, "Labels": {"pool": "new"}},
        {"Resources": {"GPU": 1.0}, "Labels": {"pool": "unknown"}},
    ]
    assert gpus_of_nodes(nodes, {}) == (Gpu("A100", None), Gpu("V100", (7, 0)))
    assert gpus_of_nodes(nodes, {"pool": "new"}) == (Gpu("A100", None),)
    assert gpus_of_nodes(nodes[:1], {}) == ()


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ({}, True),
        ({"zone": "india"}, True),
        ({"zone": "in"}, False),
        ({"zone": "!india"}, False),
        ({"zone": "!in"}, True),
        ({"zone": "in(a, india)"}, True),
        ({"zone": "!in(a,b)"}, True),
        ({"zone": "!in(a,india)"}, False),
        ({"zone": "india", "spot": "yes"}, False),
        ({"zone": "india", "spot": "!yes"}, True),
    ],
)
def test_labels_are_matched_as_ray_matches_them(selector: dict[str, str], meant: bool) -> None:
    assert is_selected({"zone": "india"}, selector) == meant
