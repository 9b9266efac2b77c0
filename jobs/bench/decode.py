"""What decoding costs: the routes compared, and what the killable child adds to the one that was chosen.

    python -m jobs.bench.decode [--folder IMAGES] [--max-images 100] [--repeats 3] [--model BUNDLE] [--chart PNG]
                                [--only routes | reduced | protection]

Single thread, files in memory. Runs alternate, so that a slow minute of the machine meets every candidate; medians
and the range are printed as a Markdown table. Seconds of CPU are what a full machine pays; seconds on the clock
include waiting for other programs. An image that does not decode fails the benchmark.

``reduced`` is about ``preprocess.reducing_gap``: its time on large photographs, how far its crops are from the
reference's by how much smaller than its source the resized image is (``--chart`` draws it), and with ``--model``, whose
sizes should be well below those of the images, how many labels stay.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from imgbatch.config import Config
from imgbatch.core.decode_protocol import UnitBuffer, create_unit_file
from imgbatch.core.decoder import Decoder
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.model import load_bundle
from imgbatch.core.predict import Predictor
from imgbatch.core.transforms import CropGeometry, PreprocessSpec
from jobs.bench.common import describe_machine, find_photographs

SPEC = PreprocessSpec()
DECODE = Config().decode
MAX_PIXELS = DECODE.max_pixels
BILINEAR = Image.Resampling.BILINEAR
GAPS, RATIOS = (0.0, 4.0, 3.0, 2.0, 1.5, 1.0), (2, 3, 4, 6, 8, 12)
"""Reducing gaps, 0 being none; and how many times as large as the resized images the photographs are."""


@dataclass
class Timings:
    """Of one candidate: ms per image, one entry per run."""

    cpu_ms: list[float] = field(default_factory=list)
    clock_ms: list[float] = field(default_factory=list)


def crop_of(image: Image.Image, geometry: CropGeometry, side: int) -> np.ndarray:
    box = (geometry.left, geometry.top, geometry.left + side, geometry.top + side)
    return np.asarray(image.resize((geometry.resized_width, geometry.resized_height), BILINEAR).crop(box))


def fused(image: Image.Image, geometry: CropGeometry) -> np.ndarray:
    across, down = image.width / geometry.resized_width, image.height / geometry.resized_height
    left, top = geometry.left * across, geometry.top * down
    box = (left, top, left + SPEC.crop_size * across, top + SPEC.crop_size * down)
    return np.asarray(image.resize((SPEC.crop_size, SPEC.crop_size), BILINEAR, box=box))


def reference(data: bytes, spec: PreprocessSpec = SPEC) -> np.ndarray:
    """Pillow, resized whole and then cropped: what torchvision's PIL transform does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return crop_of(image, spec.geometry(*image.size), spec.crop_size)


def pillow_fused(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return fused(image, SPEC.geometry(*image.size))


def simplejpeg_fused(data: bytes) -> np.ndarray:
    image = Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))
    return fused(image, SPEC.geometry(*image.size))


def chosen(data: bytes, spec: PreprocessSpec = SPEC) -> np.ndarray:
    outcome = decode_image(data, spec, max_pixels=MAX_PIXELS)
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


def report_reduced(files: Sequence[bytes], repeats: int, *, chart: Path | None, model: str | None) -> None:
    """Prints time, error and, of a model, labels with reduced decoding."""
    print("### Reduced decoding: the same photographs, four times as wide and high\n")
    routes = {_name(gap): partial(chosen, spec=replace(SPEC, reducing_gap=gap)) for gap in GAPS}
    large = enlarged(files[:: math.ceil(len(files) / 40)], 4)
    print(table(time_routes(routes, large, repeats)), end="\n\n")
    print(
        "Mean difference of a sample from the reference's, of 255; 99th percentile of an image's; sides divided by:\n"
    )
    print("| resized to a |", " | ".join(_name(gap) for gap in GAPS), "|")
    print("| --- |", " | ".join("---" for _ in GAPS), "|")
    errors: dict[float, list[float]] = {gap: [] for gap in GAPS}
    for ratio in RATIOS:
        cells = []
        for gap in GAPS:
            means, tails, scales = _errors(files, ratio, gap)
            errors[gap].append(statistics.fmean(means))
            shown = ", ".join(str(scale) for scale in sorted(scales))
            cells.append(f"{statistics.fmean(means):.2f}; {statistics.fmean(tails):.1f}; {shown}")
        print(f"| {ratio}th | {' | '.join(cells)} |")
    if chart:
        draw_errors(chart, errors)
    if model:
        report_labels(files, model)


