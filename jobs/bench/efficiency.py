"""How close the Ray pipeline comes to what the machine could do with each stage alone.

    python -m jobs.bench.efficiency [--images 4000] [--repeats 1] [--model BUNDLE] [--folder IMAGES]
        [--unit-rows 128] [--set classify.backend=openvino_fp32 ...]

A trivial model (three convolutions at 64 px) unless one is named, so that the pipeline and not the network is
measured. Each stage is run alone on files in the page cache, in one thread, and its core-seconds per image are
added up: where stages share the cores, the ceiling is cores / (sum of core-seconds per image). The pipeline is the
installed command. Its steady state is the middle of the run: the images committed between a fifth and nine tenths of
the units, by the times of the unit files, so that neither the start of the processes nor what was in flight counts.
The rate from ``engine_ready_at`` to ``finished_at`` in run.json is printed beside it. Stages and pipeline alternate. A
failed row fails the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import load_config
from imgbatch.core.plan import plan_run
from imgbatch.core.stages import ClassifyStage, CommitStage, DecodeStage
from imgbatch.runtime.pools import this_machine
from jobs.bench.common import describe_machine, find_photographs, save_trivial_model, spread

UNIT_ROWS = 128
"""For short runs; a long manifest of images at 224 px is cut into units of 512."""
STAGE_IMAGES = 512
BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
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
            settings, unit_rows = arguments.settings, arguments.unit_rows
            stages = measure_stages(str(manifest), model, scratch / f"stages{number}", settings, unit_rows=unit_rows)
            pipeline = run_pipeline(manifest, model, scratch / f"run{number}", settings, unit_rows=unit_rows)
            rounds.append((stages, pipeline))
        report(rounds)


def measure_stages(
    manifest: str, model: str, out: Path, settings: Sequence[str] = (), *, unit_rows: int = UNIT_ROWS
) -> dict[str, float]:
    """Core-seconds per image of each stage alone: of this process and, for decoding, of its child."""
    flags = {"input.manifest": manifest, "model.path": model, "output.path": str(out), "resources.device": "cpu"}
    flags["classify.unit_rows"] = str(unit_rows)
    run = plan_run(load_config(None, settings, flags), "cpu")
    units = range(min(-(-STAGE_IMAGES // unit_rows), run.plan.layout.num_units))
    num_images = sum(run.plan.layout.unit(unit).num_rows for unit in units)
    with DecodeStage(run) as decode:
        decode(0)  # starts the child and fills the page cache
        blocks, decode_s = _timed(lambda: [decode(unit) for unit in units])
    classify = ClassifyStage(run, batch_size=BATCH_SIZE, num_threads=1)
    classify(blocks[0])
    classified, classify_s = _timed(lambda: [classify(block) for block in blocks])
    commit = CommitStage(run, defer=False)
    _, commit_s = _timed(lambda: [commit(block) for block in classified])
    commit.close()
    seconds = {"fetch and decode": decode_s, "classify": classify_s, "commit": commit_s}
    return {stage: s / num_images for stage, s in seconds.items()}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its seconds on the clock: in one thread, with a core of its own, core-seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def run_pipeline(
    manifest: Path, model: str, out: Path, settings: Sequence[str] = (), *, unit_rows: int = UNIT_ROWS
) -> dict[str, Any]:
    """run.json of one run of the installed command, with some ``section.key=value`` set."""
    command = [str(Path(sys.executable).with_name("imgbatch")), "classify"]
    command += ["-m", model, "--manifest", str(manifest), "-o", str(out), "--set", "resources.device=cpu"]
    command += ["--set", f"classify.unit_rows={unit_rows}", "--set", "output.keep_units=true"]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    (path,) = out.glob("runs/*/run.json")
    (files,) = out.glob("runs/*/files.json")
    counts = json.loads(files.read_text())["counts"]
    if set(counts) != {"OK"}:
        raise SystemExit(f"rows failed: {counts}")
    record = json.loads(path.read_text())
    return {**record, "steady_images_per_s": steady_rate(out, record["unit_rows"])}


def steady_rate(out: Path, unit_rows: int) -> float:
    """Images per second over the middle of the run, whose last unit may be smaller."""
    times = sorted(path.stat().st_mtime for path in out.glob("runs/*/units/unit-*.parquet"))
    first, last = len(times) // 5, len(times) * 9 // 10
    return (last - first) * unit_rows / (times[last] - times[first])


def report(rounds: list[tuple[dict[str, float], dict[str, Any]]]) -> None:
    """Prints stages, ceiling, rate and efficiency as Markdown."""
    cores = this_machine().num_cpus
    print("| stage alone | core-ms an image |\n| --- | --- |")
    for stage in rounds[0][0]:
        print(f"| {stage} | {spread([1000 * stages[stage] for stages, _ in rounds])} |")
    ceilings = [cores / sum(stages.values()) for stages, _ in rounds]
    rates = [pipeline["steady_images_per_s"] for _, pipeline in rounds]
    efficiencies = [rate / ceiling for rate, ceiling in zip(rates, ceilings, strict=True)]
    print("\n| | |\n| --- | --- |")
    print(f"| ceiling, images/s | {spread(ceilings)} |")
    print(f"| pipeline, steady state, images/s | {spread(rates)} |")
    print(f"| pipeline, from the first unit's start, images/s | {spread([p['images_per_s'] for _, p in rounds])} |")
    print(f"| efficiency | {spread(efficiencies)} |")
    print(f"| pools | {rounds[0][1]['sessions'][0]['pools']} |")
    print(f"| unit | {rounds[0][1]['unit_rows']} rows |")
    print(f"\nefficiency, median of {len(rounds)}: {statistics.median(efficiencies):.2f}")


if __name__ == "__main__":
    main()
