from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.results import LabelRules, commit_unit, prediction_columns, unit_table
from imgbatch.core.runs import RunPaths
from imgbatch.errors import CannotWrite, Stage, Status, row_error
from imgbatch.runtime.job import classify
from imgbatch.schema import UNIT_SCHEMA
from tests.conftest import changed

CLASSES = ("a", "b", "c")
PROBS = np.array([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], np.float32)


def rules(**changes: object) -> LabelRules:
    values = {"class_names": CLASSES, "task": "multiclass", "probabilities": "all", "top_k": 2} | changes
    return LabelRules(**values)  # type: ignore[arg-type]


def test_multiclass_columns() -> None:
    columns = prediction_columns(PROBS, rules())
    assert columns["label"].to_pylist() == ["b", "a"]
    assert columns["label_index"].to_pylist() == [1, 0]
    assert columns["probability"].to_pylist() == pytest.approx([0.7, 0.5])
    assert columns["margin"].to_pylist() == pytest.approx([0.5, 0.25])
    assert [[entry["label"] for entry in row] for row in columns["top_k"].to_pylist()] == [["b", "a"], ["a", "b"]]
    assert columns["probabilities"].to_pylist()[0] == pytest.approx([0.2, 0.7, 0.1])
    assert columns["labels"].null_count == columns["decision"].null_count == 2


def test_multilabel_columns_follow_the_thresholds() -> None:
    columns = prediction_columns(PROBS, rules(task="multilabel", thresholds={"labels": {"c": 0.2}}))
    assert columns["labels"].to_pylist() == [["b"], ["a", "c"]]
    assert columns["margin"].null_count == 2
    assert columns["label"].to_pylist() == ["b", "a"]


def test_decision_follows_the_accept_thresholds() -> None:
    columns = prediction_columns(PROBS, rules(thresholds={"accept": {"b": 0.6, "c": 0.1}}))
    assert columns["decision"].to_pylist() == ["accept", "review"]  # a class without a threshold is reviewed


@pytest.mark.parametrize(("mode", "listed", "kept"), [("all", 2, 3), ("top_k", 2, None), ("none", None, None)])
def test_what_is_kept_of_the_probabilities(mode: str, listed: int | None, kept: int | None) -> None:
    columns = prediction_columns(PROBS, rules(probabilities=mode))
    top_k, probabilities = columns["top_k"].to_pylist()[0], columns["probabilities"].to_pylist()[0]
    assert (top_k and len(top_k)) == listed
    assert (probabilities and len(probabilities)) == kept


def test_many_classes_with_ties_agree_with_argmax() -> None:
    rng = np.random.default_rng(0)
    probs = rng.integers(0, 4, (200, 1000)).astype(np.float32)
    names = tuple(f"c{index}" for index in range(1000))
    columns = prediction_columns(probs, rules(class_names=names, probabilities="top_k", top_k=5))
    assert columns["label_index"].to_pylist() == probs.argmax(axis=1).tolist()
    listed = [[entry["probability"] for entry in row] for row in columns["top_k"].to_pylist()]
    assert np.array_equal(listed, -np.sort(-probs, axis=1)[:, :5])
    assert all(len({entry["label"] for entry in row}) == 5 for row in columns["top_k"].to_pylist())


@pytest.mark.parametrize("mode", ["all", "top_k", "none"])
def test_no_rows_give_no_columns_with_content(mode: str) -> None:
    columns = prediction_columns(np.zeros((0, 3), np.float32), rules(probabilities=mode))
    assert {len(column) for column in columns.values()} == {0}


def mixed_unit() -> pa.Table:
    error = row_error(Status.TRUNCATED, Stage.DECODE, "cut short")
    errors = [None, error, None]
    widths = np.array([4, 0, 6], np.int32)
    return unit_table(pa.array([7, 8, 9]), errors, widths, widths, prediction_columns(PROBS, rules()))


def test_a_unit_keeps_the_order_of_its_rows() -> None:
    rows = mixed_unit().to_pylist()
    assert [row["status"] for row in rows] == ["OK", "TRUNCATED", "OK"]
    assert [row["label"] for row in rows] == ["b", None, "a"]
    assert [row["width"] for row in rows] == [4, None, 6]
    assert (rows[1]["error_stage"], rows[1]["error_message"], rows[1]["attempts"]) == ("decode", "cut short", 1)


