from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import compact as compact_module
from imgbatch.core import storage
from imgbatch.core.clean import remove_run
from imgbatch.core.compact import _write, compact
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import ErrorBudgetExceeded, ImgbatchError, UsageError
from imgbatch.runtime.job import classify
from tests.conftest import changed


def night(config: Config, path: Path, photos: list[Path], **flags: object) -> Config:
    pq.write_table(pa.table({"uri": [str(photo) for photo in photos]}), path)
    return changed(config, input__manifest=str(path), **flags)


def test_the_compacted_dataset_is_the_current_view(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    classify(
        night(
            photo_config,
            tmp_path / "1.parquet",
            photos[:30],
            output__partition_by=("bucket:2",),
        )
    )
    second = classify(night(photo_config, tmp_path / "2.parquet", photos[20:40]))
    result = compact(second.out, target_file_mb=128)
    assert not result.already_there
    assert len(result.files) == 1
    columns = "image_id, row_id, run_id, label, probability, top_k, probabilities, predicted_at, model_id"
    query = f"select {columns} from {{}} order by image_id"
    with open_views(second.out) as connection:
        expected = connection.sql(query.format("predictions")).to_arrow_table()
        found = connection.sql(query.format(f"read_parquet('{result.path}/*.parquet')")).to_arrow_table()
    assert found.equals(expected)
    assert result.num_rows == expected.num_rows == 38, "two of the first 40 photos are cut short"
    assert verify(second.out).ok


def test_compacting_again_does_nothing_until_another_run_has_finished(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    first = classify(night(photo_config, tmp_path / "1.parquet", photos[:5]))
    before = compact(first.out, target_file_mb=128)
    assert compact(first.out, target_file_mb=128).already_there
    classify(night(photo_config, tmp_path / "2.parquet", photos[6:8]))
    after = compact(first.out, target_file_mb=128)
    assert (after.num_rows, len(after.runs)) == (7, 2)
    assert not Path(before.path).exists()
    left = {path.name for path in Path(first.out, "compacted").iterdir()}
    assert left == {Path(after.path).name, "current.json"}


def test_one_address_always_names_the_dataset(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    for first in (0, 6):
        out = classify(night(photo_config, tmp_path / f"{first}.parquet", photos[first : first + 3])).out
        result = compact(out, target_file_mb=128)
        current = storage.read_json(storage.join(out, "compacted/current.json"))
        assert storage.join(out, current["path"]) == result.path
        assert current["runs"] == result.runs
        assert all(Path(out, file["path"]).is_file() for file in current["files"])


def test_a_run_that_was_cleaned_and_classified_anew_is_compacted_anew(store_run: Callable[..., Path]) -> None:
    """It has the id that it had."""
    probs_NK = np.array([[0.75, 0.25]], np.float32)
    out = str(store_run(("cat", "dog"), probs_NK))
    compact(out, target_file_mb=128)
    remove_run(out, "r000000000001")
    store_run(("cat", "dog"), 1 - probs_NK, predicted_at="2026-01-03T03:04:05.000000+00:00")
    (file,) = compact(out, target_file_mb=128).files
    assert pq.read_table(Path(out, file["path"]), partitioning=None)["label"].to_pylist() == ["dog"]


def test_a_run_without_a_prediction_any_more_is_compacted_anew(store_run: Callable[..., Path]) -> None:
    probs_NK = np.array([[0.75, 0.25]], np.float32)
    out = str(store_run(("cat", "dog"), probs_NK))
    compact(out, target_file_mb=128)
    remove_run(out, "r000000000001")
    failed = {"image_id": ["image-0"], "status": ["NOT_FOUND"]}
    store_run(("cat", "dog"), probs_NK[:0], failed=failed, predicted_at="2026-01-03T03:04:05.000000+00:00")
    result = compact(out, target_file_mb=128)
    assert (result.already_there, result.num_rows) == (False, 0)
    assert {path.name for path in Path(result.path).iterdir()} == {Path(file["path"]).name for file in result.files}
    assert [pq.read_table(Path(out, file["path"])).num_rows for file in result.files] == [0]


def test_a_partitioned_run_without_a_prediction_any_more_is_compacted_anew(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """It has no file of predictions at all."""
    moved = tmp_path / "moved.jpg"
    moved.write_bytes(photos[0].read_bytes())
    config = night(photo_config, tmp_path / "1.parquet", [moved], output__partition_by=("bucket:2",))
    first = classify(config)
    assert compact(first.out, target_file_mb=128).num_rows == 1
    remove_run(first.out, first.run_id)
    moved.unlink()
    with pytest.raises(ErrorBudgetExceeded, match="not one prediction"):
        classify(config)
    assert compact(first.out, target_file_mb=128).num_rows == 0


def test_a_moved_output_is_known_by_what_lies_in_it(store_run: Callable[..., Path], tmp_path: Path) -> None:
    out = store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32))
    before = compact(str(out), target_file_mb=128)
    moved = out.rename(tmp_path / "moved")
    after = compact(str(moved), target_file_mb=128)
    assert after.already_there
    assert Path(after.path).parent == moved / "compacted"
    assert after.files == before.files
    assert [(moved / file["path"]).stat().st_size for file in after.files] == [file["bytes"] for file in after.files]


def test_a_record_of_a_former_version_is_made_anew(store_run: Callable[..., Path]) -> None:
    """It held absolute paths, which may be those of another place, and had the dataset's name."""
    out = str(store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32)))
    result = compact(out, target_file_mb=128)
    storage.remove(storage.join(out, "compacted/current.json"))
    storage.write_json(f"{result.path}.json", asdict(result))
    assert not compact(out, target_file_mb=128).already_there
    assert compact(out, target_file_mb=128).already_there
    assert not Path(f"{result.path}.json").exists()


