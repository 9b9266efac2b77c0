"""Ray Data tuned for cores: an actor for each, which decodes and labels, uint8 until the batch, channels_last."""

from __future__ import annotations

from typing import Any

import ray
from ray.data import ActorPoolStrategy

from jobs.bench.peers.ray_data import start
from jobs.bench.peers.task import BATCH_SIZE, Stopwatch, Task, TunedModel, open_all_rgb, parse_task, tuned_transform


class Label:
    def __init__(self, task: Task) -> None:
        self._model, self._transform = TunedModel(task, num_threads=1), tuned_transform(task.sizes())

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        uris = batch["uri"].tolist()
        images_BCHW = torch.stack([self._transform(image) for image in open_all_rgb(uris)])
        return {"uri": uris, "label": self._model(images_BCHW)}


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    # One more than there are: actors on every core would leave none to read and to write.
    start(task, num_cpus=task.cores + 1)
    watch.start()
    (
        ray.data.read_parquet(task.manifest)
        .select_columns(["uri"])
        .limit(task.limit)
        # A block goes to one actor, and the manifest would be one block.
        .repartition(-(-task.limit // BATCH_SIZE))
        .map_batches(
            Label,
            fn_constructor_args=(task,),
            batch_size=BATCH_SIZE,
            compute=ActorPoolStrategy(size=task.cores),
            num_cpus=1,
        )
        .write_parquet(task.out)
    )
    watch.stop()


if __name__ == "__main__":
    main()
