"""What is raced over: which images, which network, at what size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

LARGE_PX = 2400
TILE_PX = 64
_NUM_LARGE = 60
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Workload:
    """One kind of work."""

    what: str
    """For the result's page."""
    arch: str
    resize_size: int
    crop_size: int
    shares: float
    """By how much our images, as a multiple of Ray Data's, exceed those of the first workload."""
    prepare: Callable[[Sequence[Path], Path], list[Path]]
    """Makes the images of photographs, in a directory of its own."""


def _as_they_are(photographs: Sequence[Path], folder: Path) -> list[Path]:
    del folder
    return list(photographs)


def _enlarged(photographs: Sequence[Path], folder: Path) -> list[Path]:
    """The shorter side becomes ``LARGE_PX``."""

    def size(image: Image.Image) -> tuple[int, int]:
        scale = LARGE_PX / min(image.size)
        return round(image.width * scale), round(image.height * scale)

    return _resized(photographs[:: max(1, len(photographs) // _NUM_LARGE)], folder, size)


def _tiles(photographs: Sequence[Path], folder: Path) -> list[Path]:
    return _resized(photographs, folder, lambda _: (TILE_PX, TILE_PX))


def _resized(paths: Sequence[Path], folder: Path, size: Callable[[Image.Image], tuple[int, int]]) -> list[Path]:
    made = []
    for index, path in enumerate(paths):
        # Folders are classes.
        made.append(folder / path.parent.name / f"{index}.jpg")
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.convert("RGB").resize(size(image)).save(made[-1], quality=_JPEG_QUALITY)
    return made


WORKLOADS = {
    "photographs": Workload("ResNet-18 at 224 px over photographs", "resnet18", 256, 224, 1.0, _as_they_are),
    "resnet50": Workload("ResNet-50 at 224 px over photographs", "resnet50", 256, 224, 1.0, _as_they_are),
    "large": Workload(
        f"ResNet-18 at 224 px over photographs enlarged to {LARGE_PX:,} px on the shorter side",
        "resnet18",
        256,
        224,
        2.0,
        _enlarged,
    ),
    "tiles": Workload(f"ResNet-18 at {TILE_PX} px over tiles of that size", "resnet18", TILE_PX, TILE_PX, 2.0, _tiles),
    "tiny": Workload("a trivial network at 64 px over photographs", "simple_cnn", 72, 64, 4.0, _as_they_are),
}
