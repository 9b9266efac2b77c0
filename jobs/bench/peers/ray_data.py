"""Ray Data as its documentation shows it: map to tensors, then a pool of actors with the model."""

from __future__ import annotations

from typing import Any

import ray
from ray.data import ActorPoolStrategy

from jobs.bench.peers.task import (
    BATCH_SIZE,
    NUM_EMPTY_TASKS,
    Stopwatch,
    Task,
    decode_rgb,
    in_s3,
    open_rgb,
    parse_task,
    published_transform,
    read_objects,
)


def load(row: dict[str, Any], sizes: tuple[int, int]) -> dict[str, Any]:
    image = decode_rgb(row["bytes"]) if "bytes" in row else open_rgb(row["uri"])
    return {"uri": row["uri"], "pixels": published_transform(sizes)(image).numpy()}


DECODE_CPUS = 0.99
"""Of a decoding task. With 1, as the actor has, Ray Data would make one stage of the two, which decodes while the model
waits; in the published shape the actor's GPU keeps them apart."""


class Classify:
    def __init__(self, task: Task) -> None:
        self._names, self._network = task.class_names(), task.network()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            indices = self._network(torch.from_numpy(batch["pixels"])).argmax(dim=1).tolist()
        return {"uri": batch["uri"], "label": [self._names[index] for index in indices]}


def fetch(batch: dict[str, Any]) -> dict[str, Any]:
    """Side by side. Ray Data's own ``download`` holds a CPU for an actor of its own: of two, none is left for tasks."""
    return {"uri": batch["uri"], "bytes": read_objects(batch["uri"])}


@ray.remote
def nothing() -> None:
    """Makes a worker start."""


def start(task: Task, *, num_cpus: int) -> None:
    """A Ray of its own, whatever other there is on the machine, with its workers up."""
    ray.init(
        address="local",
        num_cpus=num_cpus,
        object_store_memory=task.object_store_mb * 10**6,
        include_dashboard=False,
    )
    ray.get([nothing.remote() for _ in range(NUM_EMPTY_TASKS)])


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    start(task, num_cpus=task.cores)
    watch.start()
    rows = ray.data.read_parquet(task.manifest).select_columns(["uri"]).limit(task.limit)
    if in_s3(task.uris()[0]):
        rows = rows.map_batches(fetch, batch_size=BATCH_SIZE)
    (
        rows.map(load, fn_args=(task.sizes(),), num_cpus=DECODE_CPUS)
        .map_batches(
            Classify,
            fn_constructor_args=(task,),
            batch_size=BATCH_SIZE,
            compute=ActorPoolStrategy(size=1),
            num_cpus=1,
        )
        .write_parquet(task.out)
    )
    watch.stop()


if __name__ == "__main__":
    main()
