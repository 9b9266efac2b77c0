"""What decoding costs: the routes compared, and what the killable child adds to the one that was chosen.

    python -m jobs.bench.decode [--folder IMAGES] [--max-images 100] [--repeats 3] [--only routes | large | protection]

Single thread, files in memory. Runs alternate, so that a slow minute of the machine meets every candidate; medians
and the range are printed as a Markdown table. Seconds of CPU are what a full machine pays; seconds on the clock
include waiting for other programs. An image that does not decode fails the benchmark.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from imgbatch.config import Config
from imgbatch.core.decode_protocol import UnitBuffer, create_unit_file
from imgbatch.core.decoder import Decoder
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.transforms import CropGeometry, PreprocessSpec
from jobs.bench.common import describe_machine, find_photographs

SPEC = PreprocessSpec()
DECODE = Config().decode
MAX_PIXELS = DECODE.max_pixels
BILINEAR = Image.Resampling.BILINEAR


@dataclass
class Timings:
    """Of one candidate: ms per image, one entry per run."""

    cpu_ms: list[float] = field(default_factory=list)
    clock_ms: list[float] = field(default_factory=list)


def crop_of(image: Image.Image, geometry: CropGeometry) -> np.ndarray:
    box = (geometry.left, geometry.top, geometry.left + SPEC.crop_size, geometry.top + SPEC.crop_size)
    return np.asarray(image.resize((geometry.resized_width, geometry.resized_height), BILINEAR).crop(box))


def fused(image: Image.Image, geometry: CropGeometry) -> np.ndarray:
    across, down = image.width / geometry.resized_width, image.height / geometry.resized_height
    left, top = geometry.left * across, geometry.top * down
    box = (left, top, left + SPEC.crop_size * across, top + SPEC.crop_size * down)
    return np.asarray(image.resize((SPEC.crop_size, SPEC.crop_size), BILINEAR, box=box))


def reference(data: bytes) -> np.ndarray:
    """Pillow, resized whole and then cropped: what torchvision's PIL transform does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return crop_of(image, SPEC.geometry(*image.size))


def pillow_fused(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return fused(image, SPEC.geometry(*image.size))


def simplejpeg_fused(data: bytes) -> np.ndarray:
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    return fused(image, SPEC.geometry(*image.size))


def dct_scaled(data: bytes) -> np.ndarray:
    """Decoded at the smallest DCT scale that still covers the resized image."""
    image = Image.open(io.BytesIO(data))
    geometry = SPEC.geometry(*image.size)
    image.draft("RGB", (geometry.resized_width, geometry.resized_height))
    return fused(image.convert("RGB"), geometry)


def chosen(data: bytes) -> np.ndarray:
    outcome = decode_image(data, SPEC, max_pixels=MAX_PIXELS)
    if not isinstance(outcome, Decoded):
        raise SystemExit(f"an image does not decode: {outcome}")
    return outcome.pixels_HWC


ROUTES: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow, resize then crop (the reference)": reference,
    "Pillow, crop fused into one resize": pillow_fused,
    "simplejpeg, fromarray, fused": simplejpeg_fused,
    "decode_image (simplejpeg, Arrow, two passes)": chosen,
}


def enlarged(files: Sequence[bytes], factor: int) -> list[bytes]:
    """The same photographs, larger: what a camera rather than a thumbnail delivers."""
    larger = []
    for data in files:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        buffer = io.BytesIO()
        image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=90
        )
        larger.append(buffer.getvalue())
    return larger


def time_routes(
    routes: Mapping[str, Callable[[bytes], np.ndarray]], files: Sequence[bytes], repeats: int
) -> dict[str, Timings]:
    timings = {name: Timings() for name in routes}
    for _ in range(repeats):
        for name, route in routes.items():
            cpu, clock = time.process_time(), time.perf_counter()
            for data in files:
                route(data)
            timings[name].cpu_ms.append((time.process_time() - cpu) / len(files) * 1e3)
            timings[name].clock_ms.append((time.perf_counter() - clock) / len(files) * 1e3)
    return timings


