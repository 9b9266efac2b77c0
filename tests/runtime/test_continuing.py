"""The same command again, and commands after it with other settings: through the local engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import plan, rows, storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import UsageError
from imgbatch.runtime.job import classify
from imgbatch.runtime.local import LocalEngine
from tests.conftest import changed
from tests.runtime.conftest import files_of, rows_of


def test_the_same_command_again_does_nothing(photo_config: Config) -> None:
    first = classify(photo_config)
    before = files_of(photo_config)
    second = classify(photo_config)
    assert (first.already_finished, second.already_finished) == (False, True)
    assert (first.run_id, first.counts) == (second.run_id, second.counts)
    assert files_of(photo_config) == before


def test_a_new_run_stands_beside_the_finished_one(photo_config: Config) -> None:
    first = classify(photo_config)
    second = classify(changed(photo_config, run__new_run=True))
    assert second.run_id == f"{first.run_id}-2"
    assert rows_of(photo_config, "select count(*) from all_predictions") == [(228,)]
    assert rows_of(photo_config, "select count(*), min(run_id) from predictions") == [(114, second.run_id)]
    assert rows_of(photo_config, "select count(*) from errors") == [(6,)]


def commit_only(config: Config, units: list[int]) -> RunPaths:
    """Leave the run as a driver that died after these units would."""
    run = plan_run(config, "cpu")
    engine = LocalEngine(run)
    receipts = list(engine.classify_units(units, defer=False))
    engine.close()
    assert [receipt.outcome for receipt in receipts] == ["committed"] * len(units)
    return run.paths


def test_an_unfinished_run_is_continued(photo_config: Config) -> None:
    config = changed(photo_config, output__keep_units=True)
    paths = commit_only(config, [0, 5])
    before = [Path(paths.unit_file(unit)).read_bytes() for unit in (0, 5)]
    result = classify(changed(config, resources__classify_threads=1, errors__max_rate=0.5))
    assert result.run_id == paths.run_id
    record = storage.read_json(paths.run_json)
    assert record["sessions"][-1]["units"] == 6
    assert [Path(paths.unit_file(unit)).read_bytes() for unit in (0, 5)] == before
    assert verify(result.out).ok


def test_other_settings_do_not_continue_an_unfinished_run(photo_config: Config) -> None:
    paths = commit_only(photo_config, [0])
    with pytest.raises(UsageError, match=r"output\.top_k: 5 -> 2") as refused:
        classify(changed(photo_config, output__top_k=2))
    assert paths.run_id in str(refused.value)
    result = classify(changed(photo_config, output__top_k=2, run__on_unfinished="abandon"))
    assert result.run_id != paths.run_id
    assert verify(result.out).ok


def test_another_fingerprint_after_a_finished_run_is_a_run_beside_it(photo_config: Config) -> None:
    first = classify(photo_config)
    second = classify(changed(photo_config, preprocess__crop_size=24))
    assert first.run_id != second.run_id
    assert rows_of(photo_config, "select count(*) from runs") == [(2,)]


def test_rows_of_a_plan_that_was_never_finished_are_removed(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "UNITS_PER_FILE", 2)
    config = changed(photo_config, classify__unit_rows=8)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(plan, "refuse_duplicates", lambda _: sys.exit("killed"))
        with pytest.raises(SystemExit):
            plan_run(config, "cpu")
    run = plan_run(changed(config, classify__unit_rows=32), "cpu")
    found = [pq.read_table(info.uri) for info in storage.list_files(run.paths.rows)]
    assert sum(table.num_rows for table in found) == run.plan.layout.num_rows


def test_the_model_may_not_change_under_a_bundle_path(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle()
    config = changed(photo_config, model__path=bundle.path)
    run = plan_run(config, "cpu")
    assert run.plan.fields["model"] == bundle.model_id
    other = make_bundle(seed=1)
    assert other.path == bundle.path
    with pytest.raises(UsageError, match="not the weights that model"):
        LocalEngine(run)
    with pytest.raises(UsageError, match=f"model: {bundle.model_id} -> {other.model_id}"):
        classify(config)
    assert make_bundle().model_id == bundle.model_id
    assert classify(config).run_id == run.run_id
    assert rows_of(config, "select distinct model_id from predictions") == [(bundle.model_id,)]
