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
"""At least; with many loader processes two batches for each."""


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


def settings_to_try(cores: int) -> list[tuple[int, int]]:
    """Loader processes and threads of the model: cores shared out, or as many threads as there are cores."""
    workers = {0, 1, cores // 4, cores // 2, cores - 1, cores}
    return sorted({(each, threads) for each in workers for threads in (max(1, cores - each), cores)})


def best_setting(task: Task) -> tuple[int, int]:
    """Loader processes and threads, tried once and kept beside the outputs for the next rounds."""
    kept = Path(task.out).with_name("setting.json")
    if not kept.exists():
        rates = {}
        for workers, threads in settings_to_try(task.cores):
            uris = task.uris()[: max(_TRIAL_IMAGES, 2 * workers * BATCH_SIZE)]
            started = time.perf_counter()
            label(task, uris, workers, threads)
            rates[workers, threads] = len(uris) / (time.perf_counter() - started)
        kept.write_text(json.dumps(max(rates, key=lambda setting: rates[setting])))
    workers, threads = json.loads(kept.read_text())
    print(f"{workers} loader processes, {threads} threads")
    return workers, threads


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    began = time.perf_counter()
    setting = best_setting(task)
    trial_seconds = time.perf_counter() - began
    uris = task.uris()
    watch.start(left_out=trial_seconds)
    task.write(uris, label(task, uris, *setting))
    watch.stop()


if __name__ == "__main__":
    main()
