"""What verification finds; that it passes what is whole, the tests of whatever writes an output say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.runtime.job import RunResult, classify, retry
from tests.conftest import changed


def failures(out: str) -> dict[str, str]:
    """What the checks say that did not pass, by their names."""
    return {check.name: check.detail for check in verify(out).checks if not check.ok}


def file_of(result: RunResult, kind: str) -> Path:
    """The one file of a kind that a run has."""
    (path,) = Path(result.out, kind, f"run_id={result.run_id}").rglob("*.parquet")
    return path


def rewrite(result: RunResult, kind: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a run's file, of which files.json then has the digest."""
    path, record = file_of(result, kind), RunPaths(result.out, result.run_id).files
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    listed = storage.read_json(record)
    for file in listed["files"]:
        file["sha256"] = storage.sha256(storage.join(result.out, file["path"]))
    storage.write_json(record, listed)


def replaced(table: pa.Table, column: str, old: object, new: object) -> pa.Table:
    """``table`` with ``new`` wherever ``column`` is ``old``."""
    index, field = table.column_names.index(column), table.schema.field(column)
    values = pc.if_else(pc.equal(table[column], old), pa.scalar(new, field.type), table[column])
    return table.set_column(index, field, values)


def test_an_embedding_that_is_missing(photo_config: Config) -> None:
    result = classify(changed(photo_config, output__embeddings=True))
    rewrite(result, "embeddings", lambda table: pa.concat_tables([table.slice(2), table.slice(2, 1)]))
    assert failures(result.out) == {"embeddings": "3 predictions and embeddings without a pair"}


def test_a_record_that_is_gone(photo_config: Config) -> None:
    result = classify(photo_config)
    storage.remove(RunPaths(result.out, result.run_id).files)
    (detail,) = failures(result.out).values()
    assert "files.json" in detail
    assert failures(result.out).keys() == {"records"}
    assert verify(result.out).counts == {}


def test_what_was_damaged(photo_config: Config) -> None:
    result = classify(photo_config)
    path = file_of(result, "errors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"?")
    assert failures(result.out) == {"sha256": f"{path.relative_to(result.out)}: content differs from files.json"}
    path.unlink()
    assert failures(result.out) == {"sha256": f"{path.relative_to(result.out)}: missing"}
    path.write_bytes(content)
    assert verify(result.out).ok
    stray = path.with_name("part-00001.parquet")
    stray.write_bytes(content)
    assert failures(result.out) == {"listing": f"{stray}: not in files.json"}


def test_rows_that_are_there_twice_or_missing(photo_config: Config) -> None:
    result = classify(photo_config)
    rewrite(result, "errors", lambda table: pa.concat_tables([table.slice(1), table.slice(1, 1)]))
    assert failures(result.out) == {
        "distinct": "119 distinct row_ids",
        "missing": "1 planned rows without an outcome",
    }


def test_a_row_that_was_not_planned(photo_config: Config) -> None:
    result = classify(photo_config)
    rewrite(result, "errors", lambda table: replaced(table, "row_id", 5, 1005))
    assert failures(result.out) == {
        "missing": "1 planned rows without an outcome",
        "unknown": "1 rows that were not planned",
    }


def test_a_run_that_is_unfinished(photo_config: Config) -> None:
    paths = plan_run(photo_config, "cpu").paths
    for unit in range(3):
        storage.create_if_absent(paths.unit_file(unit), b"")
    (check,) = verify(str(photo_config.output.path)).checks
    assert not check.ok
    assert "3 of 8 units" in check.detail


def test_statuses_are_counted_in_the_files_and_held_against_the_record(photo_config: Config) -> None:
    result = classify(photo_config)
    assert verify(result.out).counts == {result.run_id: {"OK": 114, "TRUNCATED": 6}}
    rewrite(result, "errors", lambda table: replaced(table, "status", "TRUNCATED", "CORRUPT"))
    assert verify(result.out).counts == {result.run_id: {"CORRUPT": 6, "OK": 114}}
    assert failures(result.out) == {
        "statuses": "6 CORRUPT where files.json has 0, 0 TRUNCATED where files.json has 6",
    }


def test_counts_that_were_edited(photo_config: Config) -> None:
    result = classify(photo_config)
    record = RunPaths(result.out, result.run_id).files
    listed = storage.read_json(record)
    listed["counts"]["OK"] += 1
    storage.write_json(record, listed)
    assert failures(result.out) == {"statuses": "114 OK where files.json has 115"}


@pytest.fixture
def retried(photo_config: Config, photos: list[Path], tmp_path: Path) -> tuple[RunResult, RunResult]:
    """A run of two images, of which the second came late, and its retry."""
    late, manifest = tmp_path / "late.jpg", tmp_path / "late.parquet"
    pq.write_table(pa.table({"uri": [str(photos[1]), str(late)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest))
    root = classify(config)
    late.write_bytes(photos[2].read_bytes())
    child = retry(config, None)
    assert child is not None
    return root, child


def test_a_retry_of_a_row_that_had_not_failed(retried: tuple[RunResult, RunResult]) -> None:
    root, child = retried
    assert verify(root.out).counts == {root.run_id: {"NOT_FOUND": 1, "OK": 1}, child.run_id: {"OK": 1}}
    (planned,) = Path(RunPaths(child.out, child.run_id).rows).iterdir()
    pq.write_table(replaced(pq.read_table(planned), "row_id", 1, 0), planned)
    rewrite(child, "predictions", lambda table: replaced(table, "row_id", 1, 0))
    assert failures(root.out) == {"retry": f"1 rows that had not failed in {root.run_id}"}
