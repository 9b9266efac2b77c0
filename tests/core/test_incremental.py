from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import current, storage
from imgbatch.core.clean import remove_run
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.model import ModelBundle
from imgbatch.core.plan import plan_run
from imgbatch.core.rows import RowsReader
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import ErrorBudgetExceeded, NothingToDo, UsageError
from imgbatch.runtime.job import classify
from tests.conftest import changed


def write_manifest(path: Path, photos: list[Path], **columns: list[str | None]) -> str:
    pq.write_table(pa.table({"uri": [str(photo) for photo in photos], **columns}), path)
    return str(path)


def planned_row_ids(config: Config) -> list[int]:
    run = plan_run(config, "cpu")
    reader = RowsReader(run.paths)
    row_ids = [row_id for unit in run.plan.layout for row_id in reader.read(unit)["row_id"].to_pylist()]
    reader.close()
    return row_ids


def test_only_what_the_model_has_not_labelled_is_classified(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """Photo 5 and 25 of the first night were cut short: the second night takes the new ones, and tries these again, as
    without an etag they may have been replaced."""
    first = changed(photo_config, input__manifest=write_manifest(tmp_path / "1.parquet", photos[:40]))
    classify(first)
    # The new night's listing has the new photos in front, so that positions mean something else.
    grown = write_manifest(tmp_path / "2.parquet", [*photos[40:50], *photos[:40]])
    second = changed(photo_config, input__manifest=grown, input__skip_existing=True)
    assert planned_row_ids(second) == [*range(10), 15, 35]
    result = classify(second)
    assert result.num_rows == 12
    assert verify(result.out).ok
    assert classify(second).already_finished
    with open_views(result.out) as connection:
        labelled = connection.sql("select count(*), count(distinct image_id) from predictions").fetchall()
    assert labelled == [(47, 47)], "one current row per image: 50 photos, three of them cut short"


def test_nothing_is_left_to_label(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    whole = [photo for index, photo in enumerate(photos[:30]) if index % 20 != 5]
    classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "1.parquet", whole)))
    fewer = write_manifest(tmp_path / "2.parquet", whole[:20])
    with pytest.raises(NothingToDo, match=r"all 20 rows"):
        classify(changed(photo_config, input__manifest=fewer, input__skip_existing=True))


