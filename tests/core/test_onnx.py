"""ONNX Runtime as a backend; on a GPU the same graphs go through TensorRT."""

from __future__ import annotations

import contextlib
import re
import sys
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from imgbatch.config import Config
from imgbatch.core import onnx_build, onnx_predict
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle
from imgbatch.core.onnx_predict import OnnxGraph, load_with_engines
from imgbatch.core.optimize import optimize_bundle
from imgbatch.core.pictures import load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.core.variants import Variant
from imgbatch.errors import UsageError

pytest.importorskip("onnxruntime", reason="needs the extra onnxruntime")
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail


@pytest.fixture(name="images_NHWC", scope="module")
def load_images(photo_manifest: Path, tiny_model: ModelBundle) -> np.ndarray:
    return load_pictures(open_manifest(str(photo_manifest)), tiny_model.preprocess, Config(), limit=60).images_NHWC


@pytest.fixture(name="float_graph", scope="module")
def convert(tiny_model: ModelBundle) -> bytes:
    return onnx_build.convert_network(tiny_model, output="logits").SerializeToString()


@pytest.fixture(name="quantised", scope="module")
def optimize(
    tiny_model: ModelBundle, photo_manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelBundle, Variant]:
    path = str(tmp_path_factory.mktemp("quantised") / "model")
    return optimize_bundle(tiny_model.path, target="onnx-int8", calibration=str(photo_manifest), output=path)


def predictor_over(bundle: ModelBundle, model: bytes, *, batch_size: int) -> Predictor:
    graph = OnnxGraph(model, device="cpu", batch_size=batch_size, num_threads=1)
    return Predictor(bundle, batch_size=batch_size, num_threads=1, graph=graph)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_float_graph_says_what_torch_says(
    tiny_model: ModelBundle, float_graph: bytes, images_NHWC: np.ndarray, batch_size: int
):
    expected = Predictor(tiny_model).predict(images_NHWC)
    given = predictor_over(tiny_model, float_graph, batch_size=batch_size).predict(images_NHWC)
    np.testing.assert_allclose(given.probs_NK, expected.probs_NK, atol=1e-5)
    assert given.errors == [None] * len(images_NHWC)
    assert given.features_ND is None


def test_a_graph_is_made_for_batches_of_one_size(float_graph: bytes):
    graph = OnnxGraph(float_graph, device="cpu", batch_size=4, num_threads=1)
    assert graph(torch.zeros((4, 32, 32, 3), dtype=torch.uint8)).shape == (4, 3)
    with pytest.raises(Exception, match="Got: 5 Expected: 4"):
        graph(torch.zeros((5, 32, 32, 3), dtype=torch.uint8))


def test_threads_may_share_a_graph(tiny_model: ModelBundle, float_graph: bytes, images_NHWC: np.ndarray):
    shared = predictor_over(tiny_model, float_graph, batch_size=8)
    expected_NK = shared.predict(images_NHWC).probs_NK
    with ThreadPoolExecutor(2) as threads:
        for predictions in threads.map(shared.predict, [images_NHWC] * 8):
            np.testing.assert_array_equal(predictions.probs_NK, expected_NK)


def test_int8_says_nearly_what_torch_says(quantised: tuple[ModelBundle, Variant], photo_manifest: Path):
    bundle, variant = quantised
    images_NHWC = load_pictures(open_manifest(str(photo_manifest)), bundle.preprocess, Config()).images_NHWC[1::2]
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    predictor = build_predictor(bundle, Backend(variant), device="cpu", batch_size=8, num_threads=1)
    given_NK = predictor.predict(images_NHWC).probs_NK
    assert variant.agreement.labels == (expected_NK.argmax(axis=1) == given_NK.argmax(axis=1)).mean()
    assert variant.agreement.largest_difference == pytest.approx(np.abs(expected_NK - given_NK).max(), abs=1e-6)
    assert 0 < variant.agreement.mean_difference < 0.02
    assert variant.provenance["versions"]["onnxruntime"]
    assert (variant.device, list(variant.files)) == ("cpu", ["model.onnx"])


