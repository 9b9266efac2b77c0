from __future__ import annotations

from dataclasses import replace

import pytest

from imgbatch.config import ResourcesConfig
from imgbatch.core import machine
from imgbatch.core.machine import num_cpus
from imgbatch.errors import UsageError
from imgbatch.runtime.pools import (
    Machine,
    choose_batch_size,
    choose_device,
    choose_pools,
    device_remarks,
    this_machine,
)
from tests.core.cuda_driver import CudaDriver


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 96, 192])
def test_on_cpus_all_actors_fit_at_once_and_threads_add_up_to_the_cores(cores: int) -> None:
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(cores, 0))
    asked = pools.decode_actors * pools.decode_cpus + pools.classify_actors * pools.classify_cpus
    assert asked <= cores
    assert 0.75 * cores <= pools.classifiers * pools.classify_threads <= cores
    assert pools.decoders >= cores / 2
    for share in (pools.decode_cpus, pools.classify_cpus):
        assert share > 0
        assert share < 1 or share == int(share)  # what Ray accepts


@pytest.mark.parametrize(("cores", "gpus"), [(1, 1), (2, 1), (4, 1), (16, 1), (32, 4), (192, 8)])
def test_on_gpus_there_is_one_classify_actor_each_and_the_cpus_decode(cores: int, gpus: int) -> None:
    pools = choose_pools(ResourcesConfig(), "cuda", Machine(cores, gpus))
    assert (pools.classify_actors, pools.classify_streams, pools.classify_gpus) == (gpus, 2, 1.0)
    asked = pools.decode_actors * pools.decode_cpus + pools.classify_actors * pools.classify_cpus
    assert asked <= cores
    assert pools.decoders >= max(1, cores - gpus - 1)


def test_what_is_given_is_taken() -> None:
    config = ResourcesConfig(decode_actors=3, classify_actors=2, classify_threads=5)
    pools = choose_pools(config, "cpu", Machine(16, 0))
    assert (pools.decode_actors, pools.decode_processes) == (3, 1)
    assert (pools.classify_actors, pools.classify_streams, pools.classify_threads) == (2, 1, 5)
    config = ResourcesConfig(decode_processes=4, classify_streams=8, classify_threads=1)
    pools = choose_pools(config, "cpu", Machine(16, 0))
    assert (pools.decode_actors, pools.decode_processes) == (3, 4)
    assert (pools.classify_actors, pools.classify_streams) == (2, 8)
    assert choose_pools(ResourcesConfig(classify_streams=1), "cuda", Machine(16, 1)).classify_streams == 1


def test_no_actor_is_larger_than_the_smallest_node() -> None:
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(16, 0, node_cpus=1))
    assert (pools.decode_processes, pools.classify_streams) == (1, 1)
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(8, 0, node_cpus=2))
    assert (pools.decode_processes, pools.classify_streams) == (2, 2)
    assert max(pools.decode_cpus, pools.classify_cpus) <= 2
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(200, 0, node_cpus=2))
    assert (pools.classify_streams, pools.classify_threads) == (1, 2)


