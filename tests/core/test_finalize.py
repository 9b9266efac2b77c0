"""Finalize of a run that is large or not alone; that its bytes repeat is tested with each engine and each fault."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import finalize, partition_units, storage
from imgbatch.core.output_files import PREDICTIONS, OutputFile
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.runtime.job import RunResult, classify
from tests.conftest import changed


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

    def counted(run: finalize.Run, files: list[finalize.OutputFile]) -> list[dict[str, object]]:
        groups.append(len(files))
        return write_files(run, files)

    monkeypatch.setattr(finalize, "write_files", counted)
    result = classify(changed(photo_config, output__partition_by=("shop", "bucket:3")))
    assert verify(result.out).ok
    files = list(Path(result.out, "predictions").rglob("*.parquet"))
    assert len(files) > 6
    assert sum(groups) == len(files) + 1
    assert max(groups) == 2
    row_ids = [row_id for path in files for row_id in pq.read_table(path, partitioning=None)["row_id"].to_pylist()]
    assert sorted(row_ids) == [row_id for row_id in range(len(photos)) if row_id % 20 != 5]
