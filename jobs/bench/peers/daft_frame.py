"""Daft as its documentation shows it: download and decode as expressions, a class with the model."""

from __future__ import annotations

from typing import Any

import daft
from daft import DataType, col

from jobs.bench.peers.task import BATCH_SIZE, NUM_EMPTY_TASKS, Stopwatch, Task, parse_task, published_transform


def transform_of(sizes: tuple[int, int]) -> Any:
    """The transform as an expression over images."""
    side = sizes[1]

    @daft.func(return_dtype=DataType.tensor(DataType.float32(), (3, side, side)))
    def transform(image: Any) -> Any:
        return published_transform(sizes)(image).numpy()

    return transform


@daft.func(return_dtype=DataType.int64())
def nothing(number: int) -> int:
    return number


@daft.cls(max_concurrency=1)
class Classify:
    def __init__(self, task: Task) -> None:
        self._names, self._network = task.class_names(), task.network()

    @daft.method.batch(return_dtype=DataType.string(), batch_size=BATCH_SIZE)
    def label(self, pixels: daft.Series) -> list[str]:
        import numpy as np
        import torch

        with torch.inference_mode():
            indices = self._network(torch.from_numpy(np.stack(pixels.to_pylist()))).argmax(dim=1).tolist()
        return [self._names[index] for index in indices]


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    daft.set_runner_native()
    daft.from_pydict({"number": list(range(NUM_EMPTY_TASKS))}).select(nothing(col("number"))).collect()
    model, transform = Classify(task), transform_of(task.sizes())
    watch.start()
    (
        daft.read_parquet(task.manifest)
        .select("uri")
        .limit(task.limit)
        .with_column("image", col("uri").download().decode_image(mode="RGB"))
        .with_column("pixels", transform(col("image")))
        .with_column("label", model.label(col("pixels")))
        .select("uri", "label")
        .write_parquet(task.out)
    )
    watch.stop()


if __name__ == "__main__":
    main()
