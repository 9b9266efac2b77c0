"""What bad inputs cost: the killable decoder on and off, and a collection of which a third is bad.

    python -m jobs.bench.poison [--images 1024] [--pairs 5] [--folder IMAGES]

Protection: units of photographs decoded by ``Decoder`` in its child process and by ``decode_image`` in this one, both
into fresh memory of the same kind.
A third bad: two collections through the plain loop (fetch, decode, a trivial model, commit), one of good photographs
only, one in which two photographs are followed by a bad file: an HTML page, an empty file, one that is cut, one of
zeros, a header that claims four gigapixels, another format, a missing file. What counts is the rate of good images.

Two processes that run the same loop differ by several percent, whatever they run. So every measurement has a process
of its own, the two of a pair follow each other, now one first and now the other, and what is told is the median and
the spread over the pairs. Clock and CPU (of the process and its children) are both given, because only the latter
says much on a machine that others use. A good photograph that fails, or a bad file that does not, fails the benchmark.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imgbatch.config import DecodeConfig, load_config
from imgbatch.core.decode_protocol import UnitBuffer, create_unit_file
from imgbatch.core.decoder import Decoder
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.plan import Run, plan_run
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.runtime.local import LocalEngine
from jobs.bench.common import describe_machine, find_photographs, save_trivial_model, spread

UNIT_ROWS = 128
SPEC = PreprocessSpec()


@dataclass(frozen=True)
class Cost:
    """Of one good image, milliseconds."""

    clock_ms: float
    cpu_ms: float


Side = Callable[[], Cost]
"""Something to measure, in a process of its own; picklable."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="good ones, in each measurement")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="JPEG files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photographs = find_photographs(arguments.folder, scratch)
        good = [photographs[index % len(photographs)] for index in range(arguments.images)]
        print(f"{arguments.images:,} photographs, {len(photographs)} different; {describe_machine()}\n", flush=True)
        protection: dict[str, Side] = {
            "decoded in the process": partial(unprotected, good[:UNIT_ROWS], arguments.images),
            "decoded in its child": partial(protected, good[:UNIT_ROWS], arguments.images),
        }
        compare(protection, arguments.pairs)
        model = save_trivial_model(scratch / "model")
        manifests = {"good photographs only": good, "a third bad": with_bad_files(good, scratch)}
        collections: dict[str, Side] = {
            title: partial(label, plan_collection(scratch / f"collection{number}", paths, model), len(good))
            for number, (title, paths) in enumerate(manifests.items())
        }
        compare(collections, arguments.pairs)


def unprotected(paths: list[Path], num_images: int) -> Cost:
    """Units of the photographs decoded in this process."""
    payloads = [path.read_bytes() for path in paths]

    def decode_unit() -> None:
        descriptor = create_unit_file(SPEC, len(payloads))
        pixels_NHWC = UnitBuffer(descriptor, SPEC, len(payloads)).pixels_NHWC
        os.close(descriptor)
        for row, data in enumerate(payloads):
            outcome = decode_image(data, SPEC, max_pixels=DecodeConfig().max_pixels)
            if not isinstance(outcome, Decoded):
                raise SystemExit("a photograph failed")
            pixels_NHWC[row] = outcome.pixels_HWC

    return measure_units(decode_unit, num_images)


def protected(paths: list[Path], num_images: int) -> Cost:
    """The same in the child process that can be killed."""
    payloads = [path.read_bytes() for path in paths]
    with Decoder(SPEC, DecodeConfig()) as decoder:

        def decode_unit() -> None:
            if any(decoder.decode(payloads, len(payloads)).errors):
                raise SystemExit("a photograph failed")

        return measure_units(decode_unit, num_images)


