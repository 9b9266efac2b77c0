"""What every peer does: read locations from Parquet, label each image with a network, write (uri, label) as Parquet.

The shape is that of published benchmarks of batch classification: full-size RGB, ``ToTensor``, then the transforms
that torchvision publishes with its weights (resize, crop, normalise), float32, batches of 100, argmax.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

BATCH_SIZE = 100
IN_FLIGHT = 32
"""Requests of a process at once: as many as our own decode actor has."""
NUM_EMPTY_TASKS = 64
"""Run before the clock starts, so that the engine's workers are up."""


@dataclass(frozen=True)
class Task:
    """The arguments of a peer; small enough to send to its workers."""

    manifest: str
    """Parquet with a column ``uri``."""
    model: str
    """A bundle, of which architecture, sizes, weights and class names are used."""
    out: str
    """A directory that is not there yet."""
    result: str
    """The file that says how long it took."""
    cores: int
    object_store_mb: int
    limit: int
    """Images, from the beginning of the manifest."""

    def uris(self) -> list[str]:
        """The locations, in order."""
        return pq.read_table(self.manifest, columns=["uri"])["uri"].to_pylist()[: self.limit]

    def class_names(self) -> list[str]:
        return self._description()["class_names"]

    def sizes(self) -> tuple[int, int]:
        """What images are resized to and cropped to, px."""
        preprocess = self._description()["preprocess"]
        return preprocess["resize_size"], preprocess["crop_size"]

    def _description(self) -> dict[str, Any]:
        return json.loads(Path(self.model, "model.json").read_text())

    def network(self, *, num_threads: int | None = None) -> Any:
        """torchvision's network, or the trivial one, with the bundle's weights, float32, for inference."""
        import torch
        from safetensors.torch import load_file

        from imgbatch.core.architectures import build_network

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        network = build_network(self._description()["arch"], len(self.class_names()))
        network.load_state_dict(load_file(Path(self.model, "model.safetensors")))
        return network.eval().requires_grad_(False)

    def write(self, uris: Sequence[str], labels: Sequence[str]) -> None:
        """For peers without a writer of their own."""
        Path(self.out).mkdir(parents=True)
        pq.write_table(pa.table({"uri": uris, "label": labels}), Path(self.out, "labels.parquet"))


class Stopwatch:
    """From :meth:`start`, when the engine is up, to :meth:`stop`, when everything is written."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._started = 0.0
        self._startup = 0.0

    def start(self, *, left_out: float = 0) -> None:
        """``left_out``: seconds until now that are no start-up."""
        self._startup = time.time() - psutil.Process().create_time() - left_out
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Writes the result; checks that every image has its label."""
        seconds = time.perf_counter() - self._started
        written = sum(pq.read_metadata(path).num_rows for path in Path(self._task.out).rglob("*.parquet"))
        if written != self._task.limit:
            raise SystemExit(f"{written} labels for {self._task.limit} images")
        values = {"images": written, "seconds": seconds, "startup_seconds": self._startup}
        Path(self._task.result).write_text(json.dumps(values))


def parse_task() -> Task:
    """From the command line."""
    parser = argparse.ArgumentParser()
    for name in ("manifest", "model", "out", "result"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("cores", "object-store-mb", "limit"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return Task(**vars(parser.parse_args()))


def published_transform(sizes: tuple[int, int]) -> Any:
    """PIL image to float32 CHW; ``sizes``: see :meth:`Task.sizes`."""
    from torchvision.models import ResNet18_Weights
    from torchvision.transforms import Compose, ToTensor

    resize_size, crop_size = sizes
    return Compose(
        [ToTensor(), ResNet18_Weights.IMAGENET1K_V1.transforms(resize_size=resize_size, crop_size=crop_size)]
    )


def tuned_transform(sizes: tuple[int, int]) -> Any:
    """PIL image to uint8 CHW: resized and cropped before anything becomes a float."""
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    resize_size, crop_size = sizes
    return Compose([PILToTensor(), Resize(resize_size, antialias=True), CenterCrop(crop_size)])


def in_s3(uri: str) -> bool:
    """Whether it has to be fetched."""
    return uri.startswith("s3://")


def open_rgb(uri: str) -> Any:
    """The whole image, PIL RGB."""
    return decode_rgb(_read_object(uri) if in_s3(uri) else Path(uri).read_bytes())


def open_all_rgb(uris: Sequence[str]) -> Iterable[Any]:
    """The images in order; objects are fetched side by side."""
    if len(uris) and in_s3(uris[0]):
        return map(decode_rgb, read_objects(uris))
    return map(open_rgb, uris)


def read_objects(uris: Sequence[str]) -> list[bytes]:
    """Their contents, fetched by threads."""
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        return list(threads.map(_read_object, uris))


def decode_rgb(data: bytes) -> Any:
    """The whole image, PIL RGB."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _read_object(uri: str) -> bytes:
    location = urlsplit(uri)
    return _client().get_object(Bucket=location.netloc, Key=location.path[1:])["Body"].read()


@functools.cache
def _client() -> Any:
    """One for each process, from the environment."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client("s3", config=Config(max_pool_connections=IN_FLIGHT))


class TunedModel:
    """uint8 batches to labels: normalised after batching, channels_last."""

    def __init__(self, task: Task, *, num_threads: int | None) -> None:
        import torch

        self._names = task.class_names()
        self._network = task.network(num_threads=num_threads).to(memory_format=torch.channels_last)
        self._mean_C11 = 255 * torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
        self._std_C11 = 255 * torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)

    def __call__(self, images_BCHW: Any) -> list[str]:
        import torch

        with torch.inference_mode():
            inputs = (images_BCHW.float() - self._mean_C11) / self._std_C11
            logits = self._network(inputs.to(memory_format=torch.channels_last))
        return [self._names[index] for index in logits.argmax(dim=1).tolist()]


def batched(items: Sequence[str], size: int = BATCH_SIZE) -> Iterable[Sequence[str]]:
    """Slices of ``items``."""
    return (items[start : start + size] for start in range(0, len(items), size))