@pytest.mark.parametrize(("nodes", "each"), [(2, 2), (2, 8), (2, 16), (3, 4), (4, 2), (4, 64), (10, 16), (100, 8)])
def test_half_of_the_nodes_have_room_for_the_actors_of_the_others(nodes: int, each: int) -> None:
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(nodes * each, 0, node_cpus=each))
    left = [float(each)] * -(-nodes // 2)
    for share in [pools.classify_cpus] * pools.classify_actors + [pools.decode_cpus] * pools.decode_actors:
        node = max(range(len(left)), key=left.__getitem__)
        assert left[node] >= share
        left[node] -= share


def test_each_pool_is_sized_by_the_nodes_that_its_labels_leave_it() -> None:
    pools = choose_pools(ResourcesConfig(), "cpu", Machine(8, 0, node_cpus=2, model_cpus=32))
    assert pools == replace(
        choose_pools(ResourcesConfig(), "cpu", Machine(32, 0, node_cpus=2)),
        decode_actors=4,
        decode_processes=2,
        decode_cpus=pools.decode_cpus,
    )
    assert pools.decode_actors * pools.decode_cpus <= 8
    assert pools.classify_actors * pools.classify_cpus <= 32
    labelled = ResourcesConfig(classify_labels={"role": "clasify"})
    with pytest.raises(UsageError, match="there is no CPU yet on nodes with the labels asked for; on a cluster"):
        choose_pools(labelled, "cpu", Machine(8, 0, node_cpus=2, model_cpus=0))


def test_a_cluster_that_starts_from_zero_is_told_what_it_will_have() -> None:
    with pytest.raises(UsageError, match="no GPU yet"):
        choose_pools(ResourcesConfig(), "cuda", Machine(0, 0))
    with pytest.raises(UsageError, match="no CPU yet"):
        choose_pools(ResourcesConfig(decode_actors=4), "cpu", Machine(0, 0))
    given = ResourcesConfig(decode_actors=8, classify_actors=2)
    on_gpus = choose_pools(given, "cuda", Machine(0, 0))
    assert (on_gpus.decode_actors, on_gpus.classify_actors, on_gpus.decode_cpus) == (8, 2, 1.0)
    on_cpus = choose_pools(given, "cpu", Machine(0, 0))
    assert on_cpus.decode_cpus > 0
    assert on_cpus.classify_cpus > 0


def test_device_and_batch_size() -> None:
    assert choose_device(ResourcesConfig(), Machine(4, 0)) == "cpu"
    assert choose_device(ResourcesConfig(), Machine(4, 1)) == "cuda"
    assert choose_device(ResourcesConfig(device="cpu"), Machine(4, 1)) == "cpu"
    assert choose_batch_size(7, "cpu", 224) == 7
    assert [choose_batch_size("auto", "cpu", side) for side in (1024, 224, 160, 96, 64, 32)] == [8, 8, 8, 32, 64, 64]
    assert choose_batch_size("auto", "cpu", 64) < choose_batch_size("auto", "cuda", 64)


@pytest.mark.parametrize("visible", ["", "-1", "0", "0,2", "NoDevFiles", "MIG-a,MIG-b"])
def test_without_cudas_library_no_gpu_is_counted_whatever_is_listed(
    visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_load_driver", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine() == Machine(num_cpus(), 0)
    assert choose_device(ResourcesConfig(), this_machine()) == "cpu"


def test_gpus_are_counted_as_cuda_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by device files, which Windows' Linux lacks."""
    monkeypatch.setattr("imgbatch.runtime.pools.cuda_of_torch", lambda: 13)
    monkeypatch.setattr(machine, "_load_driver", lambda: CudaDriver([(b"NVIDIA L4", 8, 9)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine() == Machine(num_cpus(), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b,MIG-c")
    assert this_machine().num_gpus == 3


@pytest.mark.parametrize(
    ("gpu", "version", "torch", "why"),
    [
        ((b"Tesla V100-SXM2-16GB", 7, 0), 13000, 13, "compute capability 7.5, which Tesla V100-SXM2-16GB is below"),
        ((b"NVIDIA L4", 8, 9), 12080, 13, "install driver 580 or newer"),
        ((b"Tesla V100-SXM2-16GB", 7, 0), 12080, 12, None),
        ((b"NVIDIA L4", 8, 9), 13000, 13, None),
    ],
)
def test_a_gpu_that_torch_does_not_compute_on_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[bytes, int, int], version: int, torch: int, why: str | None
) -> None:
    monkeypatch.setattr(machine, "_load_driver", lambda: CudaDriver([gpu], version=version))
    monkeypatch.setattr("imgbatch.runtime.pools.cuda_of_torch", lambda: torch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here, automatic, cuda = this_machine(), ResourcesConfig(), ResourcesConfig(device="cuda")
    if why is None:
        assert [choose_device(config, here) for config in (automatic, cuda)] == ["cuda", "cuda"]
        assert device_remarks(automatic, here) == []
        return
    assert choose_device(automatic, here) == "cpu"
    assert device_remarks(cuda, here) == device_remarks(ResourcesConfig(device="cpu"), here) == []
    (remark,) = device_remarks(automatic, here)
    assert remark.startswith("resources.device auto: the CPU, as torch ")
    assert why in remark
    with pytest.raises(UsageError, match=f"^resources.device cuda: torch .*{why}"):
        choose_device(cuda, here)
    on_a_cluster = replace(here, node_cpus=4)
    assert choose_device(cuda, on_a_cluster) == "cuda", "its nodes may have another torch"
    assert choose_device(automatic, on_a_cluster) == "cpu"