def test_the_first_writer_of_a_unit_wins(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    table = mixed_unit()
    row_ids = pa.array([7, 8, 9])
    first = commit_unit(paths, 3, row_ids, table, defer_above=None)
    content = Path(paths.unit_file(3)).read_bytes()
    second = commit_unit(paths, 3, row_ids, table, defer_above=None)
    assert (first.outcome, second.outcome) == ("committed", "existed")
    assert first.counts == {"OK": 2, "TRUNCATED": 1}
    assert first.examples == {"TRUNCATED": "cut short"}
    assert Path(paths.unit_file(3)).read_bytes() == content
    assert pq.read_table(paths.unit_file(3)).schema.equals(UNIT_SCHEMA)
    assert paths.committed_units(10) == {3}


def test_a_unit_that_cannot_be_written_is_told_of_a_finished_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a repair; only that the directory is gone says that another driver was faster."""
    paths = RunPaths(str(tmp_path), "r1")
    storage.create_if_absent(paths.success, b"")
    Path(paths.units).write_text("no directory")
    with pytest.raises(CannotWrite, match="cannot be written"):
        commit_unit(paths, 0, pa.array([7, 8, 9]), mixed_unit(), defer_above=None)
    Path(paths.units).unlink()
    link = os.link

    def link_later(source: str, target: str) -> None:
        storage.remove(paths.units)
        link(source, target)

    monkeypatch.setattr(os, "link", link_later)
    assert commit_unit(paths, 0, pa.array([7, 8, 9]), mixed_unit(), defer_above=None).outcome == "existed"
    storage.remove(paths.success)
    with pytest.raises(CannotWrite, match="FileNotFoundError"):
        commit_unit(paths, 0, pa.array([7, 8, 9]), mixed_unit(), defer_above=None)


@pytest.mark.parametrize("planned", [[7, 8], [7, 8, 10], [8, 7, 9]])
def test_rows_that_were_not_planned_are_not_committed(tmp_path: Path, planned: list[int]) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    with pytest.raises(ValueError, match="not the rows that were planned"):
        commit_unit(paths, 0, pa.array(planned), mixed_unit(), defer_above=None)
    assert paths.committed_units(10) == set()


def test_failures_that_may_pass_are_left_for_a_later_pass(tmp_path: Path) -> None:
    paths = RunPaths(str(tmp_path), "r1")
    error = row_error(Status.FETCH_FAILED, Stage.FETCH, "connection reset")
    size = np.zeros(2, np.int32)
    table = unit_table(pa.array([0, 1]), [error, None], size, size, prediction_columns(PROBS[:1], rules()))
    row_ids = pa.array([0, 1])
    assert commit_unit(paths, 0, row_ids, table, defer_above=0.4).outcome == "deferred"
    assert paths.committed_units(10) == set()
    assert commit_unit(paths, 0, row_ids, table, defer_above=0.5).outcome == "committed"


def test_embeddings_are_lists_of_the_predicted_rows() -> None:
    features = np.arange(8, dtype=np.float32).reshape(2, 4)
    error = row_error(Status.CORRUPT, Stage.DECODE, "bad")
    size = np.ones(3, np.int32)
    columns = prediction_columns(PROBS, rules(), features)
    table = unit_table(pa.array([0, 1, 2]), [None, error, None], size, size, columns)
    assert table["embedding"].to_pylist() == [[0, 1, 2, 3], None, [4, 5, 6, 7]]
    assert prediction_columns(PROBS, rules())["embedding"].null_count == 2


def predictions_of(config: Config) -> tuple[pa.Table, RunPaths]:
    """Of a run of this configuration."""
    result = classify(config)
    (path,) = Path(result.out, "predictions", f"run_id={result.run_id}").rglob("*.parquet")
    return pq.read_table(path, partitioning=None), RunPaths(result.out, result.run_id)


@pytest.mark.parametrize(("num_classes", "kept"), [(100, 100), (101, None)])
def test_a_run_keeps_all_probabilities_of_up_to_a_hundred_classes(
    num_classes: int, kept: int | None, photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    names = tuple(f"class {index}" for index in reversed(range(num_classes)))
    bundle = make_bundle(class_names=names)
    table, paths = predictions_of(changed(photo_config, model__path=bundle.path, input__limit=4))
    in_the_file = json.loads(table.schema.metadata[b"imgbatch.classes"])["class_names"]
    assert in_the_file == storage.read_json(paths.classes)["class_names"] == list(names)
    assert table.num_rows == 4
    for row in table.to_pylist():
        listed = [names.index(entry["label"]) for entry in row["top_k"]]
        best = [entry["probability"] for entry in row["top_k"]]
        assert len(set(listed)) == 5
        assert best == sorted(best, reverse=True)
        assert (names[listed[0]], listed[0], best[0]) == (row["label"], row["label_index"], row["probability"])
        assert (row["probabilities"] and len(row["probabilities"])) == kept
        if kept:
            assert [row["probabilities"][index] for index in listed] == best
            assert best == sorted(row["probabilities"], reverse=True)[:5]


def test_a_run_accepts_only_labels_that_have_a_threshold(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    def decided(name: str, thresholds: dict[str, dict[str, float]] | None) -> pa.Table:
        bundle = make_bundle(name, thresholds=thresholds)
        return predictions_of(changed(photo_config, model__path=bundle.path, input__limit=16))[0]

    table = decided("none", None)
    assert table["decision"].null_count == table.num_rows == 15
    labels = table["label"].to_pylist()
    other = next(name for name in ("cat", "dog") if name != labels[0])
    for name in (labels[0], other):
        expected = ["accept" if label == name else "review" for label in labels]
        assert decided(name, {"accept": {name: 0.0}})["decision"].to_pylist() == expected
