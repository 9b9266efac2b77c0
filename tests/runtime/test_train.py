"""Training as a whole, in the plain loop."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from safetensors.torch import save_file

from imgbatch.cli import run
from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.architectures import build_network
from imgbatch.core.baselines import BASELINES
from imgbatch.core.evaluate import evaluate
from imgbatch.core.model import load_bundle
from imgbatch.core.training import space
from imgbatch.core.views import open_views
from imgbatch.errors import ErrorBudgetExceeded, ExitCode, ImgbatchError, UsageError
from imgbatch.runtime.job import classify
from imgbatch.runtime.train import train
from tests.conftest import changed
from tests.core.training.conftest import settle


@pytest.fixture
def config(colour_config: Config) -> Config:
    return changed(colour_config, train__epochs=4, train__storage=None)


def test_a_training_leaves_a_bundle_that_says_what_it_is_worth(config, capsys):
    out = Path(str(config.output.path))
    for given_up in ("t0123456789ab/last.pt", "crops-0123456789ab/part-00000.npy"):
        storage.create_if_absent(str(out / "training" / given_up), b"of other settings")
    result = train(config, Console(soft_wrap=True))
    bundle = load_bundle(str(out))
    assert bundle.class_names == ("blue", "green", "red")
    assert bundle.provenance["train_images_by_class"] == {"blue": 10, "green": 10, "red": 10}
    assert bundle.provenance["hardware"]["workers"] == 1
    assert {"torch", "ray", "imgbatch"} <= bundle.provenance["versions"].keys()
    assert result.metrics["test"]["images"] == 9
    assert result.metrics["steps"] == 12
    assert "top1" in (out / "README.md").read_text()
    left = {path.relative_to(out).parts[:2] for path in out.rglob("*") if path.is_file()}
    pictures = {("training", name) for name in ("augmented.png", "curves.png", "epochs.jsonl", "tensorboard")}
    assert left == {("model.json",), ("model.safetensors",), ("metrics.json",), ("README.md",)} | pictures
    epochs = [json.loads(line) for line in (out / "training" / "epochs.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in epochs] == [0, 1, 2, 3, 4]
    printed = capsys.readouterr().out
    assert "epoch 4 of 4, loss" in printed
    assert "0:00:00 left" in printed


def test_a_picture_that_cannot_be_drawn_costs_no_training(config, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no such colour")

    for name in ("contact_sheet", "training_curves"):
        monkeypatch.setattr(f"imgbatch.report.plots.{name}", fail)
    assert train(config, Console(soft_wrap=True)).metrics["test"]["images"] == 9
    assert capsys.readouterr().out.count("no such colour\n") == 2


def test_a_training_is_not_asked_to_end_by_itself(capsys):
    command = ["train", "--manifest", "m.parquet", "-o", "out", "--set", "run.stop_after_s=60"]
    assert run(command) == ExitCode.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "run.stop_after_s: training ends with its last epoch; leave it out, or --set run.stop_after_s=null" in line
    assert run([*command, "--set", "run.stop_after_s=null", "--engine", "local"]) == ExitCode.USAGE
    assert "stop_after_s" not in capsys.readouterr().err


def test_what_was_measured_is_what_classification_gives(config, colour_manifest, tmp_path):
    result = train(config)
    job = changed(
        config,
        model__path=result.bundle.path,
        output__path=str(tmp_path / "out"),
        preprocess__resize_size=None,
        preprocess__crop_size=None,
    )
    classify(job)
    with open_views(str(tmp_path / "out")) as connection:
        query = "select avg((label = target)::int) from predictions where split = 'test'"
        assert connection.sql(query).fetchall() == [(result.metrics["test"]["top1"],)]
    assert pq.read_metadata(colour_manifest).num_rows == 48


def test_training_may_keep_its_work_in_an_object_store(config, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = train(config)
    elsewhere = {"train__storage": f"{s3_bucket}/work", "output__path": f"{s3_bucket}/model"}
    result = train(changed(config, **elsewhere))
    assert result.bundle.model_id == expected.bundle.model_id
    names = [info.uri.rsplit("/", 1)[-1] for info in storage.list_files(f"{s3_bucket}/work", "")]
    assert {"last.pt", "outcome.json", "part-00000.npy"} <= set(names)
    assert sum(name.startswith("best-") for name in names) == 1
    assert not list(tmp_path.glob("imgbatch-crops-*"))
    assert train(changed(config, **elsewhere)).already_finished


def test_a_training_that_goes_on_keeps_its_images_whatever_the_limits_are_now(config, tmp_path):
    config = changed(config, train__storage=str(tmp_path / "work"), train__epochs=1)
    settle(config)
    stores = {path.name for path in (tmp_path / "work").glob("crops-*")}
    train(changed(config, fetch__max_bytes=10**6))
    assert {path.name for path in (tmp_path / "work").glob("crops-*")} == stores


def test_copies_of_images_are_removed_when_a_training_fails(config, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hopeless = {"train__learning_rate": 1e30, "train__clip_norm": 0.0, "train__optimizer": "sgd"}
    with pytest.raises(ImgbatchError, match="is not finite"):
        train(changed(config, train__storage=f"{s3_bucket}/work", train__batch_norm="frozen", **hopeless))
    assert not list(tmp_path.glob("imgbatch-crops-*"))


def test_no_space_for_copies_of_images_is_one_line(config, s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = changed(config, train__storage=f"{s3_bucket}/work")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ImgbatchError, match=rf"{tmp_path} of .*: 0\.0 GB free, but the decoded images take 0\.0 GB"):
        train(config)


def test_an_epoch_whose_metric_is_not_defined_has_a_dash(config, colour_images, write_manifest, capsys):
    uris = [uri for name in ("blue", "red") for uri in colour_images[name]]
    split = (["train"] * 10 + ["validation"] * 6) * 2
    targets = [["red"] if name == "train" and i >= 16 else [] for i, name in enumerate(split)]
    manifest = write_manifest("labels.parquet", uri=uris, targets=targets, split=split)
    train(changed(config, input__manifest=str(manifest), train__epochs=1), Console(soft_wrap=True))
    assert "validation mean_average_precision –" in capsys.readouterr().out


def test_labels_apply_from_thresholds_that_validation_chose(config, colour_images, write_manifest, tmp_path):
    uris = [uri for same in colour_images.values() for uri in same]
    targets = [["blue", "cool"]] * 16 + [["cool"]] * 16 + [[]] * 16
    split = (["train"] * 10 + ["validation"] * 3 + ["test"] * 3) * 3
    manifest = write_manifest("labels.parquet", uri=uris, targets=targets, split=split)
    result = train(changed(config, input__manifest=str(manifest)))
    assert result.bundle.thresholds.keys() == {"labels"}
    assert result.bundle.thresholds["labels"].keys() == {"blue", "cool"}
    assert "labels apply from blue 0." in (Path(result.bundle.path) / "README.md").read_text()
    job = changed(
        config,
        input__manifest=str(manifest),
        model__path=result.bundle.path,
        output__path=str(tmp_path / "out"),
        preprocess__resize_size=None,
        preprocess__crop_size=None,
    )
    classify(job)
    measured = evaluate(str(tmp_path / "out"), split="test").metrics
    by_class = {row["class_name"]: row["f1"] for row in measured["per_class"]}
    assert by_class == {name: scores["f1"] for name, scores in result.metrics["test"]["per_class"].items()}


def test_the_same_command_finds_it_done_and_another_one_is_refused(config):
    first = train(config)
    again = train(config)
    assert again.already_finished
    assert again.metrics == first.metrics
    other = changed(config, train__seed=1)
    with pytest.raises(UsageError, match=r"holds another model .*; choose another place, or --overwrite it"):
        train(other)
    assert not train(other, overwrite=True).already_finished


def test_a_damaged_model_is_overwritten_only_if_that_is_said(config):
    damaged = Path(train(config).bundle.path) / "model.json"
    damaged.write_text("{")
    with pytest.raises(UsageError, match=r"model\.json"):
        train(config)
    assert not train(config, overwrite=True).already_finished
    assert load_bundle(str(config.output.path)).class_names == ("blue", "green", "red")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train__arch": "resnet18"}, "not weights of resnet18"),
        ({"train__batch_size": 2, "train__accumulate": 2}, r"train\.batch_size: 2 images are too few"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_decoded(config, tmp_path, flags, message):
    weights = tmp_path / "weights.safetensors"
    save_file(build_network("simple_cnn", 3).state_dict(), weights)
    changes = {"train__weights": str(weights), "train__storage": str(tmp_path / "work"), **flags}
    with pytest.raises(UsageError, match=message):
        train(changed(config, **changes))
    assert not list((tmp_path / "work").rglob("part-*"))


def test_decoding_stops_as_soon_as_too_many_images_fail(config_of_nothing, tmp_path, monkeypatch):
    monkeypatch.setattr("imgbatch.runtime.progress.PLAIN_EVERY_S", 0.0)
    printed = io.StringIO()
    with pytest.raises(ErrorBudgetExceeded, match=r"8 of the last 8 rows failed, .* NOT_FOUND \(.*gone7.png: "):
        train(config_of_nothing, Console(file=printed, width=200))
    assert "4 of 48 images, 4 errors" in printed.getvalue()
    assert len(list((tmp_path / "work").rglob("part-*.json"))) == 2


def test_images_that_were_left_out_are_listed(config, colour_images, write_manifest, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    uris = [*colour_images["red"], *colour_images["blue"], str(broken)]
    split = (["train"] * 10 + ["validation"] * 3 + ["test"] * 3) * 2 + ["train"]
    manifest = write_manifest("more.parquet", uri=uris, target=["red"] * 16 + ["blue"] * 17, split=split)
    result = train(changed(config, input__manifest=str(manifest), train__epochs=1))
    assert result.bundle.task == "binary"
    assert result.metrics["images_left_out"] == {"NOT_AN_IMAGE": 1}
    (line,) = (Path(result.bundle.path) / "training" / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["uri"] == str(broken)


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_baseline_is_a_model_like_any_other(config, tmp_path, baseline):
    backbone = train(config).bundle
    flags = {"train__arch": baseline, "train__weights": backbone.path}
    result = train(changed(config, output__path=str(tmp_path / baseline), **flags))
    assert result.bundle.arch == "simple_cnn"
    assert result.bundle.provenance["made_by"] == f"imgbatch train ({baseline})"
    assert result.metrics["test"]["top1"] > 0.5


@pytest.mark.parametrize("baseline", ["linear_svm", "random_forest"])
def test_hand_made_features_need_no_weights(config, baseline):
    flags = {"train__arch": baseline, "train__backbone": "hog_color", "train__task": "multiclass"}
    result = train(changed(config, **flags))
    assert result.bundle.arch == "hog_color"
    assert result.metrics["test"]["top1"] > 0.8
    with pytest.raises(UsageError, match="crop_size 8 must be at least 16"):
        train(changed(config, **flags, preprocess__crop_size=8), overwrite=True)


def test_a_head_that_is_fitted_to_some_images_is_told_of(config, tmp_path, monkeypatch, capsys):
    started = train(config)
    monkeypatch.setattr("imgbatch.core.training.job._MOST_HEAD_IMAGES", 12)
    weights = str(Path(started.bundle.path) / "model.safetensors")
    flags = {"train__weights": weights, "output__path": str(tmp_path / "tuned"), "train__epochs": 1}
    train(changed(config, **flags), Console(soft_wrap=True))
    assert "the new head is fitted to 12 training images, evenly of each class;" in capsys.readouterr().out


def test_a_forest_is_not_trained_further(config, tmp_path):
    flags = {"train__arch": "random_forest", "train__backbone": "hog_color"}
    forest = train(changed(config, **flags)).bundle
    further = {"train__arch": "hog_color", "train__weights": forest.path, "output__path": str(tmp_path / "more")}
    with pytest.raises(UsageError, match="a random forest has no gradients"):
        train(changed(config, **further))


def test_one_process_has_one_worker(config):
    with pytest.raises(UsageError, match=r"train\.num_workers: the local engine has one worker"):
        train(changed(config, train__num_workers=2))
