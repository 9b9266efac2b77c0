"""What bad inputs cost: the killable decoder on and off, and a collection of which a third is bad.

    python -m jobs.bench.poison [--images 1536] [--repeats 5] [--folder IMAGES]

Protection: units of photographs decoded by ``Decoder`` in its child process and by ``decode_image`` in this one, both
into fresh memory of the same kind.
A third bad: two collections through the plain loop (fetch, decode, a trivial model, commit), one of good photographs
only, one in which two photographs are followed by a bad file: an HTML page, an empty file, one that is cut, one of
zeros, a header that claims four gigapixels, another format, a missing file. What counts is the rate of good images.
The two sides of each pair alternate; clock and CPU (of this process and its children) are both given, because only
the latter says much on a machine that others use. A good photograph that fails, or a bad file that does not, fails
the benchmark.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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
from imgbatch.core.plan import plan_run
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1536, help="good ones, in each run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="JPEG files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photographs = find_photographs(arguments.folder, scratch)
        good = [photographs[index % len(photographs)] for index in range(arguments.images)]
        print(f"{arguments.images:,} photographs, {len(photographs)} different; {describe_machine()}\n")
        payloads = [path.read_bytes() for path in good[:UNIT_ROWS]]
        with Decoder(SPEC, DecodeConfig()) as decoder:
            protected(decoder, payloads, UNIT_ROWS)  # starts the child
            sides: dict[str, Callable[[], Cost]] = {
                "decoded in this process": lambda: unprotected(payloads, arguments.images),
                "decoded in the child": lambda: protected(decoder, payloads, arguments.images),
            }
            compare(sides, arguments.repeats)
        model = save_trivial_model(scratch / "model")
        manifests = {"good": good, "a third bad": with_bad_files(good, scratch)}
        with Collections(manifests, len(good), model, scratch) as collections:
            compare({name: partial(collections.label, name) for name in manifests}, arguments.repeats)


def unprotected(payloads: list[bytes], num_images: int) -> Cost:
    def work() -> None:
        for _ in range(num_images // UNIT_ROWS):
            descriptor = create_unit_file(SPEC, len(payloads))
            pixels_NHWC = UnitBuffer(descriptor, SPEC, len(payloads)).pixels_NHWC
            os.close(descriptor)
            for row, data in enumerate(payloads):
                outcome = decode_image(data, SPEC, max_pixels=DecodeConfig().max_pixels)
                if not isinstance(outcome, Decoded):
                    raise SystemExit("a photograph failed")
                pixels_NHWC[row] = outcome.pixels_HWC

    return measure(work, num_images)


def protected(decoder: Decoder, payloads: list[bytes], num_images: int) -> Cost:
    def work() -> None:
        for _ in range(num_images // UNIT_ROWS):
            if any(decoder.decode(payloads, len(payloads)).errors):
                raise SystemExit("a photograph failed")

    return measure(work, num_images)


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


class Collections:
    """The same model over several manifests, each as often as wanted; a context manager."""

    def __init__(self, manifests: dict[str, list[Path]], num_good: int, model: str, scratch: Path) -> None:
        """``num_good``: photographs in each manifest."""
        self._engines: dict[str, LocalEngine] = {}
        self._plans = {}
        self._num_good = num_good
        for number, (name, paths) in enumerate(manifests.items()):
            manifest = scratch / f"manifest{number}.parquet"
            ids = [str(index) for index in range(len(paths))]
            pq.write_table(pa.table({"uri": [str(path) for path in paths], "image_id": ids}), manifest)
            flags = {
                "input.manifest": str(manifest),
                "model.path": model,
                "output.path": str(scratch / f"out{number}"),
                "classify.unit_rows": UNIT_ROWS,
                "resources.classify_threads": 1,
                "errors.max_rate": 1.0,
            }
            run = self._plans[name] = plan_run(load_config(flags=flags), "cpu")
            self._engines[name] = LocalEngine(run)

    def __enter__(self) -> Collections:
        for name in self._engines:
            self.label(name)  # starts the child and fills the page cache
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self._engines.values():
            engine.close()

    def label(self, name: str) -> Cost:
        run, num_good = self._plans[name], self._num_good

        def work() -> None:
            receipts = list(self._engines[name].classify_units(range(run.plan.layout.num_units), defer=False))
            num_ok = sum(receipt.counts.get("OK", 0) for receipt in receipts)
            if num_ok != num_good:
                raise SystemExit(f"{num_ok} predictions of {num_good} good images")

        return measure(work, num_good)


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


def compare(sides: dict[str, Callable[[], Cost]], repeats: int) -> None:
    """Alternates the sides; prints what a good image costs, and the second side's rate as a share of the first's."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            costs[name].append(side())
    print("| | clock, ms a good image | CPU, ms a good image |\n| --- | --- | --- |")
    for name, measured in costs.items():
        print(f"| {name} | {spread([c.clock_ms for c in measured])} | {spread([c.cpu_ms for c in measured])} |")
    first, second = costs.values()
    clock = statistics.median(a.clock_ms / b.clock_ms for a, b in zip(first, second, strict=True))
    cpu = statistics.median(a.cpu_ms / b.cpu_ms for a, b in zip(first, second, strict=True))
    print(f"| rate of the second against the first, median of {repeats} pairs | {clock:.3f} | {cpu:.3f} |\n")


if __name__ == "__main__":
    main()