def measure_units(decode_unit: Callable[[], None], num_images: int) -> Cost:
    """Once to warm up (a child starts), and then as many units as hold ``num_images``."""
    decode_unit()
    num_units = -(-num_images // UNIT_ROWS)

    def work() -> None:
        for _ in range(num_units):
            decode_unit()

    return measure(work, num_units * UNIT_ROWS)


def with_bad_files(good: list[Path], scratch: Path) -> list[Path]:
    """``good`` with a bad file after every second one."""
    photograph = good[0].read_bytes()
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO")
    giant = bytearray(b"BM" + bytes(52))
    giant[10], giant[14], giant[26], giant[28] = 54, 40, 1, 24
    giant[18:26] = (65_535).to_bytes(4, "little") * 2
    contents = [
        b"<!DOCTYPE html>",
        b"",
        photograph[: len(photograph) // 2],
        bytes(10_000),
        bytes(giant),
        icon.getvalue(),
    ]
    bad = [scratch / f"bad{number}.jpg" for number in range(len(contents))]
    for path, content in zip(bad, contents, strict=True):
        path.write_bytes(content)
    bad.append(scratch / "missing.jpg")
    mixed: list[Path] = []
    for index, path in enumerate(good):
        mixed.append(path)
        if index % 2:
            mixed.append(bad[index // 2 % len(bad)])
    return mixed


def plan_collection(folder: Path, paths: list[Path], model: str) -> Run:
    """A run over files, planned and not begun."""
    folder.mkdir()
    manifest = folder / "manifest.parquet"
    ids = [str(index) for index in range(len(paths))]
    pq.write_table(pa.table({"uri": [str(path) for path in paths], "image_id": ids}), manifest)
    flags = {
        "input.manifest": str(manifest),
        "model.path": model,
        "output.path": str(folder / "out"),
        "classify.unit_rows": UNIT_ROWS,
        "resources.classify_threads": 1,
        "errors.max_rate": 1.0,
    }
    return plan_run(load_config(flags=flags), "cpu")


def label(run: Run, num_good: int) -> Cost:
    """The run's units classified, whether or not they have been before; the first one twice, to warm up."""
    engine = LocalEngine(run)
    list(engine.classify_units([0], defer=False))

    def work() -> None:
        receipts = list(engine.classify_units(range(run.plan.layout.num_units), defer=False))
        num_ok = sum(receipt.counts.get("OK", 0) for receipt in receipts)
        if num_ok != num_good:
            raise SystemExit(f"{num_ok} predictions of {num_good} good images")

    try:
        return measure(work, num_good)
    finally:
        engine.close()


def measure(work: Callable[[], None], num_good: int) -> Cost:
    """Milliseconds of the clock, and of the CPU in this process and its children, per good image."""
    cpu, clock = _cpu_s(), time.perf_counter()
    work()
    return Cost(1000 * (time.perf_counter() - clock) / num_good, 1000 * (_cpu_s() - cpu) / num_good)


def _cpu_s() -> float:
    return sum(sum(times[:2]) for times in _cpu_times())


def _cpu_times() -> Iterator[tuple[float, ...]]:
    own = psutil.Process()
    for process in (own, *own.children()):
        yield process.cpu_times()


def compare(sides: dict[str, Side], pairs: int) -> None:
    """Measures the two sides in turns; prints what a good image costs, and what the second's rate is of the first's."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for pair in range(pairs):
        names = list(sides)
        for name in names if pair % 2 == 0 else reversed(names):
            costs[name].append(in_a_process_of_its_own(sides[name]))
    print("| | clock, ms a good image | CPU, ms a good image |\n| --- | --- | --- |")
    for name, measured in costs.items():
        print(f"| {name} | {spread([c.clock_ms for c in measured])} | {spread([c.cpu_ms for c in measured])} |")
    ratios = [(a.clock_ms / b.clock_ms, a.cpu_ms / b.cpu_ms) for a, b in zip(*costs.values(), strict=True)]
    clock, cpu = (list(column) for column in zip(*ratios, strict=True))
    print(
        f"| rate of the second against the first, {pairs} pairs | {of_pairs(clock)} | {of_pairs(cpu)} |\n", flush=True
    )


def in_a_process_of_its_own(side: Side) -> Cost:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(side).result()


def of_pairs(ratios: list[float]) -> str:
    """Median, the middle half and the extremes."""
    low, middle, high = statistics.quantiles(ratios, method="inclusive")
    return f"**{middle:.3f}** (half of them {low:.3f} to {high:.3f}, all {min(ratios):.3f} to {max(ratios):.3f})"


if __name__ == "__main__":
    main()