def test_two_commands_at_once_do_not_compact_one_output(store_run: Callable[..., Path]) -> None:
    out = store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32))
    half_written = out / "compacted/c000000000000/part-00000.parquet"
    storage.replace(str(half_written), b"of the other")
    sign = str(out / "compacted/heartbeat.json")
    storage.write_json(sign, {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()})
    with pytest.raises(UsageError, match=r"/compacted: another driver works on it"):
        compact(str(out), target_file_mb=128)
    assert half_written.exists()
    storage.remove(sign)
    result = compact(str(out), target_file_mb=128)
    assert {path.name for path in (out / "compacted").iterdir()} == {Path(result.path).name, "current.json"}


def test_files_that_another_command_removes_meanwhile_are_missed(
    store_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that stood still for a minute does."""
    out = str(store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32)))

    def write_and_lose(reader: pa.RecordBatchReader, directory: str, *arguments: Any) -> Iterator[dict[str, Any]]:
        yield from _write(reader, directory, *arguments)
        storage.remove(directory)

    with monkeypatch.context() as patched:
        patched.setattr(compact_module, "_write", write_and_lose)
        with pytest.raises(ImgbatchError, match="removed or added meanwhile; run the same command again"):
            compact(out, target_file_mb=128)
    assert not Path(out, "compacted/current.json").exists()
    assert not compact(out, target_file_mb=128).already_there


@pytest.mark.parametrize("harm", ["removed", "cut short", "another beside it"])
def test_a_dataset_that_is_not_whole_any_more_is_made_anew(store_run: Callable[..., Path], harm: str) -> None:
    out = str(store_run(("cat", "dog"), np.array([[0.75, 0.25]], np.float32)))
    before = compact(out, target_file_mb=128)
    part = Path(out, before.files[0]["path"])
    if harm == "another beside it":
        part.with_name("part-00001.parquet").write_bytes(part.read_bytes())
    else:
        storage.remove(str(part))
        if harm == "cut short":
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(b"PAR1")
    after = compact(out, target_file_mb=128)
    assert not after.already_there
    assert after.files == before.files
    assert [path.name for path in Path(after.path).iterdir()] == [part.name]
    assert compact(out, target_file_mb=128).already_there


def test_files_are_cut_at_the_target_size(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).random((4, 500))
    schema = pa.schema([("number", pa.float64())])
    batches = [pa.record_batch([pa.array(row)], schema=schema) for row in numbers]
    files = list(_write(pa.RecordBatchReader.from_batches(schema, batches), str(tmp_path), 7_000))
    assert [file["rows"] for file in files] == [1000, 1000]
    read = [pq.read_table(tmp_path / file["path"])["number"].to_numpy() for file in files]
    np.testing.assert_array_equal(np.concatenate(read), numbers.ravel())


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        compact(str(tmp_path), target_file_mb=128)
    assert not list(tmp_path.iterdir())
