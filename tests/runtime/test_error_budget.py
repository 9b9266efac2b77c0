"""Runs of which too much fails, through the local engine."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, StorageConfig
from imgbatch.core import storage
from imgbatch.core.failpoints import FailpointHit, parse_failpoints
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import ErrorBudgetExceeded, UsageError
from imgbatch.runtime.job import classify
from imgbatch.runtime.run_log import RunLog
from imgbatch.schema import WINDOW_TYPE
from tests.conftest import changed
from tests.runtime.conftest import UNREADABLE, rows_of


@pytest.mark.parametrize("partition_by", [(), ("bucket:4",)])
def test_a_run_without_one_prediction_fails(
    partition_by: tuple[str, ...], photo_config: Config, tmp_path: Path
) -> None:
    manifest = tmp_path / "nothing.parquet"
    text = tmp_path / "text.jpg"
    text.write_text("<html>not here</html>")
    pq.write_table(pa.table({"uri": [str(text)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), output__partition_by=partition_by)
    for _ in range(2):
        with pytest.raises(ErrorBudgetExceeded, match="1 NOT_AN_IMAGE"):
            classify(config)
    assert rows_of(config, "select status from errors") == [("NOT_AN_IMAGE",)]
    assert rows_of(config, "select count(label) from predictions") == [(0,)]


def test_the_sample_stops_a_run_whose_images_are_nowhere(photo_config: Config, tmp_path: Path) -> None:
    manifest = tmp_path / "gone.parquet"
    pq.write_table(pa.table({"uri": [str(tmp_path / f"gone{index}.jpg") for index in range(100)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), errors__max_rate=0.05)
    with pytest.raises(ErrorBudgetExceeded, match="none of 16 sampled images could be fetched"):
        classify(config)


def test_a_profile_that_is_not_there_stops_even_a_run_that_bears_all_errors(
    photo_config: Config, tmp_path: Path
) -> None:
    manifest = tmp_path / "objects.parquet"
    pq.write_table(pa.table({"uri": [f"s3://images/{index}.jpg" for index in range(100)]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), storage__profile="nights")
    assert config.errors.max_rate == 1
    try:
        with pytest.raises(UsageError, match=r"storage\.profile: .*nights"):
            classify(config)
    finally:
        storage.configure(StorageConfig())


def test_the_sample_stops_a_run_whose_scenes_are_nowhere(photo_config: Config, s3_bucket: str, tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    manifest = tmp_path / "gone.parquet"
    windows = [{"col_off": 32 * index, "row_off": 0, "width": 32, "height": 32} for index in range(100)]
    columns = {
        "uri": [f"{s3_bucket}/gone.tif"] * len(windows),
        "window": pa.array(windows, WINDOW_TYPE),
    }
    pq.write_table(pa.table(columns), manifest)
    config = changed(photo_config, input__manifest=str(manifest), errors__max_rate=0.05)
    with pytest.raises(ErrorBudgetExceeded, match="none of 16 sampled images could be fetched, 16 of them NOT_FOUND"):
        classify(config)


def test_the_error_budget_stops_a_run_and_keeps_what_it_has(photo_config: Config) -> None:
    config = changed(photo_config, errors__max_rate=0.01, errors__min_rows=10)
    with pytest.raises(ErrorBudgetExceeded, match=r"failed, more than errors\.max_rate 0\.01: \d+ TRUNCATED"):
        classify(config)
    assert storage.read_json(RunPaths(str(config.output.path), plan_run(config, "cpu").run_id).run_json)["state"] == (
        "error_budget"
    )
    result = classify(photo_config)
    assert verify(result.out).ok


@pytest.mark.parametrize("again", [False, True])
def test_units_that_are_tried_again_are_judged_once(
    photo_config: Config, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Those that failed come together in the passes after the first, where they alone would look like an outage."""
    good, unreadable = str(photos[1]), UNREADABLE
    uris = [uri for _ in range(5) for uri in [*([good] * 16), unreadable, unreadable, *([good] * 14)]]
    image_ids = [str(index) for index in range(len(uris))]
    pq.write_table(pa.table({"uri": uris, "image_id": image_ids}), tmp_path / "mixed.parquet")
    config = changed(
        photo_config,
        input__manifest=str(tmp_path / "mixed.parquet"),
        fetch__retries=0,
        errors__max_rate=0.07,
        errors__min_rows=64,
    )
    if again:
        with monkeypatch.context() as patched:
            patched.setattr("imgbatch.runtime.passes.failpoint", parse_failpoints("job.before_pass=raise@2"))
            with pytest.raises(FailpointHit):
                classify(config)
    result = classify(config)
    assert result.counts == {"FETCH_FAILED": 10, "OK": 150}


def test_a_store_that_is_away_does_not_hide_why_a_run_ended(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise PermissionError("the credentials have expired")

    config = changed(photo_config, errors__max_rate=0.0, errors__min_rows=16)
    plan_run(config, "cpu")
    monkeypatch.setattr(storage, "check_writable", lambda _: None)
    monkeypatch.setattr(RunLog, "write", away)
    monkeypatch.setattr(storage, "remove", away)
    with pytest.raises(ErrorBudgetExceeded):
        classify(config)
