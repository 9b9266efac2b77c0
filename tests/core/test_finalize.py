"""Finalize of a run that is large or not alone; that its bytes repeat is tested with each engine and each fault."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import finalize, partition_units, storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.output_files import PREDICTIONS, OutputFile
from imgbatch.core.plan import Run, plan_run
from imgbatch.core.results import LabelRules, commit_unit, prediction_columns, unit_table
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import ImgbatchError
from imgbatch.runtime.job import RunResult, classify
from tests.conftest import changed

NUM_ROWS, NUM_BUCKETS = 2_500_000, 500
PEAK_BYTES = 1_200 * 10**6
"""Less than all results take in memory; pieces of a few rows, as are held of every bucket, take twice their bytes."""

FINALIZE_AND_REPORT = """
import json, re, sys
from pathlib import Path
from imgbatch.config import parse_config
from imgbatch.core.finalize import finalize
from imgbatch.core.plan import plan_run
run = plan_run(parse_config(json.loads(sys.argv[1])), "cpu")
record = finalize(run, lambda function, run, parts: (function(run, part) for part in parts))
# Not ru_maxrss, which a new process inherits from the one that started it.
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(record["counts"]["OK"], sum(file["kind"] == "predictions" for file in record["files"]), peak_kb * 1024)
"""
"""One part of the work after the other, as a task of Ray's does it."""


def layout_of(result: RunResult) -> list[OutputFile]:
    return [OutputFile(**file) for file in storage.read_json(RunPaths(result.out, result.run_id).finalize)["files"]]


def test_only_the_partitions_of_a_part_are_taken_from_a_unit(photo_config: Config) -> None:
    run = plan_run(changed(photo_config, output__partition_by=("shop",)), "cpu")
    table = pa.table({"row_id": [0, 1, 2, 3], "shop": ["a", "b", "a", "c"]})
    found = list(finalize._by_partition(run, PREDICTIONS, table, {"shop=a", "shop=elsewhere"}))
    assert [(path, rows["row_id"].to_pylist()) for path, rows in found] == [("shop=a", [0, 2])]


def test_a_file_whose_units_are_kept_as_one_range_holds_its_own_rows(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finalize, "PARTITION_RANGES", 1)
    monkeypatch.setattr(finalize, "OPEN_FILES", 2)
    monkeypatch.setattr(finalize, "_rows_per_file", lambda *_: 10)
    result = classify(changed(photo_config, output__partition_by=("bucket:5",), classify__unit_rows=1))
    files = [file for file in layout_of(result) if file.kind == PREDICTIONS]
    assert len(files) > 10
    assert {len(file.units) for file in files} == {1}
    assert any(len(file.unit_indices()) > file.rows for file in files)
    assert verify(result.out).ok
    recorded = storage.read_json(RunPaths(result.out, result.run_id).files)["files"]
    assert [file["path"] for file in recorded] == [file.path for file in layout_of(result)]


