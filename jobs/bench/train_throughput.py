"""Whether feeding is the limit of training: `imgbatch train` against a plain PyTorch loop over tensors in memory.

    python -m jobs.bench.train_throughput [--folder IMAGES] [--images 256] [--crop-size 96] [--repeats 3] [--engine ray]

Both train the same network on the same images with the same augmentation, batch size and number of threads; the plain
loop holds every decoded image in one tensor and needs no key for its random numbers. Runs alternate, so that a slow
minute of the machine meets both; medians and ranges are printed, on the clock and per second of CPU: what counts on a
machine that is shared. The ratio should be at least 0.9.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional

from imgbatch.config import Config, load_config
from imgbatch.core import storage
from imgbatch.core.architectures import build_network, head_module_name
from imgbatch.core.training.augment import build_augmentation
from imgbatch.core.training.checkpoint import read_epochs
from imgbatch.core.training.images import Normaliser
from imgbatch.core.training.job import TrainingJob, load_job
from imgbatch.core.training.labelled import TRAIN
from imgbatch.core.training.optimisation import build_optimizer, parameter_groups
from imgbatch.runtime.pools import this_machine
from imgbatch.runtime.train import train
from jobs.bench.common import describe_machine, find_photographs, spread

EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--crop-size", type=int, default=96)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--engine", choices=["ray", "local"], default="local")
    arguments = parser.parse_args()
    torch.set_num_threads(this_machine().num_cpus)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        photographs = find_photographs(arguments.folder, scratch)
        paths = list(itertools.islice(itertools.cycle(photographs), arguments.images))
        config = build_config(write_manifest(paths, scratch), scratch, arguments)
        ours, plain = [], []
        for repeat in range(arguments.repeats):
            job = run_ours(config, repeat, scratch)
            ours += rates_of(job)
            plain += run_plain(job)
    print(describe_machine())
    print(f"{arguments.arch}, {arguments.crop_size} px, batch {arguments.batch_size}, engine {arguments.engine}")
    for clock, unit in (("wall", "s"), ("cpu", "CPU-s")):
        ours_rates, plain_rates = ([getattr(rates, clock) for rates in epochs] for epochs in (ours, plain))
        print(
            f"images/{unit}: imgbatch train {spread(ours_rates)}, plain loop {spread(plain_rates)}, "
            f"ratio of the medians {statistics.median(ours_rates) / statistics.median(plain_rates):.3f}"
        )


@dataclass(frozen=True)
class Rates:
    """Images per second of one epoch."""

    wall: float
    cpu: float
    """Per second of CPU, summed over the threads."""


def write_manifest(paths: list[Path], scratch: Path) -> Path:
    """Two classes at random; the last tenth is for validation."""
    manifest = scratch / "manifest.parquet"
    first_validation = len(paths) - max(4, len(paths) // 10)
    table = {
        "uri": [str(path) for path in paths],
        "target": [f"class {index % 2}" for index in range(len(paths))],
        "split": [TRAIN if index < first_validation else "validation" for index in range(len(paths))],
    }
    pq.write_table(pa.table(table), manifest)
    return manifest


def build_config(manifest: Path, scratch: Path, arguments: argparse.Namespace) -> Config:
    return load_config(
        flags={
            "input.manifest": str(manifest),
            "classify.engine": arguments.engine,
            "resources.device": "cpu",
            "preprocess.crop_size": arguments.crop_size,
            "train.arch": arguments.arch,
            "train.epochs": EPOCHS,
            "train.batch_size": arguments.batch_size,
            "train.batch_norm": "frozen",
            "train.storage": str(scratch / "work"),
        }
    )


def run_ours(config: Config, repeat: int, scratch: Path) -> TrainingJob:
    """Another seed each time, so that it is another job."""
    out = scratch / f"model{repeat}"
    sections = {
        "train": config.train.model_copy(update={"seed": repeat}),
        "output": config.output.model_copy(update={"path": str(out)}),
    }
    result = train(config.model_copy(update=sections))
    return load_job(storage.join(str(scratch / "work"), f"t{result.bundle.provenance['fingerprint']}"))


def rates_of(job: TrainingJob) -> list[Rates]:
    """Of every epoch, without measuring and checkpoints."""
    num_images = len(job.splits[TRAIN]) // job.train.batch_size * job.train.batch_size
    trained = [record for record in read_epochs(job.paths) if record["images_per_s"]]
    return [Rates(record["images_per_s"], num_images / record["cpu_s"]) for record in trained]


def run_plain(job: TrainingJob) -> list[Rates]:
    """The loop that anyone would write."""
    pixels_NHWC = torch.from_numpy(job.store_of(TRAIN).open().take(job.positions[TRAIN]))
    targets_N = torch.from_numpy(job.splits[TRAIN].truth)
    augmentation = build_augmentation(job.config.augment, job.spec)
    normalise = Normaliser(job.spec, torch.device("cpu"))
    network = build_network(job.arch, len(job.class_names)).to(memory_format=torch.channels_last).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    optimizer = build_optimizer(parameter_groups(network, head_module_name(job.arch), job.train), job.train)
    rates = []
    for _ in range(EPOCHS):
        started, cpu_started, seen = time.perf_counter(), time.process_time(), 0
        for indices in torch.randperm(len(targets_N)).split(job.train.batch_size):
            if len(indices) < job.train.batch_size:
                break
            images_BCHW = torch.stack([augmentation(pixels_NHWC[i].permute(2, 0, 1)) for i in indices])
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(normalise(images_BCHW)), targets_N[indices]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), job.train.clip_norm)
            optimizer.step()
            seen += len(indices)
        rates.append(Rates(seen / (time.perf_counter() - started), seen / (time.process_time() - cpu_started)))
    return rates


if __name__ == "__main__":
    main()
