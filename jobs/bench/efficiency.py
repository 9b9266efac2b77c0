"""How close the Ray pipeline comes to what the machine could do with each stage alone.

    python -m jobs.bench.efficiency [--images 20000] [--repeats 1] [--model BUNDLE] [--folder IMAGES]
        [--unit-rows 128] [--set classify.backend=openvino_fp32 ...]

A trivial model (three convolutions at 64 px) unless one is named, so that the pipeline and not the network is
measured. Each stage is run alone on files in the page cache, in one thread, and its core-seconds per image are
added up, which is the CPU time of this process and of the decoding child: where stages share the cores, the ceiling is
cores / (sum of core-seconds per image). Time in which a stage waits, as for its child, costs no core anything.

The pipeline is the installed command. Machines drift by more than what is looked for here, from one minute to the
next; so both are measured within one run, in turn: the pipeline for some seconds, then, with all its processes stopped
(SIGSTOP), the stages for some seconds. Its rate is what was committed in its seconds, from when it has settled until
few units are left. Beside it, the CPU time of its processes in those seconds says where the cores' time goes. A failed
row fails the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import load_config
from imgbatch.core.plan import plan_run
from imgbatch.core.stages import ClassifyStage, CommitStage, DecodeStage
from imgbatch.runtime.pools import choose_batch_size, this_machine
from jobs.bench.common import describe_machine, find_photographs, save_trivial_model, spread

UNIT_ROWS = 128
"""For short runs; a long manifest of images at 224 px is cut into units of 512."""
_PIPELINE_S, _STAGES_S = 5.0, 2.5
"""Of one slice each."""
_UNITS_TO_SETTLE, _UNITS_LEFT = 12, 12
STAGES = ("fetch and decode", "classify", "commit")
_PROCESSES = (
    ("decode_child", "decoding children"),
    ("(DecodeActor)", "decode actors"),
    ("(ClassifyActor)", "classify actors"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model", help="a model bundle; default: a trivial one")
    parser.add_argument("--folder", type=Path, help="JPEG files")
    parser.add_argument("--unit-rows", type=int, default=UNIT_ROWS)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photographs = find_photographs(arguments.folder, scratch)
        manifest = scratch / "manifest.parquet"
        repeated = [photographs[index % len(photographs)] for index in range(arguments.images)]
        ids = [str(index) for index in range(arguments.images)]
        pq.write_table(pa.table({"uri": [str(path) for path in repeated], "image_id": ids}), manifest)
        model = arguments.model or save_trivial_model(scratch / "model")
        print(f"{arguments.images:,} images, {len(photographs)} of them different; {describe_machine()}\n")
        rounds = []
        for number in range(arguments.repeats):
            with Stages(str(manifest), model, scratch / f"stages{number}", arguments) as stages:
                rounds.append(measure(stages, manifest, model, scratch / f"run{number}", arguments))
        report(rounds)


class Stages:
    """The stages in this process, one thread each, and what they have taken."""

    def __init__(self, manifest: str, model: str, out: Path, arguments: argparse.Namespace) -> None:
        flags = {"input.manifest": manifest, "model.path": model, "output.path": str(out), "resources.device": "cpu"}
        flags["classify.unit_rows"] = str(arguments.unit_rows)
        run = plan_run(load_config(None, arguments.settings, flags), "cpu")
        batch_size = choose_batch_size(run.config.classify.batch_size, "cpu", run.spec.crop_size, run.backend)
        self._layout = run.plan.layout
        self._decode = DecodeStage(run)
        self._classify = ClassifyStage(run, batch_size=batch_size, num_threads=1)
        self._commit = CommitStage(run, defer=False)
        self._next_unit = 0
        self._core_seconds: dict[str, float] = defaultdict(float)
        self._images = 0
        self.run_unit()  # starts the child, loads the model
        self._core_seconds.clear()
        self._images = 0
        self._of_children = _children_cpu_seconds()

    def core_seconds_an_image(self) -> dict[str, float]:
        """Of each stage, so far."""
        by_stage = dict(self._core_seconds)
        # The kernel counts another process in hundredths of a second: too coarse for a unit, not for all of them.
        by_stage["fetch and decode"] += _children_cpu_seconds() - self._of_children
        return {stage: by_stage[stage] / self._images for stage in STAGES}

    def run_unit(self) -> None:
        """One unit after the other, stage by stage."""
        unit = self._next_unit
        self._next_unit = (unit + 1) % self._layout.num_units
        block = self._timed("fetch and decode", lambda: self._decode(unit))
        classified = self._timed("classify", lambda: self._classify(block))
        self._timed("commit", lambda: self._commit(classified))
        self._images += self._layout.unit(unit).num_rows

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        self._core_seconds[stage] += time.process_time() - started
        return result

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._decode.close()
        self._classify.close()
        self._commit.close()


def _children_cpu_seconds() -> float:
    """Of the decoding children of this process, so far."""
    times = [child.cpu_times() for child in psutil.Process().children() if "decode_child" in " ".join(child.cmdline())]
    return sum(one.user + one.system for one in times)


class PausableJob:
    """The installed command and every process below it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._root = psutil.Process(self._process.pid)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def finish(self) -> None:
        if self._process.wait() != 0:
            raise SystemExit(f"imgbatch classify ended with {self._process.returncode}")

    def cpu_seconds(self) -> dict[str, float]:
        """Of each kind of process, so far."""
        seconds: dict[str, float] = defaultdict(float)
        for process in self._all():
            try:
                name = " ".join(process.cmdline())
                times = process.cpu_times()
            except psutil.Error:
                continue
            kind = next((kind for part, kind in _PROCESSES if part in name), "Ray and Ray Data")
            seconds["driver" if process.pid == self._root.pid else kind] += times.user + times.system
        return seconds

    def _signal(self, number: int) -> None:
        for process in self._all():
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]


