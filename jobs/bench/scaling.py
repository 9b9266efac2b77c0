"""How the rate and the memory of the whole job follow what a user may change, one thing at a time.

    python -m jobs.bench.scaling [--only AXIS,...] [--long] [-o RESULT]

Axes: ``decoders`` (children that decode), ``unit-rows``, ``side`` (of the images, px), ``classes`` (with every class's
probability written), ``rows`` (of 64 px, in the units of 1,024 that such a job has by itself from 32,768 rows on) and
``nodes``. Each point is one run of the installed command with a trivial model, elsewhere in units of 128 rows unless
they are the axis: the rate in the middle of the run, and the highest memory of all its processes together (PSS).
``--long`` adds a million rows.

``nodes`` is weak scaling: one, two and four nodes of a local cluster with one decode and one classify actor each, whose
work is to wait, so that the cores at hand do not matter and what is seen is the engine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from ray.cluster_utils import Cluster

from imgbatch.config import load_config
from imgbatch.core.plan import Run, plan_run
from imgbatch.runtime.pools import Machine, choose_pools
from imgbatch.runtime.ray_data import RayEngine
from jobs.bench.common import describe_machine, find_photographs, save_trivial_model
from jobs.bench.contest import PeakMemory
from jobs.bench.efficiency import run_pipeline
from jobs.bench.scale import CommitAlone, NoDecode, NoModel

SMALL_PX = 64
UNIT_WAIT_S = 0.5


@dataclass(frozen=True)
class Point:
    """One run."""

    axis: str
    value: int
    images: int
    images_per_s: float
    peak_mb: float


class Bench:
    """Draws what the axes need, once, and runs the command."""

    def __init__(self, scratch: Path, *, long: bool) -> None:
        self._scratch = scratch
        self._photographs = find_photographs(None, scratch)
        self._long = long
        self._runs = 0
        self._model = save_trivial_model(scratch / "model")
        self.axes: dict[str, Callable[[], list[Point]]] = {
            "decoders": self._decoders,
            "unit-rows": self._unit_rows,
            "side": self._sides,
            "classes": self._classes,
            "rows": self._rows,
        }

    def _decoders(self) -> list[Point]:
        return [
            self._run("decoders", count, 256, 6000, {"resources.decode_actors": 1, "resources.decode_processes": count})
            for count in (1, 2, 4)
        ]

    def _unit_rows(self) -> list[Point]:
        return [
            self._run("unit-rows", rows, SMALL_PX, max(40 * rows, 8000), {"classify.unit_rows": rows})
            for rows in (16, 64, 256, 1024)
        ]

    def _sides(self) -> list[Point]:
        return [
            self._run("side", side, side, images, {})
            for side, images in ((64, 20_000), (256, 12_000), (1024, 4000), (2048, 2000))
        ]

    def _classes(self) -> list[Point]:
        points = []
        for count in (10, 1000, 20_000):
            model = save_trivial_model(self._scratch / f"model-{count}", count)
            settings = {"output.probabilities": "all"}
            points.append(self._run("classes", count, SMALL_PX, 8000, settings, model=model))
        return points

    def _rows(self) -> list[Point]:
        counts = [10_000, 100_000, *([1_000_000] if self._long else [])]
        return [self._run("rows", rows, SMALL_PX, rows, {"classify.unit_rows": 1024}) for rows in counts]

    def _run(
        self,
        axis: str,
        value: int,
        side: int,
        images: int,
        settings: Mapping[str, int | str],
        *,
        model: str | None = None,
    ) -> Point:
        manifest, out = self._manifest(side, images), self._scratch / f"run{self._runs}"
        self._runs += 1
        memory = PeakMemory(os.getpid(), below=True)
        run = run_pipeline(manifest, model or self._model, out, [f"{key}={value}" for key, value in settings.items()])
        point = Point(axis, value, images, run["steady_images_per_s"], memory.stop())
        print(f"{axis} {value:,}: {point.images_per_s:,.0f} images/s, {point.peak_mb:,.0f} MB", flush=True)
        return point

    def _manifest(self, side: int, images: int) -> Path:
        folder, manifest = self._scratch / f"{side}px", self._scratch / f"{side}px-{images}.parquet"
        if not folder.exists():
            folder.mkdir()
            for index, path in enumerate(self._photographs):
                with Image.open(path) as photograph:
                    photograph.convert("RGB").resize((side, side)).save(folder / f"{index}.jpg", quality=90)
        if not manifest.exists():
            paths = sorted(str(path) for path in folder.iterdir())
            uris = pa.array([paths[index % len(paths)] for index in range(images)])
            pq.write_table(pa.table({"uri": uris, "image_id": [str(index) for index in range(images)]}), manifest)
        return manifest


class WaitingModel(NoModel):
    """Takes its time and no core."""

    def __call__(self, block: pa.Table) -> pa.Table:
        time.sleep(UNIT_WAIT_S)
        return super().__call__(block)


class WaitAndCommit(CommitAlone):
    """The actor of such a model."""

    classify_stage = WaitingModel


class WaitingEngine(RayEngine):
    """The engine as it is, with actors that wait."""

    decode_actor: ClassVar[type] = NoDecode
    classify_actor: ClassVar[type] = WaitAndCommit


def measure_nodes(scratch: Path, counts: Sequence[int] = (1, 2, 4)) -> list[str]:
    """Units a second on so many nodes, of what as many actors could do, as rows of a table."""
    unit_rows, units_of_a_node = 64, 40
    model = save_trivial_model(scratch / "waiting-model")
    lines = ["| nodes | units/s | of the ideal |", "| --- | --- | --- |"]
    for count in counts:
        manifest = scratch / f"{count}-nodes.parquet"
        num_rows = unit_rows * units_of_a_node * count
        uris = [f"/nowhere/{index}.jpg" for index in range(num_rows)]
        pq.write_table(pa.table({"uri": uris, "image_id": [str(index) for index in range(num_rows)]}), manifest)
        flags = {"input.manifest": str(manifest), "model.path": model, "output.path": str(scratch / f"nodes{count}")}
        flags |= {"classify.unit_rows": str(unit_rows), "resources.decode_actors": str(count)}
        run = plan_run(load_config(flags=flags | {"resources.classify_actors": str(count)}), "cpu")
        rate = _units_per_s(run, count)
        lines.append(f"| {count} | {rate:.2f} | {rate * UNIT_WAIT_S / count:.2f} |")
        print(lines[-1], flush=True)
    return lines


def _units_per_s(run: Run, num_nodes: int) -> float:
    """The rate in the middle of the run."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for _ in range(num_nodes - 1):
            cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, log_to_driver=False)
        pools = choose_pools(run.config.resources, "cpu", Machine(2 * num_nodes, 0, node_cpus=2))
        engine = WaitingEngine(run, lambda: pools)
        times = [time.monotonic() for _ in engine.classify_units(range(run.plan.layout.num_units), defer=False)]
        engine.close()
    finally:
        ray.shutdown()
        cluster.shutdown()
    first, last = len(times) // 5, len(times) * 9 // 10
    return (last - first) / (times[last] - times[first])


def table(points: Sequence[Point]) -> list[str]:
    """Markdown of one axis."""
    lines = [f"| {points[0].axis} | images | images/s | peak memory, MB |", "| --- | --- | --- | --- |"]
    return lines + [f"| {p.value:,} | {p.images:,} | {p.images_per_s:,.0f} | {p.peak_mb:,.0f} |" for p in points]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="some of decoders, unit-rows, side, classes, rows, nodes; default: all")
    parser.add_argument("--long", action="store_true", help="up to 1,000,000 rows")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file")
    arguments = parser.parse_args()
    lines = [f"Machine: {describe_machine()}."]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), long=arguments.long)
        wanted = arguments.only.split(",") if arguments.only else [*bench.axes, "nodes"]
        if unknown := [axis for axis in wanted if axis not in (*bench.axes, "nodes")]:
            parser.error(f"--only {unknown[0]}: none of {', '.join([*bench.axes, 'nodes'])}")
        for axis in wanted:
            found = measure_nodes(Path(name)) if axis == "nodes" else table(bench.axes[axis]())
            lines += ["", f"## {axis}", "", *found]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
