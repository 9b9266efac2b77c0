from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.plan import Run, plan_run
from imgbatch.errors import ImgbatchError, UsageError
from imgbatch.runtime import isolate
from imgbatch.runtime.isolate import classify_isolated
from tests.conftest import changed
from tests.runtime import failing_stages
from tests.runtime.conftest import UNREADABLE


def test_every_row_of_an_isolated_unit_has_an_outcome(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    receipt = classify_isolated(run, 0, defer=False)
    assert receipt.isolated
    assert receipt.outcome == "committed"
    table = pq.read_table(run.paths.unit_file(0))
    assert table["row_id"].to_pylist() == list(range(16))
    assert receipt.counts == {"OK": 15, "TRUNCATED": 1}


def test_what_failed_for_reasons_that_may_pass_is_left_to_be_tried_again(photo_config: Config, tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [UNREADABLE], "image_id": ["a"]}), tmp_path / "away.parquet")
    config = changed(photo_config, input__manifest=str(tmp_path / "away.parquet"), errors__max_rate=0.5)
    run = plan_run(changed(config, fetch__retries=0), "cpu")
    assert classify_isolated(run, 0, defer=True).outcome == "deferred"
    assert not Path(run.paths.unit_file(0)).exists()
    assert classify_isolated(run, 0, defer=False).outcome == "committed"


def test_why_a_model_does_not_load_is_told_as_it_is(photo_config: Config, damaged_model: str) -> None:
    run = plan_run(changed(photo_config, model__path=damaged_model), "cpu")
    with pytest.raises(UsageError, match=r"model\.safetensors: not the weights that model\.json describes"):
        classify_isolated(run, 0, defer=False)


def test_a_row_that_the_process_dies_of_in_isolation_is_the_only_one_it_costs(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan_run(photo_config, "cpu")
    monkeypatch.setenv(VARIABLE, "classify.unit[17]=kill")
    receipt = classify_isolated(run, 1, defer=False)
    assert receipt.outcome == "committed"
    table = pq.read_table(run.paths.unit_file(1))
    statuses = dict(zip(table["row_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert statuses == dict.fromkeys(range(16, 32), "OK") | {17: "CLASSIFY_FAILED", 25: "TRUNCATED"}
    assert "the process died in the forward pass" in table["error_message"].to_pylist()


@pytest.fixture(name="small_run")
def plan_small_units(photo_config: Config) -> Run:
    return plan_run(changed(photo_config, classify__unit_rows=4), "cpu")


def test_a_row_that_a_device_failed_at_once_is_tried_again(
    small_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolate, "ClassifyStage", failing_stages.FailsOnce)
    monkeypatch.setenv(failing_stages.ONCE_VARIABLE, str(tmp_path / "failed"))
    receipt = classify_isolated(small_run, 0, defer=False)
    assert (tmp_path / "failed").exists()
    assert receipt.counts == {"OK": 4}


def test_a_row_whose_process_is_not_to_be_trusted_after_it_costs_no_other(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate, "ClassifyStage", failing_stages.IsPoisoned)
    receipt = classify_isolated(small_run, 0, defer=False)
    assert receipt.counts == {"OK": 3, "CLASSIFY_FAILED": 1}
    row = pq.read_table(small_run.paths.unit_file(0)).to_pylist()[failing_stages.FAILING_ROW]
    assert (row["status"], row["error_message"], row["attempts"]) == ("CLASSIFY_FAILED", "hurts", 2)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        (failing_stages.IsBroken, r"^model .*: in a fresh process on cpu of .* blank image gets .*, in row -1"),
        (failing_stages.IsTooSmall, r"^the memory of Tesla T4 is too little for row -1$"),
    ],
)
def test_a_device_that_fails_whatever_the_image_becomes_no_rows(
    small_run: Run, monkeypatch: pytest.MonkeyPatch, stage: type, told: str
) -> None:
    monkeypatch.setattr(isolate, "ClassifyStage", stage)
    with pytest.raises(ImgbatchError, match=told):
        classify_isolated(small_run, 0, defer=False)
    assert not Path(small_run.paths.unit_file(0)).exists()