def test_a_broken_image_is_tried_again_only_when_it_was_replaced(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """Photo 5 is cut short; the seventh image is not there yet, which is no reason to give it up."""
    listed = [*photos[:6], tmp_path / "late.jpg"]
    first = write_manifest(tmp_path / "1.parquet", listed, etag=[*"abcdefg"])
    assert classify(changed(photo_config, input__manifest=first)).counts == {"OK": 5, "TRUNCATED": 1, "NOT_FOUND": 1}
    incremental = changed(photo_config, input__skip_existing=True, run__on_unfinished="abandon")

    def planned(name: str, *etags: str | None) -> list[int]:
        later = write_manifest(tmp_path / name, [*photos[:6], tmp_path / "late.jpg", photos[6]], etag=[*etags])
        return planned_row_ids(changed(incremental, input__manifest=later))

    assert planned("same.parquet", *"abcdefgh") == [6, 7]
    assert planned("replaced.parquet", *"abcdeFgh") == [5, 6, 7]
    assert planned("unknown.parquet", *"abcde", None, "g", "h") == [5, 6, 7]
    broken = write_manifest(tmp_path / "broken.parquet", photos[:6], etag=[*"abcdef"])
    with pytest.raises(NothingToDo, match=r"all 6 rows"):
        classify(changed(incremental, input__manifest=broken))


def test_what_the_machine_had_no_time_for_is_tried_again(
    photo_config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest names the same image: another machine may be through with it in time."""
    listed = write_manifest(tmp_path / "1.parquet", [photos[0], photos[1]], etag=["a", "b"])
    monkeypatch.setenv(VARIABLE, "decode.row[1]=hang")
    first = changed(photo_config, input__manifest=listed, decode__timeout_s=1.0)
    assert classify(first).counts == {"OK": 1, "TIMEOUT": 1}
    monkeypatch.delenv(VARIABLE)
    later = write_manifest(tmp_path / "2.parquet", [*photos[:3]], etag=["a", "b", "c"])
    assert planned_row_ids(changed(first, input__manifest=later, input__skip_existing=True)) == [1, 2]


def test_what_was_too_large_is_tried_again_under_other_limits(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """Under the same ones it would fail every night."""
    config = changed(photo_config, decode__max_pixels=100, run__on_unfinished="abandon")
    first = write_manifest(tmp_path / "1.parquet", photos[:2], etag=["a", "b"])
    with pytest.raises(ErrorBudgetExceeded, match="2 TOO_LARGE"):
        classify(changed(config, input__manifest=first))
    later = write_manifest(tmp_path / "2.parquet", photos[:3], etag=["a", "b", "c"])
    again = changed(config, input__manifest=later, input__skip_existing=True)
    assert planned_row_ids(again) == [2]
    assert planned_row_ids(changed(again, decode__max_pixels=10_000)) == [0, 1, 2]
    assert planned_row_ids(changed(again, fetch__max_bytes=10_000_000)) == [0, 1, 2]


def test_a_run_that_is_not_written_down_counts(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    """As after a kill between _SUCCESS and current.json, which looking at it does not change."""
    out = classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "1.parquet", photos[:4]))).out
    storage.remove(current.location(out))
    later = write_manifest(tmp_path / "2.parquet", photos[1:5])
    assert planned_row_ids(changed(photo_config, input__manifest=later, input__skip_existing=True)) == [3]
    assert not storage.exists(current.location(out))


@pytest.mark.parametrize("by_since_run", [False, True])
def test_what_a_removed_run_had_labelled_is_classified_by_the_same_command(
    photo_config: Config, photos: list[Path], tmp_path: Path, by_since_run: bool
) -> None:
    """What failed in the finished run is for a retry, and makes the same command no work."""
    base = classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "0.parquet", photos[30:31])))
    first = classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "1.parquet", photos[:4])))
    listed = write_manifest(tmp_path / "2.parquet", [*photos[:8], tmp_path / "late.jpg"])
    flags = {"input__since_run": base.run_id} if by_since_run else {"input__skip_existing": True}
    second = changed(photo_config, input__manifest=listed, **flags)
    assert classify(second).counts == {"OK": 3, "TRUNCATED": 1, "NOT_FOUND": 1}
    assert classify(second).already_finished
    remove_run(first.out, first.run_id)
    again = classify(second)
    assert (again.already_finished, again.counts["OK"]) == (False, 4)
    assert classify(second).already_finished
    assert verify(again.out).ok
    with open_views(again.out) as connection:
        assert connection.sql("select count(*) from predictions").fetchall() == [(8,)]


def test_what_failed_in_a_run_without_one_label_is_known_too(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """Partitioned: that run has no file of predictions."""
    partitioned = changed(photo_config, output__partition_by=["bucket:2"])
    with pytest.raises(ErrorBudgetExceeded, match="not one prediction"):
        classify(changed(partitioned, input__manifest=write_manifest(tmp_path / "1.parquet", [photos[5]], etag=["a"])))
    later = write_manifest(tmp_path / "2.parquet", photos[5:7], etag=["a", "b"])
    assert planned_row_ids(changed(partitioned, input__manifest=later, input__skip_existing=True)) == [1]


def test_another_model_or_another_content_is_labelled_anew(
    photo_config: Config, photos: list[Path], tmp_path: Path, make_bundle: Callable[..., ModelBundle]
) -> None:
    kept = photos[:4]
    first = write_manifest(tmp_path / "1.parquet", kept, etag=["a", "b", None, "d"])
    classify(changed(photo_config, input__manifest=first))
    later = write_manifest(tmp_path / "2.parquet", kept, etag=["a", "B", "c", None])
    incremental = changed(photo_config, input__manifest=later, input__skip_existing=True)
    other_model = changed(incremental, model__path=make_bundle(seed=1).path, output__path=photo_config.output.path)
    assert planned_row_ids(changed(other_model, run__on_unfinished="abandon")) == [0, 1, 2, 3]
    assert planned_row_ids(changed(incremental, run__on_unfinished="abandon")) == [1], "only where both etags differ"


def test_labels_before_the_named_run_do_not_count(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "1.parquet", photos[:4])))
    second = classify(changed(photo_config, input__manifest=write_manifest(tmp_path / "2.parquet", photos[2:5])))
    everything = write_manifest(tmp_path / "3.parquet", photos[:5])
    with pytest.raises(UsageError, match="no such run"):
        plan_run(changed(photo_config, input__manifest=everything, input__since_run="r000000000000"), "cpu")
    since = changed(photo_config, input__manifest=everything, input__since_run=second.run_id)
    assert planned_row_ids(since) == [0, 1]


def test_embedded_images_keep_their_row_groups(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    whole = [photo for index, photo in enumerate(photos[:30]) if index % 20 != 5]

    def embedded(name: str, chosen: list[Path]) -> str:
        table = pa.table({"bytes": [p.read_bytes() for p in chosen], "image_id": [p.name for p in chosen]})
        pq.write_table(table, tmp_path / name, row_group_size=7)
        return str(tmp_path / name)

    classify(changed(photo_config, input__manifest=embedded("1.parquet", [*whole[:2], *whole[7:14]])))
    second = changed(photo_config, input__manifest=embedded("2.parquet", whole[:20]), input__skip_existing=True)
    assert plan_run(second, "cpu").plan.layout.segments == (5, 6), "the second row group has nothing left"
    result = classify(second)
    assert result.counts == {"OK": 11}
    assert verify(result.out).ok
