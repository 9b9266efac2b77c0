"""What every benchmark needs: images, a word about the machine, and a spread."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from imgbatch.core.drawing import draw_collection
from imgbatch.runtime.pools import this_machine


def find_photographs(folder: Path | None, scratch: Path, *, num_drawn: int = 200) -> list[Path]:
    """JPEG files of ``folder``, else of the catalogue below ``IMGBATCH_TEST_DATA``, else drawn below ``scratch``."""
    data = os.environ.get("IMGBATCH_TEST_DATA")
    if folder is None and data:
        folder = Path(data, "catalog", "test")
    if folder is None:
        draw_collection(scratch / "drawn", num_images=num_drawn, seed=0, num_broken=0)
        folder = scratch / "drawn"
    paths = sorted(folder.rglob("*.jpg"))
    if not paths:
        raise SystemExit(f"{folder}: no *.jpg there")
    return paths


def save_trivial_model(path: Path, num_classes: int = 10) -> str:
    """A bundle of three convolutions at 64 px with random weights, so that the pipeline and not the network counts."""
    from imgbatch.core.architectures import SIMPLE_CNN

    return save_random_model(path, SIMPLE_CNN, num_classes, resize_size=72, crop_size=64)


def save_random_model(path: Path, arch: str, num_classes: int, *, resize_size: int = 256, crop_size: int = 224) -> str:
    """A bundle of any architecture with random weights."""
    import torch

    from imgbatch.core.architectures import build_network
    from imgbatch.core.model import save_bundle
    from imgbatch.core.transforms import PreprocessSpec

    torch.manual_seed(0)
    return save_bundle(
        str(path),
        arch=arch,
        task="multiclass",
        class_names=[f"class {index}" for index in range(num_classes)],
        preprocess=PreprocessSpec(resize_size=resize_size, crop_size=crop_size),
        state_dict=build_network(arch, num_classes).state_dict(),
    ).path


def describe_machine() -> str:
    """One line: cores, processor, memory, load, versions."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch", "pyarrow", "pillow"))
    return (
        f"{this_machine().num_cpus} cores of {model}, {memory_gb:.0f} GB, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {versions}"
    )


def spread(values: Sequence[float], unit: str = "") -> str:
    """``median (lowest to highest)``."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"
