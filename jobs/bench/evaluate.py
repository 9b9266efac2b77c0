"""How long evaluation takes and how much memory it needs: synthetic predictions, then `imgbatch evaluate` beside them.

    python jobs/bench/evaluate.py --rows 10000000 --classes 10 --probabilities all
    python jobs/bench/evaluate.py --rows 10000000 --classes 1000 --probabilities top_k
    python jobs/bench/evaluate.py --rows 10000000 --classes 10 --probabilities all --join

Prints one line of JSON: seconds and peak resident memory of the child process that evaluates, its processor seconds,
and the machine's load at the end, since other work on the machine makes it slower. Writing the predictions
is not counted. With --join the targets come from a manifest of their own, in another order of rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import current, storage
from imgbatch.core.runs import RunPaths
from imgbatch.schema import PREDICTED_AT_TYPE, TOP_K_TYPE

CHUNK_ROWS = 100_000
CHUNKS_PER_FILE = 6
TOP_K = 5
MAX_COMPETING = 32
RUN_ID = "r000000000001"
EVALUATE = """
import re
from pathlib import Path
from imgbatch.cli import main

try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
"""Says its own peak, in KiB, at the end: what the system tells its parent is at least the parent's, who wrote the
predictions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--probabilities", choices=["all", "top_k"], default="all")
    parser.add_argument("--join", action="store_true", help="targets from a manifest, joined on image_id")
    parser.add_argument("--slice-by", action="append", default=[], help="site")
    parser.add_argument("--folder", type=Path, help="where to put the predictions; they are kept and used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        out, manifest = folder / "out", folder / "targets.parquet"
        if not out.exists():
            write_output(out, manifest, arguments.rows, arguments.classes, arguments.probabilities)
        command = [sys.executable, "-c", EVALUATE, "evaluate", str(out)]
        command += ["-o", str(folder / "eval")]
        command += ["--manifest", str(manifest)] if arguments.join else []
        command += [part for column in arguments.slice_by for part in ("--slice-by", column)]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        wall_s = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    if metrics["rows"]["measured"] != arguments.rows:
        raise SystemExit(f"{metrics['rows']['measured']} of {arguments.rows} rows were measured")
    result = {
        "rows": arguments.rows,
        "classes": arguments.classes,
        "probabilities": arguments.probabilities,
        "join": arguments.join,
        "slice_by": arguments.slice_by,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_gb": round(int(done.stdout.split()[-1]) / 2**20, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 1),
        "top1": metrics["top1"],
    }
    print(json.dumps(result))


def write_output(out: Path, manifest: Path, num_rows: int, num_classes: int, probabilities: str) -> None:
    """A finished run of ``num_rows`` predictions with targets."""
    rng = np.random.default_rng(0)
    names = pa.array([f"class_{k:04d}" for k in range(num_classes)])
    paths = RunPaths(str(out), RUN_ID)
    files: list[dict[str, str | int]] = []
    chunks = [np.arange(first, min(first + CHUNK_ROWS, num_rows)) for first in range(0, num_rows, CHUNK_ROWS)]
    with contextlib.ExitStack() as stack:
        manifest_writer: pq.ParquetWriter | None = None
        for first_chunk in range(0, len(chunks), CHUNKS_PER_FILE):
            relative = f"predictions/run_id={RUN_ID}/part-{len(files):05d}.parquet"
            (out / relative).parent.mkdir(parents=True, exist_ok=True)
            writer: pq.ParquetWriter | None = None
            for rows in chunks[first_chunk : first_chunk + CHUNKS_PER_FILE]:
                table, targets = make_chunk(rows, num_classes, names, probabilities, rng)
                writer = writer or pq.ParquetWriter(out / relative, table.schema, compression="zstd")
                writer.write_table(table)
                manifest_writer = manifest_writer or stack.enter_context(
                    pq.ParquetWriter(manifest, targets.schema, compression="zstd")
                )
                manifest_writer.write_table(targets.take(pa.array(rng.permutation(len(rows)))))
            assert writer is not None
            writer.close()
            files.append({"path": relative, "kind": "predictions", "rows": pq.read_metadata(out / relative).num_rows})
    errors = f"errors/run_id={RUN_ID}/part-00000.parquet"
    (out / errors).parent.mkdir(parents=True)
    failed = targets.slice(0, 0).append_column("status", pa.array([], pa.string()))
    pq.write_table(failed.append_column("row_id", pa.array([], pa.int64())), out / errors)
    files.append({"path": errors, "kind": "errors", "rows": 0})
    plan = {
        "fields": {"model": "m000000000001", "input.duplicates": "error"},
        "predicted_at": "2026-01-02T03:04:05.000000+00:00",
        "parent": None,
        "probabilities": probabilities,
    }
    storage.write_json(paths.plan, plan)
    storage.write_json(paths.classes, {"task": "multiclass", "class_names": names.to_pylist()})
    storage.write_json(paths.files, {"files": files, "partition_types": {}})
    storage.create_if_absent(paths.success, b"")
    current.update(str(out))


def make_chunk(
    rows: np.ndarray, num_classes: int, names: pa.Array, probabilities: str, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    """Predictions of ``rows``, and the same rows' image_id, uri, target and site."""
    num = len(rows)
    targets = rng.integers(0, num_classes, num)
    # With many classes only some compete for each row, the target first among them; the rest would round to zero.
    competing = min(num_classes, MAX_COMPETING)
    gaps = rng.integers(1, num_classes // competing + 1, (num, competing))
    gaps[:, 0] = 0
    classes = (targets[:, None] + np.cumsum(gaps, axis=1)) % num_classes
    logits = rng.standard_normal((num, competing), dtype=np.float32)
    logits[:, 0] += 3
    probs = np.exp(logits)
    probs /= probs.sum(axis=1, keepdims=True)
    order = np.argsort(-probs, axis=1)[:, :TOP_K]
    best, best_probs = np.take_along_axis(classes, order, 1), np.take_along_axis(probs, order, 1)
    top = pa.StructArray.from_arrays(
        [names.take(pa.array(best.ravel())), pa.array(best_probs.ravel())], fields=list(TOP_K_TYPE.value_type)
    )
    offsets = np.arange(num + 1, dtype=np.int32)
    stored = pa.nulls(num, pa.list_(pa.float32()))
    if probabilities == "all":
        by_class = np.zeros((num, num_classes), np.float32)
        np.put_along_axis(by_class, classes, probs, axis=1)
        stored = pa.ListArray.from_arrays(pa.array(offsets * num_classes), pa.array(by_class.ravel()))
    ids = pa.array([f"s3://catalogue/images/{row:010d}.jpg" for row in rows])
    given = {"image_id": ids, "uri": ids, "target": names.take(pa.array(targets))}
    given["site"] = pa.array([f"site-{s}" for s in rng.integers(0, 40, num)])
    table = {
        "row_id": pa.array(rows),
        "image_id": ids,
        "uri": ids,
        "label": names.take(pa.array(best[:, 0])),
        "label_index": pa.array(best[:, 0].astype(np.int32)),
        "probability": pa.array(best_probs[:, 0]),
        "margin": pa.array(best_probs[:, 0] - best_probs[:, 1]),
        "top_k": pa.ListArray.from_arrays(pa.array(offsets * TOP_K), top),
        "probabilities": stored,
        "labels": pa.nulls(num, pa.list_(pa.string())),
        "model_id": pa.repeat(pa.scalar("m000000000001"), num),
        "predicted_at": pa.repeat(pa.scalar(1767323045000000).cast(PREDICTED_AT_TYPE), num),
        "target": given["target"],
        "site": given["site"],
    }
    return pa.table(table), pa.table(given)


if __name__ == "__main__":
    main()
