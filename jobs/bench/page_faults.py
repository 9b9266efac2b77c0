"""What it is worth to use memory again instead of having the kernel clear it: for torch's activations, and for pixels.

    python -m jobs.bench.page_faults [--repeats 3] [--folder IMAGES] [-o RESULT]

Each of the workloads runs in a process of its own, in turn as it is and with its memory given back: a network of three
convolutions at 64 px and a ResNet-18 at 224 px, both of random weights, in two threads of one core each, in the batches
that the job would choose; and units of 512 photographs decoded to 224 px, which are copied like into the object store.
CPU time of the process and its decoding child, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil

from imgbatch.config import DecodeConfig
from imgbatch.core import decoder
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.runtime.pools import choose_batch_size
from jobs.bench.common import describe_machine, find_photographs, save_random_model, save_trivial_model, spread

_STREAMS = 2
_UNIT_ROWS = 512
NETWORKS = {"three convolutions, 64 px": (512, 4), "ResNet-18, 224 px": (64, 2)}
"""Images of a unit, and units that are measured."""
DECODING = "decoding to 224 px"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="JPEG files")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        workload, given_back, source = arguments.one
        print(json.dumps(measure(workload, Path(source), given_back=given_back == "True")))
        return
    found: dict[tuple[str, bool], list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sources = [save_trivial_model(scratch / "trivial"), save_random_model(scratch / "resnet", "resnet18", 10)]
        files = scratch / "files.json"
        files.write_text(json.dumps([str(path) for path in find_photographs(arguments.folder, scratch)]))
        for number in range(arguments.repeats):
            for workload, source in zip([*NETWORKS, DECODING], [*sources, str(files)], strict=True):
                for given_back in (False, True) if number % 2 == 0 else (True, False):
                    found[workload, given_back].append(run(workload, source, given_back=given_back))
    text = "\n".join([f"Machine: {describe_machine()}.", "", *table(found)])
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


def run(workload: str, source: str, *, given_back: bool) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "jobs.bench.page_faults", "--one", workload, str(given_back), source]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(workload: str, source: Path, *, given_back: bool) -> dict[str, float]:
    """Milliseconds of a core and page faults an image; ``given_back``: with what this benchmark is about left out."""
    if workload == DECODING:
        if given_back:
            decoder._SPARE_UNITS = 0
        return _measure_decoding(json.loads(source.read_text()))
    from imgbatch.core import predict
    from imgbatch.core.model import load_bundle

    if given_back:
        predict.keep_freed_memory = lambda: None
    bundle = load_bundle(str(source))
    size = bundle.preprocess.crop_size
    batch_size = choose_batch_size("auto", "cpu", size)
    predictor = predict.Predictor(bundle, batch_size=batch_size, num_threads=1)
    num_images, num_units = NETWORKS[workload]
    images_NHWC = np.random.default_rng(0).integers(0, 256, (num_images, size, size, 3), dtype=np.uint8)

    def predict_units() -> None:
        for _ in range(num_units):
            predictor.predict(images_NHWC)

    return _measured(predict_units, _STREAMS * num_images * num_units, threads=_STREAMS)


def _measure_decoding(files: Sequence[str]) -> dict[str, float]:
    images = [Path(files[index % len(files)]).read_bytes() for index in range(_UNIT_ROWS)]
    spec = PreprocessSpec()
    stored_NHWC = np.empty((_UNIT_ROWS, spec.crop_size, spec.crop_size, 3), np.uint8)
    num_units = 6
    with decoder.Decoder(spec, DecodeConfig()) as decoding:

        def decode_units() -> None:
            for _ in range(num_units):
                stored_NHWC[:] = decoding.decode(images, _UNIT_ROWS).pixels_NHWC

        return _measured(decode_units, _UNIT_ROWS * num_units, threads=1)


def _measured(work: Callable[[], None], num_images: int, *, threads: int) -> dict[str, float]:
    """Of ``work``, done by each of the threads, the second time that it is done."""
    done = threading.Barrier(threads + 1)

    def work_twice() -> None:
        work()
        done.wait()
        done.wait()
        work()

    workers = [threading.Thread(target=work_twice) for _ in range(threads)]
    for worker in workers:
        worker.start()
    done.wait()
    cpu_s, faults = _used()
    done.wait()
    for worker in workers:
        worker.join()
    cpu_after_s, faults_after = _used()
    return {"ms": 1000 * (cpu_after_s - cpu_s) / num_images, "faults": (faults_after - faults) / num_images}


def _used() -> tuple[float, int]:
    """CPU seconds and minor page faults of this process and its children."""
    children = psutil.Process().children()
    times = [child.cpu_times() for child in children]
    stats = [Path(f"/proc/{pid}/stat").read_text() for pid in ("self", *(child.pid for child in children))]
    faults = sum(int(stat.rpartition(") ")[2].split()[7]) for stat in stats)
    return time.process_time() + sum(one.user + one.system for one in times), faults


def table(found: dict[tuple[str, bool], list[dict[str, float]]]) -> list[str]:
    """Markdown; the ratios are those of neighbours in time."""
    lines = ["| | core-ms an image | given back | ratio | page faults an image | given back |", "| --- " * 6 + "|"]
    for workload in [*NETWORKS, DECODING]:
        kept, given_back = found[workload, False], found[workload, True]
        ratios = [one["ms"] / other["ms"] for one, other in zip(kept, given_back, strict=True)]
        cells = [spread([one["ms"] for one in kept]), spread([one["ms"] for one in given_back]), spread(ratios)]
        cells += [f"{np.median([one['faults'] for one in each]):.0f}" for each in (kept, given_back)]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
