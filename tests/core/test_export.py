from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgbatch.config import Config
from imgbatch.core import export
from imgbatch.core.architectures import build_network
from imgbatch.core.export import export_bundle
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle
from imgbatch.core.pictures import load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.errors import CheckFailed, UsageError


@pytest.fixture(autouse=True)
def has_onnx() -> None:
    pytest.importorskip("onnxscript", reason="needs the extra onnx")


@pytest.mark.parametrize(("file_format", "name"), [("onnx", "model.onnx"), ("openvino", "model.xml")])
def test_a_file_holds_the_whole_model(
    openvino: Any, tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path, file_format: export.Format, name: str
):
    path = tmp_path / "new" / name
    result = export_bundle(
        tiny_model.path, file_format=file_format, output=str(path), manifest=str(photo_manifest), limit=20
    )
    assert sorted(result.files) == sorted(str(file) for file in path.parent.iterdir())
    assert result.images == result.same_labels > 0
    images_NHWC = load_pictures(
        open_manifest(str(photo_manifest)), tiny_model.preprocess, Config(), limit=5
    ).images_NHWC
    given_NK = openvino.Core().compile_model(str(path), "CPU")({"images": images_NHWC})["probabilities"]
    np.testing.assert_allclose(given_NK, Predictor(tiny_model).predict(images_NHWC).probs_NK, atol=1e-3)


@pytest.mark.usefixtures("openvino")
def test_an_onnx_file_says_what_it_is(tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path):
    import onnx

    path = str(tmp_path / "model.onnx")
    export_bundle(tiny_model.path, file_format="onnx", output=path, manifest=str(photo_manifest), limit=10)
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["class_names"]) == list(tiny_model.class_names)
    assert properties["model_id"] == tiny_model.model_id


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("limit", [-1.0, float("nan")])  # which compares as a difference that is NaN does
def test_a_file_that_differs_is_not_written(
    tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
):
    monkeypatch.setattr(export, "MAX_DIFFERENCE", limit)
    path = tmp_path / "model.xml"
    with pytest.raises(CheckFailed, match=r"as openvino a probability differs by .* nothing was written"):
        export_bundle(tiny_model.path, file_format="openvino", output=str(path), manifest=str(photo_manifest), limit=10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("openvino")
def test_a_model_that_says_nothing_has_nothing_to_compare(
    make_bundle: Callable[..., ModelBundle], photo_manifest: Path, tmp_path: Path
):
    weights = build_network("simple_cnn", 3).state_dict()
    weights["head.bias"][1] = float("nan")
    path, bundle = tmp_path / "new" / "model.xml", make_bundle(state_dict=weights)
    with pytest.raises(UsageError, match=r"the model gave nothing for (\d+) of \1 images: .* holds NaN or infinity$"):
        export_bundle(bundle.path, file_format="openvino", output=str(path), manifest=str(photo_manifest), limit=10)
    assert not path.parent.exists()


def test_the_suffix_goes_with_the_format(tiny_model: ModelBundle, photo_manifest: Path):
    with pytest.raises(UsageError, match=r"-o model.xml: a file of format onnx must end in .onnx"):
        export_bundle(tiny_model.path, file_format="onnx", output="model.xml", manifest=str(photo_manifest))


def test_without_the_package_one_line_says_what_to_install(
    tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UsageError, match=r"onnx and onnxscript are not installed; pip install 'imgbatch\[onnx\]'"):
        export_bundle(
            tiny_model.path, file_format="onnx", output=str(tmp_path / "m.onnx"), manifest=str(photo_manifest)
        )