def test_int8_is_written_as_tensorrt_wants_it(quantised: tuple[ModelBundle, Variant]):
    """Signed and symmetric, weights by output channel, and every convolution between dequantised inputs."""
    import onnx
    from onnx import numpy_helper

    bundle, _ = quantised
    graph = onnx.load(str(Path(bundle.path, "variants", "onnx-int8", "model.onnx"))).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    zero_points = [constants[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(zero_points) >= 6
    assert all(point.dtype == np.int8 and not point.any() for point in zero_points)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        pixels, weights = (makers[name] for name in node.input[:2])
        assert (pixels.op_type, weights.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert constants[pixels.input[1]].ndim == 0
        num_outputs = constants[makers[weights.input[0]].input[0]].shape[0]
        assert constants[weights.input[1]].shape == (num_outputs,)


def test_a_gpu_needs_tensorrt(float_graph: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UsageError, match=r"tensorrt is not installed; pip install 'imgbatch\[tensorrt\]'"):
        OnnxGraph(float_graph, device="cuda", batch_size=8, num_threads=None)


def test_the_extra_for_gpus_brings_the_libraries_that_torch_does_not():
    toolkit = next(
        (re.search(r"^cuda-toolkit\[(.*?)\]", line) for line in requires("torch") or () if "toolkit" in line), None
    )
    if toolkit is None:
        pytest.skip("this torch has no CUDA")
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = " ".join(pyproject["project"]["optional-dependencies"]["tensorrt"])
    # What the CUDA provider of ONNX Runtime is linked with, beside cuDNN.
    needed = {"cublas", "cudart", "cufft", "curand", "nvrtc"}
    assert {name for name in needed - set(toolkit[1].split(",")) if f"nvidia-{name}" not in extra} == set()


class Builder:
    """Keeps engines as ONNX Runtime does: loads one that is there, and writes one that it has built."""

    def __init__(self, *, is_ended: bool = False, meeting: Barrier | None = None) -> None:
        """
        Args:
            meeting: of those that build at the same time; who builds alone does not wait for long.
        """
        self.is_ended = is_ended
        self.meeting = meeting
        self.places: list[Path] = []
        """Where it has built one."""
        self.options: set[str] = set()

    def __call__(self, options: Mapping[str, Any]) -> str:
        if not options:
            return "not kept"
        engine = Path(options["trt_engine_cache_path"], "a.engine")
        self.options.update(options)
        if engine.exists():
            if engine.read_text() != "whole":
                raise EPFail(f"TensorRT EP could not deserialize engine from cache: {engine}")
            return "loaded"
        engine.write_text("torn")
        if self.is_ended:
            raise KeyboardInterrupt
        if self.meeting:
            with contextlib.suppress(BrokenBarrierError):
                self.meeting.wait(timeout=2)
        engine.write_text("whole")
        self.places.append(engine.parent)
        return "built"


@pytest.fixture(name="cache")
def cache_in_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "imgbatch" / "tensorrt"


def test_an_engine_is_built_once_and_comes_whole(cache: Path):
    builder = Builder()
    assert [load_with_engines(name, builder) for name in ("a-8", "a-8", "a-1")] == ["built", "loaded", "built"]
    assert sorted(path.name for path in cache.iterdir()) == ["a-1", "a-1.lock", "a-8", "a-8.lock"]
    assert not any(place.exists() for place in builder.places), "they were built beside where they are kept"
    # A timing cache would be one file of all that build, of every version, and one that is torn ends every build.
    assert builder.options == {"trt_engine_cache_enable", "trt_engine_cache_path"}


def test_of_those_that_start_at_once_one_builds_the_engine_and_the_others_wait(cache: Path):
    builder = Builder(meeting=Barrier(2))
    with ThreadPoolExecutor(2) as actors:
        made = list(actors.map(load_with_engines, ["a-8"] * 2, [builder] * 2))
    assert sorted(made) == ["built", "loaded"]
    assert sorted(path.name for path in cache.iterdir()) == ["a-8", "a-8.lock"]


def test_an_engine_is_of_one_version_and_one_kind_of_gpu(float_graph: bytes, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

    names: list[str] = []

    def on_cpu(name: str, _load: object) -> Any:
        names.append(name)
        return onnxruntime.InferenceSession(float_graph, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(onnx_predict, "load_with_engines", on_cpu)
    same = ("10.14", "1.32", (7, 5), 8)
    for tensorrt, version, capability, batch_size in (
        same,
        same,
        ("11.0", *same[1:]),
        ("10.14", "1.33", *same[2:]),
        ("10.14", "1.32", (8, 9), 8),
        (*same[:3], 16),
    ):
        package = ModuleType("tensorrt")
        package.__dict__["__version__"] = tensorrt
        monkeypatch.setitem(sys.modules, "tensorrt", package)
        monkeypatch.setattr(onnxruntime, "__version__", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index, found=capability: found)
        OnnxGraph(float_graph, device="cuda", batch_size=batch_size, num_threads=None)
    assert names[0] == names[1]
    assert len(set(names)) == 5


def test_whoever_is_ended_while_it_builds_an_engine_leaves_none(cache: Path):
    with pytest.raises(KeyboardInterrupt):
        load_with_engines("a-8", Builder(is_ended=True))
    assert [path.name for path in cache.iterdir()] == ["a-8.lock"]
    assert load_with_engines("a-8", Builder()) == "built"


def test_an_engine_that_does_not_serve_is_built_once_more(cache: Path):
    (cache / "a-8").mkdir(parents=True)
    (cache / "a-8" / "a.engine").write_text("torn")
    assert [load_with_engines("a-8", Builder()) for _ in range(2)] == ["built", "loaded"]


def test_engines_are_not_kept_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_with_engines("a-8", Builder()) == "not kept"


def test_without_the_package_one_line_says_what_to_install(
    tiny_model: ModelBundle, float_graph: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime is not installed; pip install 'imgbatch\[onnxruntime\]'"):
        predictor_over(tiny_model, float_graph, batch_size=8)


def test_a_graph_gives_no_features(tiny_model: ModelBundle, float_graph: bytes):
    graph = OnnxGraph(float_graph, device="cpu", batch_size=8, num_threads=1)
    with pytest.raises(ValueError, match="gives no features"):
        Predictor(tiny_model, graph=graph, features=True)
