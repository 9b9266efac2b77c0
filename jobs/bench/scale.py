"""The whole job without images: planner, scheduler, unit files, finalize and verify, on as many rows as wanted.

    python -m jobs.bench.scale [--rows 1000000] [--unit-rows 8192] [--classes 10]

Decode and model are put out of the way: a block holds no pixels and every image gets the same probabilities; what is
left is what the engine, the driver and the storage cost. Prints of each step its seconds and rate, what the driver
needed of CPU time and memory (its peak, VmHWM), and how many objects there were afterwards. Of the passes over the
units, the first line is the start of the actors, up to the first receipt.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from imgbatch.config import load_config
from imgbatch.core import storage
from imgbatch.core.finalize import finalize
from imgbatch.core.plan import Run, plan_run
from imgbatch.core.results import LabelRules, prediction_columns, unit_table
from imgbatch.core.rows import RowsReader
from imgbatch.core.stages import DECODE_COLUMNS, UNIT
from imgbatch.core.verify import verify
from imgbatch.runtime.actors import ClassifyActor
from imgbatch.runtime.own_ray import without_data_actors
from imgbatch.runtime.passes import MAX_PASS_UNITS
from imgbatch.runtime.pools import choose_pools, this_machine
from imgbatch.runtime.ray_data import RayEngine
from imgbatch.runtime.session import ray_session
from imgbatch.schema import ROW_ID
from jobs.bench.common import describe_machine, save_trivial_model
from jobs.bench.plan import write_manifest


class NoDecode:
    """Reads the unit's row_ids and nothing else."""

    def __init__(self, run: Run, processes: int) -> None:
        del processes
        self._run = run

    def __call__(self, block: pa.Table) -> pa.Table:
        unit = self._run.plan.layout.unit(block[UNIT][0].as_py())
        reader = RowsReader(self._run.paths)
        rows = reader.read(unit, [ROW_ID])
        reader.close()
        constants = {
            UNIT: pa.scalar(unit.index, pa.int32()),
            "started_at": time.time(),
            "num_changed": pa.scalar(0, pa.int32()),
            "fetch_s": 0.0,
            "decode_s": 0.0,
        }
        for name in DECODE_COLUMNS:
            rows = rows.append_column(name, pa.repeat(constants[name], unit.num_rows))
        return rows


class NoModel:
    """Says the same of every image."""

    def __init__(self, run: Run, batch_size: int, num_threads: int | None, streams: int) -> None:
        del batch_size, num_threads, streams
        names = run.bundle.class_names
        self._rules = LabelRules(names, run.bundle.task, run.plan.probabilities, run.plan.config.output.top_k)
        self._probs_K = np.full(len(names), 1 / len(names), np.float32)

    def __call__(self, block: pa.Table) -> pa.Table:
        size_N = np.full(block.num_rows, 224, np.int32)
        probs_NK = np.tile(self._probs_K, (block.num_rows, 1))
        row_ids = block[ROW_ID].combine_chunks()
        table = unit_table(row_ids, [None] * block.num_rows, size_N, size_N, prediction_columns(probs_NK, self._rules))
        for name in DECODE_COLUMNS:
            table = table.append_column(name, block[name])
        return table.append_column("classify_s", pa.repeat(0.0, block.num_rows))


class CommitAlone(ClassifyActor):
    """Writes what :class:`NoModel` says."""

    classify_stage = NoModel


class SimulatedEngine(RayEngine):
    """The real scheduler with idle actors."""

    decode_actor = NoDecode
    classify_actor = CommitAlone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--unit-rows", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{arguments.rows:,} rows in units of {arguments.unit_rows:,}; {describe_machine()}\n")
    print("| step | seconds | rate | driver's CPU, s | driver's peak, MB | objects |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own, so that the memory of torch and of a manifest's rows is not the driver's.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(_write_inputs, (Path(name), arguments.rows, arguments.classes))
        simulate(Path(name), arguments.unit_rows)


def _write_inputs(scratch: Path, num_rows: int, num_classes: int) -> None:
    write_manifest(scratch / "manifest.parquet", num_rows)
    save_trivial_model(scratch / "model", num_classes)


def simulate(scratch: Path, unit_rows: int) -> None:
    """Every step once, a line each."""
    flags = {
        "input.manifest": str(scratch / "manifest.parquet"),
        "model.path": str(scratch / "model"),
        "output.path": str(scratch / "out"),
        "classify.unit_rows": unit_rows,
        "resources.device": "cpu",
    }
    steps = Steps(scratch / "out")
    run = plan_run(load_config(flags=flags), "cpu")
    num_rows, num_units = run.plan.layout.num_rows, run.plan.layout.num_units
    steps.done("plan", num_rows, "rows/s")
    pools = choose_pools(run.config.resources, "cpu", this_machine())
    with ray_session(run.config, pools), without_data_actors():
        engine = SimulatedEngine(run, lambda: pools)
        steps.done("start Ray", 0, "")
        while pending := run.pending_units()[:MAX_PASS_UNITS]:
            receipts = engine.classify_units(pending, defer=False)
            next(receipts)
            steps.done("first unit of a pass", 0, "")
            for _ in receipts:
                pass
            steps.done(f"the other {len(pending) - 1:,} units", len(pending) - 1, "units/s")
        run.pending_units()
        steps.done("see what is left", num_units, "units/s")
        finalize(run, engine.map_parts)
        steps.done("finalize", num_rows, "rows/s")
    result = verify(run.paths.out)
    steps.done("verify", num_rows, "rows/s")
    if not result.ok:
        raise SystemExit(f"verify: {[check for check in result.checks if not check.ok]}")


class Steps:
    """Prints a line for each step, from the end of the one before."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._start()

    def _start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def done(self, name: str, count: int, unit: str) -> None:
        """A step has ended: ``count`` things, of which ``unit`` is the rate; 0: no rate."""
        elapsed, cpu = time.perf_counter() - self._wall_s, time.process_time() - self._cpu_s
        (peak_kb,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        rate = f"{count / elapsed:,.0f} {unit}" if count else ""
        objects = len(storage.list_files(str(self._out)))
        print(
            f"| {name} | {elapsed:,.1f} | {rate} | {cpu:,.1f} | {int(peak_kb) / 1000:,.0f} | {objects:,} |", flush=True
        )
        self._start()


if __name__ == "__main__":
    main()