def time_protection(files: Sequence[bytes], repeats: int) -> dict[str, Timings]:
    """``decode_image`` in this process, and the same images through :class:`Decoder`, both into fresh shared memory."""
    off, on = Timings(), Timings()
    with Decoder(SPEC, DECODE) as decoder:
        decoder.decode(files, len(files))
        assert decoder.child_pid is not None
        for _ in range(repeats):
            cpu, clock = time.process_time(), time.perf_counter()
            descriptor = create_unit_file(SPEC, len(files))
            pixels_NHWC = UnitBuffer(descriptor, SPEC, len(files)).pixels_NHWC
            os.close(descriptor)
            for row, data in enumerate(files):
                pixels_NHWC[row] = chosen(data)
            off.cpu_ms.append((time.process_time() - cpu) / len(files) * 1e3)
            off.clock_ms.append((time.perf_counter() - clock) / len(files) * 1e3)

            cpu, clock = time.process_time() + cpu_seconds(decoder.child_pid), time.perf_counter()
            unit = decoder.decode(files, len(files))
            spent = time.process_time() + cpu_seconds(decoder.child_pid) - cpu
            on.cpu_ms.append(spent / len(files) * 1e3)
            on.clock_ms.append((time.perf_counter() - clock) / len(files) * 1e3)
            if any(unit.errors) or not np.array_equal(unit.pixels_NHWC, pixels_NHWC):
                raise SystemExit("the child's pixels differ from this process's")
    return {"in this process": off, "in the child": on}


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of another process so far, to the nanosecond where the scheduler tells."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def table(timings: Mapping[str, Timings]) -> str:
    first = statistics.median(next(iter(timings.values())).cpu_ms)
    lines = [
        "| | CPU, ms an image | range | clock, ms an image | CPU against the first |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, timing in timings.items():
        cpu = statistics.median(timing.cpu_ms)
        spread = f"{min(timing.cpu_ms):.2f} to {max(timing.cpu_ms):.2f}"
        clock = statistics.median(timing.clock_ms)
        lines.append(f"| {name} | {cpu:.3f} | {spread} | {clock:.3f} | {cpu / first - 1:+.1%} |")
    return "\n".join(lines)


def differences(routes: Mapping[str, Callable[[bytes], np.ndarray]], files: Sequence[bytes]) -> str:
    lines = ["| | samples that differ from the reference | largest difference |", "| --- | --- | --- |"]
    expected = [reference(data).astype(int) for data in files]
    for name, route in routes.items():
        apart = [np.abs(route(data) - pixels) for data, pixels in zip(files, expected, strict=True)]
        share = statistics.fmean(float((difference > 0).mean()) for difference in apart)
        lines.append(f"| {name} | {share:.3%} | {max(int(difference.max()) for difference in apart)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="JPEG files")
    parser.add_argument("--max-images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["routes", "large", "protection"], help="one part instead of all")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        paths = find_photographs(arguments.folder, Path(scratch))
        files = [path.read_bytes() for path in paths[:: math.ceil(len(paths) / arguments.max_images)]]
    print(f"{len(files)} files, {sum(map(len, files)) / len(files) / 1e3:.0f} KB on average, {arguments.repeats} runs.")
    print(f"{describe_machine()}, simplejpeg {simplejpeg.__version__}\n")
    parts = [arguments.only] if arguments.only else ["routes", "large", "protection"]
    if "routes" in parts:
        print("### Routes\n")
        print(table(time_routes(ROUTES, files, arguments.repeats)), end="\n\n")
        print(differences(ROUTES, files), end="\n\n")
    if "large" in parts:
        print("### The same photographs, four times as wide and high\n")
        scaled = {"decode_image": chosen, "reduced DCT scale, fused": dct_scaled}
        large = enlarged(files[:: math.ceil(len(files) / 40)], 4)
        print(table(time_routes(scaled, large, 3)), end="\n\n")
        print(differences(scaled, large), end="\n\n")
    if "protection" in parts:
        print("### Protection\n")
        print(table(time_protection(files, arguments.repeats)))


if __name__ == "__main__":
    main()
