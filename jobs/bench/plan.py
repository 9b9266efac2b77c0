"""How long planning takes, and how much memory: 5,000,000 synthetic rows of which no image is ever opened.

    python -m jobs.bench.plan [--rows 5000000]

Prints seconds and peak memory of a fresh process that plans the run: fingerprint, ``rows/``, duplicate check.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.config import load_config
from imgbatch.core.plan import plan_run

ROWS_PER_GROUP = 100_000


def write_manifest(path: Path, num_rows: int) -> None:
    """A manifest of distinct uris, a target and a price."""
    schema = pa.schema([("uri", pa.string()), ("target", pa.string()), ("price", pa.float64())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, num_rows, ROWS_PER_GROUP):
            numbers = pa.array(range(first, min(first + ROWS_PER_GROUP, num_rows)))
            names = pc.binary_join_element_wise("s3://bucket/catalogue/2026/", numbers.cast(pa.string()), ".jpg", "")
            targets = pa.array(["shoe", "hat"] * ROWS_PER_GROUP).slice(0, len(numbers))
            writer.write_table(pa.table([names, targets, numbers.cast(pa.float64())], schema=schema))


def plan(manifest: str, model: str, out: str) -> None:
    """Plan once in this process and say what it took."""
    started = time.perf_counter()
    flags = {"input.manifest": manifest, "model.path": model, "output.path": out, "resources.device": "cpu"}
    run = plan_run(load_config(flags=flags), "cpu")
    seconds = time.perf_counter() - started
    # Not ru_maxrss, which a new process inherits from the one that started it.
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    layout = run.plan.layout
    print(f"{layout.num_rows:,} rows, {layout.num_units:,} units: {seconds:.1f} s, peak {int(peak_kb) / 1000:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--model", help="a model bundle; default: a drawn one of ten classes")
    parser.add_argument("--plan", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        plan(*arguments.plan)
        return
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "manifest.parquet")
        write_manifest(manifest, arguments.rows)
        model = arguments.model or _draw_model(Path(folder, "model"))
        command = [sys.executable, "-m", "jobs.bench.plan", "--plan", str(manifest), model, str(Path(folder, "out"))]
        subprocess.run(command, check=True)


def _draw_model(path: Path) -> str:
    from imgbatch.core.architectures import build_network, default_preprocess
    from imgbatch.core.model import save_bundle

    names = [f"class {index}" for index in range(10)]
    network = build_network("resnet18", len(names))
    spec = default_preprocess("resnet18")
    bundle = save_bundle(
        str(path),
        arch="resnet18",
        task="multiclass",
        class_names=names,
        preprocess=spec,
        state_dict=network.state_dict(),
    )
    return bundle.path


if __name__ == "__main__":
    main()
