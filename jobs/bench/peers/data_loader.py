"""A tuned loop over torch's DataLoader: uint8 until the batch, channels_last, workers and threads by trial.

The trial is before the clock; loading the model and starting the workers, for which nothing is up before, after it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from jobs.bench.peers.task import BATCH_SIZE, Stopwatch, Task, TunedModel, open_all_rgb, parse_task, tuned_transform

_TRIAL_IMAGES = 300


class Images(Dataset[Any]):
    def __init__(self, uris: list[str], sizes: tuple[int, int]) -> None:
        self._uris, self._transform = uris, tuned_transform(sizes)

    def __len__(self) -> int:
        return len(self._uris)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """A batch at once, which is what DataLoader asks for where it can."""
        return [self._transform(image) for image in open_all_rgb([self._uris[index] for index in indices])]


def label(task: Task, uris: list[str], num_workers: int, num_threads: int) -> list[str]:
    model = TunedModel(task, num_threads=num_threads)
    loader = DataLoader(Images(uris, task.sizes()), batch_size=BATCH_SIZE, num_workers=num_workers)
    return [name for images in loader for name in model(images)]


def best_setting(task: Task) -> tuple[int, int]:
    """Loader processes and threads, tried once and kept beside the outputs for the next rounds."""
    kept = Path(task.out).with_name("setting.json")
    if not kept.exists():
        rates = {}
        for workers in range(task.cores + 1):
            for threads in range(1, task.cores + 1):
                started = time.perf_counter()
                label(task, task.uris()[:_TRIAL_IMAGES], workers, threads)
                rates[workers, threads] = time.perf_counter() - started
        kept.write_text(json.dumps(min(rates, key=lambda setting: rates[setting])))
    workers, threads = json.loads(kept.read_text())
    print(f"{workers} loader processes, {threads} threads")
    return workers, threads


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    setting = best_setting(task)
    uris = task.uris()
    watch.start()
    task.write(uris, label(task, uris, *setting))
    watch.stop()


if __name__ == "__main__":
    main()
