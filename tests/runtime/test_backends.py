"""A whole run on another backend than torch."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from rich.console import Console

from imgbatch.cli import run as command
from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.optimize import optimize_bundle
from imgbatch.core.plan import plan_run
from imgbatch.core.runs import RunPaths
from imgbatch.core.variants import load_variants
from imgbatch.runtime.forecast import forecast
from imgbatch.runtime.job import RunResult, classify
from tests.conftest import changed


@pytest.fixture
def config(photo_config: Config, optimized_model: ModelBundle) -> Config:
    return changed(photo_config, model__path=optimized_model.path, classify__batch_size="auto")


def labels(result: RunResult) -> dict[int, str]:
    table = ds.dataset(f"{result.out}/predictions/run_id={result.run_id}").to_table(["row_id", "label"])
    return dict(zip(table["row_id"].to_pylist(), table["label"].to_pylist(), strict=True))


def test_auto_runs_the_fastest_variant_and_says_so(config: Config, optimized_model: ModelBundle):
    printed = StringIO()
    config = changed(config, classify__min_agreement=0.5)
    result = classify(config, Console(file=printed, width=1000))
    int8, fp32 = load_variants(optimized_model)
    paths = RunPaths(result.out, result.run_id)
    plan, record = storage.read_json(paths.plan), storage.read_json(paths.run_json)
    assert (int8.target, fp32.target) == ("openvino-int8", "openvino-fp32")
    assert plan["fields"]["variant"] == record["variant"] == int8.variant_id
    assert plan["backend"] == record["backend"] == "openvino_int8"
    assert f"the model runs as openvino-int8 ({int8.variant_id}): the same labels as torch fp32" in printed.getvalue()
    assert record["model"]["model_id"] == optimized_model.model_id


def test_fp32_gives_torchs_labels_in_a_run_of_its_own(config: Config):
    torch = classify(changed(config, classify__backend="torch"))
    openvino = classify(changed(config, classify__backend="openvino_fp32"))
    assert torch.run_id != openvino.run_id
    assert torch.counts == openvino.counts
    assert labels(torch) == labels(openvino)
    assert "variant" not in storage.read_json(RunPaths(torch.out, torch.run_id).plan)["fields"]


def test_mnn_gives_torchs_labels(photo_config: Config, mnn_model: ModelBundle):
    config = changed(photo_config, model__path=mnn_model.path, classify__batch_size="auto")
    mnn = classify(changed(config, classify__backend="mnn_fp32"))
    torch = classify(changed(config, classify__backend="torch"))
    (variant,) = load_variants(mnn_model)
    assert storage.read_json(RunPaths(mnn.out, mnn.run_id).plan)["fields"]["variant"] == variant.variant_id
    assert variant.agreement.labels == 1
    assert torch.counts == mnn.counts
    assert labels(torch) == labels(mnn)


def test_without_mnn_one_line_says_that_torch_took_over(
    photo_config: Config, mnn_model: ModelBundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "MNN", None)
    printed = StringIO()
    result = classify(changed(photo_config, model__path=mnn_model.path), Console(file=printed, width=1000))
    assert storage.read_json(RunPaths(result.out, result.run_id).plan)["backend"] == "torch"
    assert "mnn-fp32 is left out: MNN is not installed here; pip install 'imgbatch[mnn]'" in printed.getvalue()


def test_onnx_runtime_gives_the_labels_that_it_was_measured_with(
    photo_config: Config, tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path
):
    pytest.importorskip("onnxruntime", reason="needs the extra onnxruntime")
    path = str(tmp_path / "model")
    _, variant = optimize_bundle(tiny_model.path, target="onnx-int8", calibration=str(photo_manifest), output=path)
    config = changed(photo_config, model__path=path, classify__min_agreement=0)
    onnx = classify(changed(config, classify__backend="onnx_int8"))
    torch = classify(changed(config, classify__backend="torch"))
    assert storage.read_json(RunPaths(onnx.out, onnx.run_id).plan)["fields"]["variant"] == variant.variant_id
    ours, theirs = labels(onnx), labels(torch)
    assert onnx.counts == torch.counts
    # Measured on half of the images.
    assert abs(sum(ours[row] == theirs[row] for row in theirs) / len(theirs) - variant.agreement.labels) <= 0.05


@pytest.mark.soak
@pytest.mark.ray
def test_actors_run_the_variant_and_give_the_labels_of_the_plain_loop(config: Config, ray_local: None):  # noqa: ARG001
    on_ray = {"classify__engine": "ray", "resources__classify_actors": 1, "resources__decode_actors": 1}
    config = changed(config, classify__backend="openvino_fp32")
    plain = classify(config)
    pooled = classify(changed(config, **on_ray, output__path=f"{config.output.path}-ray"))
    assert storage.read_json(RunPaths(pooled.out, pooled.run_id).run_json)["backend"] == "openvino_fp32"
    assert labels(pooled) == labels(plain)
    assert pooled.counts == plain.counts


def test_without_openvino_one_line_says_that_torch_took_over(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    printed = StringIO()
    result = classify(changed(config, classify__min_agreement=0.5), Console(file=printed, width=1000))
    assert storage.read_json(RunPaths(result.out, result.run_id).plan)["backend"] == "torch"
    assert "openvino-int8 is left out: openvino is not installed here" in printed.getvalue()


def test_a_forecast_knows_the_run(config: Config):
    config = changed(config, classify__backend="openvino_fp32", plan__sample_rows=4)
    result = forecast(config)
    assert result.run_id == plan_run(config, "cpu").run_id
    assert result.backend.startswith("the model runs as openvino-fp32")
    assert result.stage_ms["classify"] > 0


@pytest.mark.usefixtures("openvino")
def test_the_commands_make_show_and_write_a_variant(
    tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new = str(tmp_path / "new")
    targets = ["--target", "openvino-fp32", "--target", "torch-bf16"]
    optimize = ["model", "optimize", tiny_model.path, *targets, "--calibration", str(photo_manifest)]
    assert command([*optimize, "-o", new]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{new}/variants/openvino-fp32: variant_id v")
    assert "agreement  the same labels as torch fp32 on 100.00% of 57 images" in printed
    assert command(["model", "inspect", new]) == 0
    shown = capsys.readouterr().out
    assert "\n  openvino-fp32         v" in shown
    assert "\n  torch-bf16            v" in shown
    assert not Path(tiny_model.path, "variants", "torch-bf16").exists()
    export = [
        "model",
        "export",
        new,
        "--format",
        "openvino",
        "-o",
        f"{new}/model.xml",
        "--manifest",
        str(photo_manifest),
    ]
    assert command(export) == 0
    assert "labels as in torch, probabilities within" in capsys.readouterr().out
