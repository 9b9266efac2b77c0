"""A Ray to work on: the cluster that is named, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from imgbatch.config import Config, ResourcesConfig
from imgbatch.core.machine import ONE_ARENA, Gpu, cuda_of_torch, gpu_of_type, memory_bytes, why_torch_lacks
from imgbatch.core.units import MAX_UNIT_PIXEL_BYTES
from imgbatch.errors import UsageError
from imgbatch.runtime.own_ray import NO_TASK_EVENTS, without_idle_processes
from imgbatch.runtime.pools import Machine, Pools, this_machine

_BLOCKS_PER_ACTOR = 4
"""Decoded blocks that the object store has room for, per unit at work: one worked on, two queued, one on its way."""
_ACCELERATOR = "accelerator_type:"
"""How Ray's resources begin that say of what type a node's GPUs are."""
_MIN_STORE_BYTES = 512 * 2**20
_our_own = threading.Event()
"""Set while this process has a Ray of our own."""


def cluster_address(config: Config) -> str | None:
    """The cluster to connect to; none: a Ray of our own."""
    return config.ray.cluster_address


@contextmanager
def ray_session(
    config: Config, pools: Pools | None = None, meanwhile: Callable[[], object] = lambda: None
) -> Iterator[bool]:
    """Ray is connected inside the block, which is told whether it is one of our own.

    One that was connected before stays so afterwards, whoever connected it.

    Args:
        pools: sizes the object store of a Ray of our own.
        meanwhile: done in a thread while Ray starts, which is seconds of waiting; what it raises is raised here.
    """
    if ray.is_initialized():
        meanwhile()
        yield _our_own.is_set()
        return
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="meanwhile") as thread:
            done = thread.submit(meanwhile)
            # Not the other way round: Ray's processes end with the thread that started them.
            with _kept_sigterm():
                _start(config, pools)
            done.result()
    except BaseException:
        ray.shutdown()
        raise
    if cluster_address(config) is None:
        _our_own.set()
    try:
        yield _our_own.is_set()
    finally:
        ray.shutdown()
        _our_own.clear()


@contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Ray puts a handler of its own in place, which ends the process with the signal's number as its exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(config: Config, pools: Pools | None) -> None:
    address = cluster_address(config)
    try:
        with _quiet_start():
            if address is not None:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                machine = this_machine()
                with without_idle_processes(), _in_environment(ONE_ARENA):
                    ray.init(
                        address="local",
                        num_cpus=machine.num_cpus,
                        # Ray counts whole GPUs, of which several MIG instances may be one.
                        num_gpus=machine.num_gpus,
                        object_store_memory=_store_bytes(config, pools),
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _system_config=NO_TASK_EVENTS,
                    )
    except ConnectionError as error:
        raise UsageError(f"ray.address: no cluster answers at {address} ({error})") from error


@contextmanager
def _in_environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """What is not in the environment yet, for processes that start within the block."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Ray's core writes past Python to standard error that it has read its log level; failures are exceptions."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def cluster_machine(resources: ResourcesConfig) -> Machine:
    """As :func:`machine_of_nodes`, of the connected cluster."""
    return machine_of_nodes(_working_nodes(), resources)


def machine_of_nodes(nodes: Iterable[Mapping[str, Any]], resources: ResourcesConfig) -> Machine:
    """CPUs and GPUs of the nodes that the actors may use.

    Args:
        nodes: as ``ray.nodes`` describes them.
    """
    nodes = list(nodes)
    decoding = _selected(nodes, resources.decode_labels)
    classifying = _selected(nodes, resources.classify_labels)
    unfit = why_torch_lacks(gpus_of_nodes(nodes, resources.classify_labels), None, cuda_of_torch())
    return Machine(
        int(sum(each.get("CPU", 0) for each in decoding)),
        int(sum(each.get("GPU", 0) for each in classifying)),
        node_cpus=min((int(each["CPU"]) for each in decoding + classifying if each.get("CPU", 0) >= 1), default=0),
        model_cpus=int(sum(each.get("CPU", 0) for each in classifying)),
        unfit_gpus=unfit,
    )


def _selected(nodes: Iterable[Mapping[str, Any]], selector: Mapping[str, str]) -> list[Mapping[str, float]]:
    """Resources of the nodes with these labels."""
    return [node["Resources"] for node in nodes if is_selected(node["Labels"], selector)]


def cluster_gpus(selector: Mapping[str, str]) -> tuple[Gpu, ...]:
    """As :func:`gpus_of_nodes`, of the connected cluster."""
    return gpus_of_nodes(_working_nodes(), selector)


def gpus_of_nodes(nodes: Iterable[Mapping[str, Any]], selector: Mapping[str, str]) -> tuple[Gpu, ...]:
    """One GPU of each type that the nodes have, as far as Ray knows the types.

    Args:
        nodes: as ``ray.nodes`` describes them.
        selector: labels that a node must have, as ``resources.classify_labels``.
    """
    types = {
        name.removeprefix(_ACCELERATOR)
        for node in nodes
        if node["Resources"].get("GPU") and is_selected(node["Labels"], selector)
        for name in node["Resources"]
        if name.startswith(_ACCELERATOR)
    }
    return tuple(gpu_of_type(name) for name in sorted(types))


def is_selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that Ray's label selector means: ``a``, ``!a``, ``in(a, b)``,
    ``!in(a, b)``."""
    return all(_agrees(labels.get(name), wanted) for name, wanted in selector.items())


def _agrees(value: str | None, wanted: str) -> bool:
    text = wanted.removeprefix("!")
    several = re.fullmatch(r"(?:in)?\((.*)\)", text)
    allowed = [each.strip() for each in several[1].split(",")] if several else [text]
    return (value in allowed) != wanted.startswith("!")


def cluster_zones() -> tuple[list[str], list[str]]:
    """Availability zones of the nodes without and with GPUs, as their labels say; nodes without work are left out."""
    zones: tuple[set[str], set[str]] = (set(), set())
    for node in _working_nodes():
        if zone := node["Labels"].get("ray.io/availability-zone"):
            zones["GPU" in node["Resources"]].add(zone)
    return sorted(zones[0]), sorted(zones[1])


def cluster_regions() -> list[str]:
    """Regions of the nodes that work, as their labels say."""
    return sorted({node["Labels"].get("ray.io/availability-region", "") for node in _working_nodes()} - {""})


def _working_nodes() -> list[dict[str, Any]]:
    def works(node: dict[str, Any]) -> bool:
        return node["Alive"] and bool(node["Resources"].get("CPU") or node["Resources"].get("GPU"))

    return [node for node in ray.nodes() if works(node)]


def _store_bytes(config: Config, pools: Pools | None) -> int | None:
    if config.ray.object_store_mb is not None:
        return config.ray.object_store_mb * 10**6
    if pools is None:
        return None
    wanted = (pools.decoders + pools.classifiers) * _BLOCKS_PER_ACTOR * MAX_UNIT_PIXEL_BYTES
    return max(_MIN_STORE_BYTES, min(wanted, int(0.3 * memory_bytes())))