def _name(gap: float) -> str:
    return f"gap {gap:g}" if gap else "in full"


def _errors(files: Sequence[bytes], ratio: int, gap: float) -> tuple[list[float], list[float], set[int]]:
    """Of each image: mean and 99th percentile of the differences; and the scales that were used."""
    means, tails, scales = [], [], set()
    for data in files:
        width, height = Image.open(io.BytesIO(data)).size
        side = max(8, min(width, height) // ratio)
        spec = PreprocessSpec(side, side, reducing_gap=gap)
        difference = np.abs(chosen(data, spec).astype(int) - reference(data, spec))
        means.append(float(difference.mean()))
        tails.append(float(np.percentile(difference, 99)))
        scales.add(spec.jpeg_scale(width, height))
    return means, tails, scales


def draw_errors(path: Path, errors: Mapping[float, Sequence[float]]) -> None:
    """One line for each gap: the mean error over how many times as large the source is."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for gap, means in errors.items():
        axes.plot(RATIOS, means, marker="o", label=_name(gap))
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
    axes.set_xlabel("side of the photograph / side after resizing")
    axes.set_ylabel("mean difference from the reference, of 255")
    axes.set_ylim(bottom=0)
    axes.legend(title="reducing_gap", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def report_labels(files: Sequence[bytes], model: str) -> None:
    """Prints the labels that a model gives to reduced images against those of the reference's pixels."""
    bundle = load_bundle(model)
    predictor = Predictor(bundle)
    expected_NK = predictor.predict(np.stack([reference(data, bundle.preprocess) for data in files])).probs_NK
    print(f"\n{bundle.arch}, {bundle.preprocess.describe()}, {len(files)} images:\n")
    print("| | same label as from the reference | mean difference of a probability |\n| --- | --- | --- |")
    for gap in GAPS:
        spec = replace(bundle.preprocess, reducing_gap=gap)
        given_NK = predictor.predict(np.stack([chosen(data, spec) for data in files])).probs_NK
        same = (given_NK.argmax(axis=1) == expected_NK.argmax(axis=1)).mean()
        print(f"| {_name(gap)} | {same:.2%} | {np.abs(given_NK - expected_NK).mean():.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="JPEG files")
    parser.add_argument("--max-images", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["routes", "reduced", "protection"], help="one part instead of all")
    parser.add_argument("--model", help="a bundle whose labels are looked at in the part reduced")
    parser.add_argument("--chart", type=Path, help="where to draw the errors of the part reduced, a PNG")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        paths = find_photographs(arguments.folder, Path(scratch))
        files = [path.read_bytes() for path in paths[:: math.ceil(len(paths) / arguments.max_images)]]
    print(f"{len(files)} files, {sum(map(len, files)) / len(files) / 1e3:.0f} KB on average, {arguments.repeats} runs.")
    print(f"{describe_machine()}, simplejpeg {simplejpeg.__version__}\n")
    parts = [arguments.only] if arguments.only else ["routes", "reduced", "protection"]
    if "routes" in parts:
        print("### Routes\n")
        print(table(time_routes(ROUTES, files, arguments.repeats)), end="\n\n")
        print(differences(ROUTES, files), end="\n\n")
    if "reduced" in parts:
        report_reduced(files, arguments.repeats, chart=arguments.chart, model=arguments.model)
        print()
    if "protection" in parts:
        print("### Protection\n")
        print(table(time_protection(files, arguments.repeats)))


if __name__ == "__main__":
    main()
