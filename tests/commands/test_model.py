from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgbatch.cli import run
from imgbatch.core.architectures import build_network
from imgbatch.core.model import ModelBundle, load_bundle


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A complete ``model init`` but for the output."""
    torch.save(build_network("simple_cnn", 2).state_dict(), tmp_path / "w.pth")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    parts = ["--arch", "simple_cnn", "--weights", str(tmp_path / "w.pth"), "--classes", str(tmp_path / "classes.txt")]
    return ["model", "init", *parts]


def test_init_makes_a_model_and_says_which(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "model")
    assert run([*arguments, "-o", path, "--task", "multilabel", "--resize-size", "40", "--crop-size", "32"]) == 0
    bundle = load_bundle(path)
    assert (bundle.task, bundle.preprocess.resize_size, bundle.preprocess.crop_size) == ("multilabel", 40, 32)
    described = f"{path}: simple_cnn, 2 classes, model_id {bundle.model_id}; {bundle.preprocess.describe()}\n"
    printed = capsys.readouterr()
    assert "resize(40, bilinear) | center_crop(32)" in described
    assert (printed.out, printed.err) == (described, "")


@pytest.mark.parametrize("given", [[], ["--crop-size", "32"]])
def test_init_says_where_sizes_are_assumed(
    tmp_path: Path, arguments: list[str], given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "-o", str(tmp_path / "model"), *given]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("usual for simple_cnn are assumed; --resize-size and --crop-size give others")


def test_init_takes_preprocessing_from_the_configuration_too(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "night.yaml").write_text("preprocess: {crop_size: 24, median_size: 3}\n")
    path = str(tmp_path / "model")
    given = ["-c", str(tmp_path / "night.yaml"), "--set", "preprocess.resize_size=48", "--crop-size", "40"]
    assert run([*arguments, "-o", path, *given]) == 0
    made = load_bundle(path).preprocess
    assert (made.resize_size, made.crop_size, made.median_size) == (48, 40, 3)


def test_init_does_not_overwrite_another_model_unless_told(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments += ["-o", str(tmp_path / "model")]
    assert run(arguments) == 0
    assert run(arguments) == 0
    assert run([*arguments, "--crop-size", "32"]) == 2
    assert "choose another place, or --overwrite it" in capsys.readouterr().err
    assert run([*arguments, "--crop-size", "32", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--arch", "resnet19"], "--arch resnet19: unknown architecture; one of resnet101"),
        (["--weights", "nothing.pth"], "--weights nothing.pth: No such file or directory"),
        (["--classes", "imagenet1k"], "its head has 2 outputs, but --classes imagenet1k names 1000"),
        (["--task", "odd"], "--task"),
        (["--crop-size", "0"], "--crop-size"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], changed: list[str], message: str
) -> None:
    assert run([*arguments, *changed, "-o", str(tmp_path / "model")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "model").exists()


def test_inspect_prints_a_line_for_each_fact(
    make_bundle: Callable[..., ModelBundle], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle(
        class_names=[f"class {index}" for index in range(12)],
        thresholds={"accept": {"class 3": 0.5}},
        metrics={"validation": {"top1": 0.7512345, "per_class": {"cat": {"images": 1200, "f1": 1.0}}}, "epochs": 2},
        provenance={"made_by": "a test", "images": {"train": 6, "test": 2}},
    )
    assert run(["model", "inspect", bundle.path]) == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.strip().count(" "))
    assert lines["model_id"] == bundle.model_id
    assert lines["arch"] == "simple_cnn"
    assert lines["class_names"].endswith("class 9 and 2 more")
    assert lines["preprocessing"] == bundle.preprocess.describe()
    assert lines["parameters"] == "95,020"
    assert "thresholds\n  accept                class 3 0.5\n" in printed
    assert "provenance\n  made_by               a test\n  images                train 6, test 2\n" in printed
    assert (
        "metrics\n"
        "  validation\n"
        "    top1                  0.7512\n"
        "    per_class\n"
        "      cat                   images 1,200, f1 1\n"
        "  epochs                2\n"
    ) in printed


def test_inspect_as_json(make_bundle: Callable[..., ModelBundle], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle()
    assert run(["model", "inspect", bundle.path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model_id"] == bundle.model_id
    assert facts["class_names"] == ["cat", "dog", "owl"]
    assert facts["weights_bytes"] == Path(bundle.path, "model.safetensors").stat().st_size


def test_inspect_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["model", "inspect", str(tmp_path)]) == 2
    assert "there is no model; make one with imgbatch model init" in capsys.readouterr().err


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize(("num_train", "measured", "of_train"), [(60, 28, 0), (90, 57, 42), (120, 57, 57)])
def test_optimize_measures_what_training_has_not_seen_where_that_is_enough(
    make_bundle: Callable[..., ModelBundle],
    photo_manifest: Path,
    num_train: int,
    measured: int,
    of_train: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = pq.read_table(photo_manifest)
    split = ["train"] * num_train + ["val"] * (len(rows) - num_train)
    pq.write_table(rows.append_column("split", pa.array(split)), tmp_path / "m.parquet")
    command = ["model", "optimize", make_bundle().path, "--target", "openvino-fp32"]
    assert run([*command, "--calibration", str(tmp_path / "m.parquet")]) == 0
    printed = capsys.readouterr().out
    assert f"of {measured} images" in printed
    warned = f"{of_train} rows are of split train, which a model may know by heart; of a manifest with enough others"
    assert (warned in printed) == (of_train > 0) == ("split train" in printed)


@pytest.mark.usefixtures("openvino")
def test_optimize_as_json_is_one_list(
    make_bundle: Callable[..., ModelBundle], photo_manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle()
    targets = ["--target", "torch-bf16", "--target", "openvino-fp32"]
    assert run(["model", "optimize", bundle.path, *targets, "--calibration", str(photo_manifest), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert {variant["target"] for variant in made} == {"torch-bf16", "openvino-fp32"}
    assert len({variant["variant_id"] for variant in made}) == 2
