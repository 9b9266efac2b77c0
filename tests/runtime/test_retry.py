from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, load_config
from imgbatch.core import current, storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import Interrupted, UsageError
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import RunResult, classify, retry
from tests.conftest import changed
from tests.runtime.conftest import UNREADABLE, rows_of


def broken_manifest(photos: list[Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    """30 photos, 10 of which are not there yet."""
    late = [tmp_path / f"late{index}.jpg" for index in range(10)]
    manifest = tmp_path / "broken.parquet"
    pq.write_table(pa.table({"uri": [str(path) for path in [*photos[6:26], *late]]}), manifest)
    return manifest, late


def test_retry_classifies_what_failed_into_a_child_run(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    assert first.counts["NOT_FOUND"] == 10
    for path in late[:8]:
        path.write_bytes(photos[1].read_bytes())
    child = retry(config, None)
    assert isinstance(child, RunResult)
    assert child.counts["OK"] == 8
    assert rows_of(config, "select count(*), count(distinct row_id) from predictions") == [(27, 27)]
    assert rows_of(config, "select status, row_id from errors where status = 'NOT_FOUND' order by 2") == [
        ("NOT_FOUND", 28),
        ("NOT_FOUND", 29),
    ]
    late[8].write_bytes(photos[1].read_bytes())
    late[9].write_bytes(photos[1].read_bytes())
    again = retry(config, None)
    assert isinstance(again, RunResult)
    assert again.counts["OK"] == 2
    result = verify(first.out)
    assert result.ok
    assert set(result.counts) == {first.run_id, child.run_id, again.run_id}


@pytest.mark.parametrize("written", [".", "./out", "file://{path}"])
def test_a_retry_keeps_its_files_however_the_directory_is_written(
    photo_config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    first = classify(changed(photo_config, input__manifest=str(manifest)))
    late[0].write_bytes(photos[1].read_bytes())
    monkeypatch.chdir(first.out if written == "." else tmp_path)
    flags = {"output.path": written.format(path=first.out), "classify.engine": "local"}
    child = retry(load_config(flags=flags), None)
    assert isinstance(child, RunResult)
    assert (child.out, child.counts["OK"]) == (first.out, 1)
    assert list(Path(first.out, "predictions").glob(f"run_id={child.run_id}/*.parquet"))
    assert verify(first.out).ok


def test_a_retry_may_give_decoding_more_time(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    missing = str(tmp_path / "late.jpg")
    pq.write_table(pa.table({"uri": [str(photos[1]), str(photos[2]), missing]}), tmp_path / "m.parquet")
    config = changed(photo_config, input__manifest=str(tmp_path / "m.parquet"), decode__memory_mb=1024)
    first = classify(config)
    Path(missing).write_bytes(photos[1].read_bytes())
    flags = {"output.path": first.out, "classify.engine": "local", "decode.timeout_s": 120.0}
    child = retry(load_config(flags=flags), first.run_id)
    assert isinstance(child, RunResult)
    fields = storage.read_json(RunPaths(child.out, child.run_id).plan)["fields"]
    assert (fields["decode.timeout_s"], fields["decode.memory_mb"]) == (120, 1024)


def test_a_retry_is_of_the_same_model_wherever_it_is_asked_for(
    photo_config: Config,
    photos: list[Path],
    tmp_path: Path,
    make_bundle: Callable[..., ModelBundle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    bundle = make_bundle()
    monkeypatch.chdir(tmp_path)
    first = classify(changed(photo_config, input__manifest=manifest.name, model__path=Path(bundle.path).name))
    late[0].write_bytes(photos[1].read_bytes())
    monkeypatch.chdir("/")
    flags = {"output.path": first.out, "classify.engine": "local"}
    child = retry(load_config(flags=flags), None)
    assert isinstance(child, RunResult)
    assert child.counts["OK"] == 1
    late[1].write_bytes(photos[1].read_bytes())
    description = Path(bundle.path, "model.json")
    kept = description.read_text()
    other = make_bundle("other", class_names=("a", "b", "c"))
    description.write_text(Path(other.path, "model.json").read_text())
    Path(bundle.path, "model.safetensors").write_bytes(Path(other.path, "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=f"not the one of run {first.run_id}"):
        retry(load_config(flags=flags), None)
    assert kept != description.read_text()


def test_a_run_that_current_json_lacks_is_found_and_retried(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """As after a kill between _SUCCESS and current.json."""
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    storage.remove(current.location(first.out))
    (failed,) = (check for check in verify(first.out).checks if not check.ok)
    assert (failed.run_id, failed.name) == (first.run_id, "current")
    late[0].write_bytes(photos[1].read_bytes())
    child = retry(config, None)
    assert isinstance(child, RunResult)
    assert (child.num_rows, child.counts["OK"]) == (first.num_errors, 1)
    assert verify(first.out).ok


def test_rows_that_fail_again_end_the_retry_all_the_same(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """However few errors are allowed: for want of the images, then for want of whoever lets them be read."""
    manifest = tmp_path / "broken.parquet"
    uris = [*(str(photo) for photo in photos[6:9]), str(tmp_path / "late.jpg"), UNREADABLE]
    pq.write_table(pa.table({"uri": uris, "image_id": [*"abcde"]}), manifest)
    first = classify(changed(photo_config, input__manifest=str(manifest)))
    config = load_config(
        flags={
            "output.path": first.out,
            "classify.engine": "local",
            "errors.max_rate": 0.0,
            "errors.min_rows": 1,
            "fetch.retries": 0,
        }
    )
    again = [retry(config, None) for _ in range(2)]
    assert [child and child.counts for child in again] == [{"FETCH_FAILED": 1, "NOT_FOUND": 1}] * 2
    assert len({child.run_id for child in again if child}) == 2
    assert verify(first.out).ok


def test_a_retry_that_is_unfinished_is_no_fault_of_the_run(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    manifest, late = broken_manifest(photos, tmp_path)
    config = changed(photo_config, input__manifest=str(manifest))
    first = classify(config)
    late[0].write_bytes(photos[1].read_bytes())
    stop = StopSwitch()
    stop.is_on = True
    with pytest.raises(Interrupted):
        retry(config, None, stop=stop)
    result = verify(first.out)
    assert result.ok
    (child,) = (check for check in result.checks if "unfinished: 0 of 1 units" in check.detail)
    assert not verify(first.out, child.run_id).ok
    finished = retry(config, None)
    assert finished is not None
    assert (finished.run_id, finished.counts["OK"]) == (child.run_id, 1)


def test_nothing_to_retry(photo_config: Config) -> None:
    classify(changed(photo_config, input__limit=4))
    assert retry(photo_config, None) is None