def test_each_part_reads_a_stretch_of_the_units(photo_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no part takes hours, however large the run is."""
    monkeypatch.setattr(partition_units, "SPANNED_UNITS", 3)
    monkeypatch.setattr(finalize, "OPEN_FILES", 2)
    read, reads = finalize._read_unit, Counter[int]()

    def counted(run: finalize.Run, index: int) -> tuple[pa.Table, int]:
        reads[index] += 1
        return read(run, index)

    monkeypatch.setattr(finalize, "_read_unit", counted)
    result = classify(changed(photo_config, output__partition_by=("bucket:2",)))
    assert verify(result.out).ok
    for file in layout_of(result):
        assert len({index // 3 for index in file.unit_indices()}) == 1
    # Once for the layout, once for the two buckets, once for the errors, which share a part where one has room.
    assert set(reads) == set(range(8))
    assert max(reads.values()) <= 3


def test_results_of_other_rows_are_no_units(photo_config: Config) -> None:
    config = changed(photo_config, output__keep_units=True)
    classify(config)
    run = plan_run(config, "cpu")
    storage.remove(run.paths.success)
    path = Path(run.paths.unit_file(2))
    table = pq.read_table(path)
    row_ids = pa.array([*range(100, 115), 32], pa.int64())
    pq.write_table(table.set_column(table.column_names.index("row_id"), table.schema.field("row_id"), row_ids), path)
    with pytest.raises(ImgbatchError, match=r"unit-00000002\.parquet: .* other rows .*; remove it and run") as caught:
        finalize.finalize(run)
    assert "\n" not in str(caught.value)
    assert not run.paths.is_finished()


def test_units_that_a_repair_works_with_are_left_to_it(photo_config: Config) -> None:
    result = classify(photo_config)
    paths = RunPaths(result.out, result.run_id)
    storage.create_if_absent(paths.unit_file(3), b"classified again")
    storage.write_json(paths.heartbeat, {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()})
    assert classify(photo_config).already_finished
    assert Path(paths.unit_file(3)).exists()
    storage.remove(paths.heartbeat)
    assert classify(photo_config).already_finished
    assert not Path(paths.units).exists()


def test_uploads_that_runs_before_left_are_ended(photo_config: Config, s3_bucket: str) -> None:
    fs, bucket = storage.filesystem(s3_bucket)
    for key in ("out/predictions/run_id=r1/part-00000.parquet", "out/runs/r1/rows/part-00000.parquet", "other/file"):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    classify(changed(photo_config, output__path=f"{s3_bucket}/out", input__limit=20))
    (left,) = fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert left["Key"] == "other/file"


def test_files_of_partitions_are_written_a_few_at_a_time(
    photo_config: Config, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two open at once, so that there are as many passes over the units as there are pairs of files."""
    monkeypatch.setattr(finalize, "OPEN_FILES", 2)
    write_files, groups = finalize.write_files, list[int]()

    def counted(run: finalize.Run, part: finalize.FilesToWrite) -> list[dict[str, object]]:
        groups.append(len(part.files))
        return write_files(run, part)

    monkeypatch.setattr(finalize, "write_files", counted)
    result = classify(changed(photo_config, output__partition_by=("shop", "bucket:3")))
    assert verify(result.out).ok
    files = list(Path(result.out, "predictions").rglob("*.parquet"))
    assert len(files) > 6
    assert sum(groups) == len(files) + 1
    assert max(groups) == 2
    row_ids = [row_id for path in files for row_id in pq.read_table(path, partitioning=None)["row_id"].to_pylist()]
    assert sorted(row_ids) == [row_id for row_id in range(len(photos)) if row_id % 20 != 5]


@pytest.mark.parametrize(
    ("partition_by", "counted_units", "is_spread"),
    [(("date",), 3, True), (("date",), 1024, False), (("date", "bucket:2"), 3, False)],
)
def test_files_with_units_of_their_own_are_written_each_by_itself(
    photo_config: Config,
    monkeypatch: pytest.MonkeyPatch,
    partition_by: tuple[str, ...],
    counted_units: int,
    is_spread: bool,
) -> None:
    """As those of one date; with the row groups that they have when they are written together."""
    monkeypatch.setattr(finalize, "COUNTED_UNITS", counted_units)
    monkeypatch.setattr(finalize, "BUFFERED_BYTES", 8_000)
    monkeypatch.setattr(finalize, "_rows_per_file", lambda *_: 40)
    config = changed(photo_config, output__partition_by=partition_by, output__keep_units=True)
    result = classify(config)
    paths = RunPaths(result.out, result.run_id)
    files = layout_of(result)
    assert sum(file.kind == PREDICTIONS for file in files) > 2
    before = {file.path: Path(result.out, file.path).read_bytes() for file in files}
    sizes: list[int] = []

    def one_by_one(function: Any, context: Any, parts: Sequence[Any]) -> Iterator[Any]:
        sizes.append(len(parts))
        return (function(context, part) for part in parts)

    monkeypatch.setattr(finalize, "FEW_PARTS", 0)
    storage.remove(paths.success)
    run = plan_run(config, "cpu")
    finalize.finalize(run, one_by_one)
    assert sizes == [len(files) if is_spread else 1]
    monkeypatch.setattr(finalize, "_spread", lambda group: [finalize.FilesToWrite(group, len(group))])
    storage.remove(paths.success)
    finalize.finalize(run)
    assert {file.path: Path(result.out, file.path).read_bytes() for file in files} == before


@pytest.mark.soak
def test_memory_is_bounded_whatever_the_order_of_the_rows(
    photo_config: Config, make_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    """Every unit holds rows of every bucket."""
    manifest, step = tmp_path / "huge.parquet", 100_000
    with pq.ParquetWriter(manifest, pa.schema([("uri", pa.string())])) as writer:
        for first in range(0, NUM_ROWS, step):
            writer.write_table(pa.table({"uri": [f"s3://bucket/{row}.jpg" for row in range(first, first + step)]}))
    bundle = make_bundle(class_names=tuple(f"class {index}" for index in range(100)))
    config = changed(
        photo_config,
        input__manifest=str(manifest),
        input__duplicates="keep",
        model__path=bundle.path,
        classify__unit_rows=8192,
        output__partition_by=(f"bucket:{NUM_BUCKETS}",),
    )
    arrow_bytes = classify_nothing(plan_run(config, "cpu"))
    result = subprocess.run(
        [sys.executable, "-c", FINALIZE_AND_REPORT, config.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        timeout=900,
    )
    num_ok, num_files, peak = map(int, result.stdout.split())
    assert (num_ok, num_files) == (NUM_ROWS, NUM_BUCKETS)
    assert peak < PEAK_BYTES < arrow_bytes


def classify_nothing(run: Run) -> int:
    """Commit every unit with the same probabilities for every row; returns the bytes of all results in memory."""
    rules = LabelRules(run.bundle.class_names, run.bundle.task, run.plan.probabilities, 5)
    arrow_bytes = 0
    for unit in run.plan.layout:
        row_ids = pa.array(range(unit.first_row, unit.first_row + unit.num_rows), pa.int64())
        probs_NK = np.tile(np.linspace(0.001, 0.019, 100, dtype=np.float32), (unit.num_rows, 1))
        size_N = np.full(unit.num_rows, 224, np.int32)
        table = unit_table(row_ids, [None] * unit.num_rows, size_N, size_N, prediction_columns(probs_NK, rules))
        arrow_bytes += table.nbytes
        commit_unit(run.paths, unit.index, row_ids, table, defer_above=None)
    return arrow_bytes
