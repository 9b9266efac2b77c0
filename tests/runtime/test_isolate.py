from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.plan import plan_run
from imgbatch.errors import UsageError
from imgbatch.runtime.isolate import classify_isolated
from tests.conftest import changed


def test_every_row_of_an_isolated_unit_has_an_outcome(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    receipt = classify_isolated(run, 0)
    assert receipt.isolated
    assert receipt.outcome == "committed"
    table = pq.read_table(run.paths.unit_file(0))
    assert table["row_id"].to_pylist() == list(range(16))
    assert receipt.counts == {"OK": 15, "TRUNCATED": 1}


def test_why_a_model_does_not_load_is_told_as_it_is(photo_config: Config, damaged_model: str) -> None:
    run = plan_run(changed(photo_config, model__path=damaged_model), "cpu")
    with pytest.raises(UsageError, match=r"model\.safetensors: not the weights that model\.json describes"):
        classify_isolated(run, 0)


def test_a_row_that_the_process_dies_of_in_isolation_is_the_only_one_it_costs(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan_run(photo_config, "cpu")
    monkeypatch.setenv(VARIABLE, "classify.unit[17]=kill")
    receipt = classify_isolated(run, 1)
    assert receipt.outcome == "committed"
    table = pq.read_table(run.paths.unit_file(1))
    statuses = dict(zip(table["row_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert statuses == dict.fromkeys(range(16, 32), "OK") | {17: "CLASSIFY_FAILED", 25: "TRUNCATED"}
    assert "the process died in the forward pass" in table["error_message"].to_pylist()
