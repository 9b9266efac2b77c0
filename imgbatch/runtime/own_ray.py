"""A Ray of our own, on one machine for one job, without the processes that only a cluster needs.

Ray has no parameters for any of it; where a version of Ray has other names for these, it starts what it always does.
"""

from __future__ import annotations

import importlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import ray

NO_TASK_EVENTS = {"task_events_report_interval_ms": 0}
"""Of Ray's core. What became of each task is for its dashboard and its state API: 7 KB a unit in gcs_server."""
_IDLE_PROCESSES = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's ``Node``."""


@contextmanager
def without_idle_processes() -> Iterator[None]:
    """Within the block Ray starts without what nobody asks: 200 MB, 4 s of CPU, and some polling.

    The monitor of an autoscaler that has nothing to scale, one that follows log files which nobody is shown, and the
    dashboard's process, which without a dashboard only counts Ray's usage.
    """
    node = ray._private.node.Node
    with _replaced({(node, name): _nothing for name in _IDLE_PROCESSES}):
        yield


@contextmanager
def without_data_actors() -> Iterator[None]:
    """Within the block Ray Data does without three actors of its own: 340 MB, 8 s of CPU, and a tenth of a core.

    One asks the autoscaler for nodes, one follows actors from node to node, and one keeps statistics for a dashboard.
    """
    rate_based = _data_module("cluster_autoscaler.rate_based_cluster_autoscaler")
    actor_pools = _data_module("execution.operators.actor_pool_map_operator")
    stats, here = _data_module("stats"), _Called(Statistics())
    replacements: dict[tuple[Any, str], Any] = {
        (rate_based, "DefaultAutoscalingCoordinator"): WholeMachine,
        (actor_pools, "get_or_create_actor_location_tracker"): NoTracker,
        (actor_pools, "get_actor_locations"): lambda _: {},  # then it takes where each was started
        (stats, "get_or_create_stats_actor"): lambda: here,
    }
    with _replaced(replacements):
        yield


def _data_module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"ray.data._internal.{name}")
    except ImportError:
        return None


@contextmanager
def _replaced(replacements: Mapping[tuple[Any, str], Any]) -> Iterator[None]:
    kept = {(owner, name): getattr(owner, name) for owner, name in replacements if hasattr(owner, name)}
    for owner, name in kept:
        setattr(owner, name, replacements[owner, name])
    try:
        yield
    finally:
        for (owner, name), original in kept.items():
            setattr(owner, name, original)


def _nothing(*_: object, **__: object) -> None:
    pass


class WholeMachine:
    """Ray Data's ``AutoscalingCoordinator`` of a machine that is all there will be."""

    def __init__(self, *_: object, **__: object) -> None:
        self._resources = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def request_resources(self, *_: object, **__: object) -> None:
        """No more can be had."""

    def cancel_request(self) -> None:
        """Nothing was asked for."""

    def get_reserved_resources(self) -> dict[str, dict[str, float]]:
        """By node."""
        return self._resources


class NoTracker:
    """Ray Data's ``ActorLocationTracker`` where there is one place to be; goes to every actor."""

    def __init__(self) -> None:
        self.update_actor_location = _Remote(_nothing)


class Statistics:
    """What Ray Data's ``_StatsActor`` knows of the progress of a pass."""

    def __init__(self) -> None:
        self._datasets: dict[str, dict[str, Any]] = {}

    def gen_dataset_id(self) -> str:
        return uuid.uuid4().hex

    def register_dataset(self, job_id: str, dataset_tag: str, operator_tags: Sequence[str], *_: object) -> None:
        operators = {tag: {"name": tag, "progress": 0} for tag in operator_tags}
        self._datasets[dataset_tag] = {"job_id": job_id, "start_time": time.time(), "operators": operators}

    def update_execution_metrics(
        self, dataset_tag: str, _metrics: object, _tags: object, state: Mapping[str, Any], *_: object
    ) -> None:
        self._datasets[dataset_tag].update(state)

    def update_iteration_metrics(self, *_: object) -> None:
        """For a dashboard alone."""

    def get_datasets(self, job_id: str) -> dict[str, dict[str, Any]]:
        return {tag: dataset for tag, dataset in self._datasets.items() if dataset["job_id"] == job_id}


class _Called:
    """An object whose methods are called like those of an actor."""

    def __init__(self, target: object) -> None:
        self._target = target

    def __getattr__(self, name: str) -> _Remote:
        return _Remote(getattr(self._target, name))


class _Remote:
    """A function that is called like an actor's method, here and at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *args: Any, **kwargs: Any) -> ray.ObjectRef:
        return ray.put(self._function(*args, **kwargs))