@dataclass
class Measured:
    """Of one run."""

    alone: dict[str, float]
    """Core-seconds an image of each stage alone."""
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of the pipeline's kinds of processes, in these seconds."""
    pools: str = ""

    @property
    def ceiling(self) -> float:
        """Images per second."""
        return this_machine().num_cpus / sum(self.alone.values())

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


def measure(stages: Stages, manifest: Path, model: str, out: Path, arguments: argparse.Namespace) -> Measured:
    """One run of the command, in slices with the stages."""
    job = PausableJob(classify_command(manifest, model, out, arguments.settings, unit_rows=arguments.unit_rows))
    num_units = -(-arguments.images // arguments.unit_rows)
    while job.runs and len(_unit_files(out)) < _UNITS_TO_SETTLE:
        time.sleep(0.2)
    measured = Measured({})
    before = None
    while job.runs:
        started, cpu_before = time.perf_counter(), job.cpu_seconds()
        time.sleep(_PIPELINE_S)
        job.pause()
        elapsed = time.perf_counter() - started
        # Files are told by what they are when everything stands: begun ones have another name.
        num_committed = len(_unit_files(out))
        if num_committed > num_units - _UNITS_LEFT:
            job.resume()
            break
        if before is not None:
            measured.images += (num_committed - before) * arguments.unit_rows
            measured.seconds += elapsed
            for kind, seconds in job.cpu_seconds().items():
                measured.cpu_seconds[kind] += seconds - cpu_before[kind]
        before = num_committed
        until = time.perf_counter() + _STAGES_S
        try:
            while time.perf_counter() < until:
                stages.run_unit()
        finally:
            job.resume()  # whatever happens here, nothing stays stopped for ever
    job.finish()
    if measured.seconds == 0:
        raise SystemExit("the run was over before it had settled; give more --images")
    record = read_record(out)
    measured.alone = stages.core_seconds_an_image()
    measured.pools = record["sessions"][0]["pools"]
    return measured


def _unit_files(out: Path) -> list[Path]:
    return list(out.glob("runs/*/units/unit-*.parquet"))


def classify_command(
    manifest: Path, model: str, out: Path, settings: Sequence[str] = (), *, unit_rows: int = UNIT_ROWS
) -> list[str]:
    """The installed command, with some ``section.key=value`` set."""
    command = [str(Path(sys.executable).with_name("imgbatch")), "classify"]
    command += ["-m", model, "--manifest", str(manifest), "-o", str(out), "--set", "resources.device=cpu"]
    command += ["--set", f"classify.unit_rows={unit_rows}", "--set", "output.keep_units=true"]
    return command + [part for setting in settings for part in ("--set", setting)]


def run_pipeline(
    manifest: Path, model: str, out: Path, settings: Sequence[str] = (), *, unit_rows: int = UNIT_ROWS
) -> dict[str, Any]:
    """run.json of one run of the installed command, with the rate over the middle of the run beside it."""
    command = classify_command(manifest, model, out, settings, unit_rows=unit_rows)
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    record = read_record(out)
    return {**record, "steady_images_per_s": steady_rate(out, record["unit_rows"])}


def read_record(out: Path) -> dict[str, Any]:
    """run.json of the one run there, none of whose rows may have failed."""
    (path,) = out.glob("runs/*/run.json")
    (files,) = out.glob("runs/*/files.json")
    counts = json.loads(files.read_text())["counts"]
    if set(counts) != {"OK"}:
        raise SystemExit(f"rows failed: {counts}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def steady_rate(out: Path, unit_rows: int) -> float:
    """Images per second over the middle of the run, whose last unit may be smaller."""
    times = sorted(path.stat().st_mtime for path in _unit_files(out))
    first, last = len(times) // 5, len(times) * 9 // 10
    return (last - first) * unit_rows / (times[last] - times[first])


def report(rounds: Sequence[Measured]) -> None:
    """Prints stages, ceiling, rate and efficiency as Markdown."""
    print("| stage alone | core-ms an image |\n| --- | --- |")
    for stage in STAGES:
        print(f"| {stage} | {spread([1000 * measured.alone[stage] for measured in rounds])} |")
    print("\n| process in the pipeline | core-ms an image |\n| --- | --- |")
    for kind in sorted({kind for measured in rounds for kind in measured.cpu_seconds}):
        print(f"| {kind} | {spread([1000 * one.cpu_seconds[kind] / one.images for one in rounds])} |")
    cores = this_machine().num_cpus
    idle = [cores * one.seconds - sum(one.cpu_seconds.values()) for one in rounds]
    print(f"| none | {spread([1000 * s / one.images for s, one in zip(idle, rounds, strict=True)])} |")
    efficiencies = [measured.rate / measured.ceiling for measured in rounds]
    print("\n| | |\n| --- | --- |")
    print(f"| ceiling, images/s | {spread([measured.ceiling for measured in rounds])} |")
    print(f"| pipeline, images/s | {spread([measured.rate for measured in rounds])} |")
    print(f"| efficiency | {spread(efficiencies)} |")
    print(f"| seconds of the pipeline that were measured | {spread([measured.seconds for measured in rounds])} |")
    print(f"| pools | {rounds[0].pools} |")
    print(f"\nefficiency, median of {len(rounds)}: {statistics.median(efficiencies):.2f}")


if __name__ == "__main__":
    main()
