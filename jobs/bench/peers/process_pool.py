"""A process for each core by hand, each with decoding and a model of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from typing import Any

from jobs.bench.peers.task import (
    NUM_EMPTY_TASKS,
    Stopwatch,
    Task,
    TunedModel,
    batched,
    open_all_rgb,
    parse_task,
    tuned_transform,
)

_model: Any = None
_transform: Any = None


def prepare(task: Task) -> None:
    global _model, _transform
    _model, _transform = TunedModel(task, num_threads=1), tuned_transform(task.sizes())


def label(uris: Sequence[str]) -> list[str]:
    import torch

    return _model(torch.stack([_transform(image) for image in open_all_rgb(uris)])) if uris else []


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    with multiprocessing.get_context("spawn").Pool(task.cores, prepare, (task,)) as pool:
        pool.map(label, [[]] * NUM_EMPTY_TASKS, chunksize=1)
        uris = task.uris()
        watch.start()
        labels = [name for names in pool.imap(label, batched(uris)) for name in names]
        task.write(uris, labels)
    watch.stop()


if __name__ == "__main__":
    main()
