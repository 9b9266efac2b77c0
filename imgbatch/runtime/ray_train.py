"""Training on Ray: Ray Train runs the workers and starts them again when one dies; ``crop_pool`` decodes before.

job --> TorchTrainer: workers that map the crops, each from the last checkpoint on --> outcome.json
"""

from __future__ import annotations

import os
import threading
import uuid
from typing import Any

import ray
import ray.train
import ray.train.torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.machine import num_cpus
from imgbatch.core.training.checkpoint import read_epochs
from imgbatch.core.training.crops import CropStore, OnPart
from imgbatch.core.training.job import TrainingJob, load_job
from imgbatch.errors import ImgbatchError, normalise_message
from imgbatch.runtime.crop_pool import decode_on_ray
from imgbatch.runtime.train import OnEpoch

_POLL_S = 0.5
_START_TIMEOUT_S = 600
"""Seconds that workers may take to start: Ray's own minute is too short for a busy machine or one that is cold."""
_WAIT_TIMEOUT_S = 4 * 3600
"""Seconds that workers may wait for each other: the first one alone fits the head, for longer than Ray's half hour if
there are many features."""
_MAX_LOADER_PROCESSES = 8


class RayTrainEngine:
    """Decodes and trains on the connected Ray."""

    def decode(self, store: CropStore, config: Config, on_part: OnPart) -> None:
        decode_on_ray(store, config, on_part)

    def run(self, job: TrainingJob, on_epoch: OnEpoch) -> None:
        """Raises :class:`ImgbatchError` in one line when the workers fail for good."""
        if storage.exists(job.paths.failure):  # of a command that ended before it could tell
            storage.remove(job.paths.failure)
        trainer = _build_trainer(job)
        shown = len(read_epochs(job.paths))  # those of a command before this one
        outcome: list[BaseException] = []
        # Ray Train's callbacks run in an actor of its own; what a person sees comes from epochs.jsonl instead.
        fitting = threading.Thread(target=_fit, args=(trainer, outcome), daemon=True)
        fitting.start()
        while True:
            fitting.join(_POLL_S)
            finished = not fitting.is_alive()
            records = read_epochs(job.paths)
            for record in records[shown:]:
                on_epoch(record)
            shown = len(records)
            if finished:
                break
        if storage.exists(job.paths.failure):
            message = storage.read_json(job.paths.failure)["message"]
            storage.remove(job.paths.failure)
            raise ImgbatchError(message)
        if outcome:
            raise ImgbatchError(f"training: {_cause(outcome[0])}; the same command continues from the last epoch")


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker of Ray Train runs, from the beginning or after a restart."""
    import torch

    # cuBLAS is deterministic only with a workspace of fixed size, to be chosen before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from imgbatch.core.training.loop import run_training
    from imgbatch.core.training.workers import Worker

    storage.configure(settings["storage"])
    job = load_job(settings["directory"])
    if storage.exists(job.paths.failure):
        return
    device, cores = ray.train.torch.get_device(), _node_cores()
    local_workers = ray.train.get_context().get_local_world_size()
    num_threads, loader_processes = share_of_cores(cores, local_workers, use_gpu=device.type == "cuda")
    torch.set_num_threads(num_threads)
    worker = Worker.current(device, loader_processes=loader_processes, fit_threads=cores)
    try:
        run_training(job, worker, lambda record: ray.train.report({"epoch": record["epoch"]}))
    except ImgbatchError as error:
        # Trying again would not help: workers that start again find this file and leave.
        storage.write_json(job.paths.failure, {"message": str(error)})
        raise
    finally:
        # Workers that start again may do so on another machine, or not at all.
        job.remove_local_copies()


def _node_cores() -> int:
    """Of the worker's machine: no more than this process may use, nor than Ray was told of."""
    here = ray.get_runtime_context().get_node_id()
    of_ray = next((node["Resources"].get("CPU") for node in ray.nodes() if node["NodeID"] == here), None)
    return max(1, min(num_cpus(), int(of_ray or num_cpus())))


def share_of_cores(cores: int, local_workers: int, *, use_gpu: bool) -> tuple[int, int]:
    """Threads and loader processes of a worker whose machine has so many cores and workers."""
    mine = max(1, cores // local_workers)
    return (1, min(_MAX_LOADER_PROCESSES, mine - 1)) if use_gpu else (mine, 0)


def _build_trainer(job: TrainingJob) -> ray.train.torch.TorchTrainer:
    train, use_gpu = job.train, job.config.resources.device == "cuda"
    filesystem, path = storage.filesystem(job.paths.directory)
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"directory": job.paths.directory, "storage": job.config.storage},
        torch_config=ray.train.torch.TorchConfig(timeout_s=_WAIT_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=int(train.num_workers), use_gpu=use_gpu, resources_per_worker=_share(use_gpu)
        ),
        run_config=RunConfig(
            # A name that was used before would bring back that attempt's state; ours is in the job's own files.
            name=f"ray-{uuid.uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            # Workers that do not start are counted apart, and tried again for ever unless told otherwise.
            failure_config=FailureConfig(max_failures=train.max_failures, controller_failure_limit=train.max_failures),
        ),
    )


def _share(use_gpu: bool) -> dict[str, float]:
    """What a worker reserves; its threads take what cores there are."""
    return {"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1}


def _fit(trainer: ray.train.torch.TorchTrainer, outcome: list[BaseException]) -> None:
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    try:
        trainer.fit()
    except BaseException as error:
        outcome.append(error)


def _cause(error: BaseException) -> str:
    """The first worker's own error in one line, or Ray's."""
    startup = getattr(error, "controller_failure", None)
    if type(startup).__name__ == "WorkerGroupStartupTimeoutError":
        return "its workers found no place to start, each time; take fewer with train.num_workers, or start more nodes"
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    inner = getattr(first, "cause", None) or first
    lines = str(inner).strip().splitlines()
    return normalise_message(lines[-1] if lines else type(inner).__name__)
