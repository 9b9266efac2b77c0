from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from imgbatch.cli import run
from imgbatch.config import load_config
from imgbatch.core.drawing import CLASS_NAMES
from imgbatch.core.model import load_bundle, load_metrics
from imgbatch.demo import DemoResult, run_demo
from imgbatch.errors import UsageError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def result(out: Path) -> DemoResult:
    return demo(out)


def demo(out: Path, *, seed: int = 0) -> DemoResult:
    config = load_config(None, ["classify.engine=local"], {"output.path": str(out)})
    return run_demo(config, num_images=60, seed=seed, console=Console(quiet=True))


def test_every_drawn_file_has_an_outcome_and_the_broken_ones_have_reasons(result):
    assert result.run.num_rows == 65
    assert Counter(status for _, status, _ in result.errors) == {
        "TRUNCATED": 1,
        "NOT_AN_IMAGE": 2,
        "EMPTY": 1,
        "TOO_LARGE": 1,
    }
    assert all(message for _, _, message in result.errors)
    assert result.accuracy == pytest.approx(accuracy_by_folder(result, "test"))


def accuracy_by_folder(result: DemoResult, split: str) -> float:
    """Share of the labels in the output's files that are the names of their images' folders."""
    folder = result.paths.labels / "predictions" / f"run_id={result.run.run_id}" / f"split={split}"
    (path,) = folder.glob("*.parquet")
    rows = pq.read_table(path, columns=["uri", "label"], partitioning=None).to_pylist()
    return sum(Path(row["uri"]).parent.name == row["label"] for row in rows) / len(rows)


def test_the_query_it_shows_counts_the_test_split(result):
    manifest = pq.read_table(result.paths.manifest)
    num_test = manifest["split"].to_pylist().count("test")
    assert result.columns == ["label", "images", "probability", "accuracy"]
    assert sum(row[1] for row in result.rows) == num_test - len(result.errors)


def test_it_leaves_manifest_model_and_partitioned_labels(result):
    manifest = pq.read_table(result.paths.manifest)
    assert set(manifest["target"].to_pylist()) == set(CLASS_NAMES)
    assert load_bundle(str(result.paths.model)).class_names == CLASS_NAMES
    in_training = load_metrics(str(result.paths.model))["validation"]["top1"]
    assert in_training == pytest.approx(accuracy_by_folder(result, "validation"))
    splits = {path.name for path in (result.paths.labels / "predictions" / f"run_id={result.run.run_id}").iterdir()}
    assert splits == {"split=train", "split=validation", "split=test"}


def test_a_second_time_nothing_is_left_to_do(out, result):
    again = demo(out)
    assert again.run.already_finished
    assert again.run.run_id == result.run.run_id
    assert again.rows == result.rows


def test_a_demo_of_other_images_is_not_mixed_in(out, result):
    with pytest.raises(UsageError, match="holds a demo of other images"):
        demo(out, seed=1)
    assert result.paths.out == out


def test_the_command_prints_the_query_the_accuracy_the_reasons_and_the_places(out, result, capsys):
    assert run(["demo", "-o", str(out), "--images", "60", "--set", "classify.engine=local"]) == 0
    printed = capsys.readouterr().out
    assert f'imgbatch query {out}/labels "select label' in printed
    assert f"accuracy on the test split: {result.accuracy:.3f}" in printed
    assert "65 rows, 5 without a prediction:" in printed
    assert "EMPTY          test/chair/empty-2.jpg: " in printed
    assert str(result.paths.manifest) in printed
