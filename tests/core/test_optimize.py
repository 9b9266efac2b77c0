from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from imgbatch.config import Config, load_config
from imgbatch.core import backends, optimize, storage
from imgbatch.core.architectures import build_network
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.machine import has_bfloat16
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_metrics, recalibrate_bundle
from imgbatch.core.openvino_build import allowed_drop
from imgbatch.core.optimize import _Built, _candidates, batch_sizes, measure_rate, optimize_bundle
from imgbatch.core.pictures import load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.core.predictions import BatchedPredictor, BatchOutput, probabilities
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.variants import Target, Variant, load_variants
from imgbatch.errors import UsageError

MakeBundle = Callable[..., ModelBundle]


@pytest.fixture(name="images_NHWC", scope="module")
def load_images(photo_manifest: Path, tiny_model: ModelBundle) -> np.ndarray:
    return load_pictures(open_manifest(str(photo_manifest)), tiny_model.preprocess, Config(), limit=60).images_NHWC


def variant_of(bundle: ModelBundle, target: str) -> Variant:
    return next(variant for variant in load_variants(bundle) if variant.target == target)


def predictor_of(bundle: ModelBundle, target: str, batch_size: int = 8) -> BatchedPredictor:
    backend = Backend(variant_of(bundle, target))
    return build_predictor(bundle, backend, device="cpu", batch_size=batch_size, num_threads=1)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_openvino_says_what_torch_says(optimized_model: ModelBundle, images_NHWC: np.ndarray, batch_size: int):
    images_NHWC.setflags(write=False)  # as Ray hands them out
    expected = Predictor(optimized_model).predict(images_NHWC)
    given = predictor_of(optimized_model, "openvino-fp32", batch_size).predict(images_NHWC)
    np.testing.assert_array_equal(given.probs_NK.argmax(axis=1), expected.probs_NK.argmax(axis=1))
    np.testing.assert_allclose(given.probs_NK, expected.probs_NK, atol=1e-3)
    assert given.errors == [None] * len(images_NHWC)
    assert given.features_ND is None


def test_threads_that_share_a_variant_get_what_one_gets(optimized_model: ModelBundle, images_NHWC: np.ndarray):
    backend = Backend(variant_of(optimized_model, "openvino-int8"))
    shared = build_predictor(optimized_model, backend, device="cpu", batch_size=8, num_threads=1, streams=2)
    expected_NK = shared.predict(images_NHWC).probs_NK
    with ThreadPoolExecutor(2) as threads:
        for predictions in threads.map(shared.predict, [images_NHWC] * 8):
            np.testing.assert_array_equal(predictions.probs_NK, expected_NK)


def test_what_is_recorded_is_what_comes_out(optimized_model: ModelBundle, photo_manifest: Path):
    images_NHWC = load_pictures(open_manifest(str(photo_manifest)), optimized_model.preprocess, Config()).images_NHWC[
        1::2
    ]
    expected_NK = Predictor(optimized_model).predict(images_NHWC).probs_NK
    variant = variant_of(optimized_model, "openvino-int8")
    given_NK = predictor_of(optimized_model, "openvino-int8", variant.batch_size).predict(images_NHWC).probs_NK
    agreement = variant.agreement
    assert agreement.images == agreement.images_with_target == len(images_NHWC)
    assert agreement.labels == (expected_NK.argmax(axis=1) == given_NK.argmax(axis=1)).mean()
    assert agreement.largest_difference == pytest.approx(np.abs(expected_NK - given_NK).max(), abs=1e-6)
    assert 0 < agreement.mean_difference < agreement.largest_difference < 0.1
    assert agreement.original_accuracy is not None
    assert variant.provenance["quantised"] == "post-training, accuracy drop at most 0.022 on 57 images"


def test_int8_may_lose_half_a_percent_or_what_chance_takes_from_few_images():
    assert allowed_drop(10_000) == 0.005
    rng = np.random.default_rng(0)
    changed_NB = rng.random((171, 20_000)) < 0.01
    drop_B = (changed_NB * rng.choice([-1, 1], changed_NB.shape)).sum(axis=0) / 171
    # Images are whole: two of them are within it, three are not.
    assert 0.01 < (drop_B > allowed_drop(171)).mean() < 0.05


def test_int8_is_smaller_and_another_variant(optimized_model: ModelBundle):
    sizes = {
        target: Path(optimized_model.path, "variants", target, "model.bin").stat().st_size
        for target in ("openvino-fp32", "openvino-int8")
    }
    assert sizes["openvino-int8"] < 0.4 * sizes["openvino-fp32"]
    fp32 = variant_of(optimized_model, "openvino-fp32")
    assert fp32.variant_id != variant_of(optimized_model, "openvino-int8").variant_id
    assert fp32.agreement.labels == 1


@pytest.mark.usefixtures("openvino")
def test_a_multilabel_model_has_no_accuracy_but_an_agreement(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray
):
    bundle = make_bundle(task="multilabel", temperature=(1.0, 2.0, 0.5))
    _, variant = optimize_bundle(bundle.path, target="openvino-int8", calibration=str(photo_manifest))
    assert variant.agreement.images_with_target == 0
    assert variant.agreement.variant_accuracy is None
    assert variant.provenance["quantised"] == "post-training, no targets to control the accuracy with"
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    given_NK = predictor_of(bundle, "openvino-int8").predict(images_NHWC).probs_NK
    np.testing.assert_allclose(given_NK, expected_NK, atol=0.1)


def test_bfloat16_says_nearly_what_torch_says_on_the_device_that_is_asked_for(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    bundle = make_bundle()
    config = load_config(assignments=["resources.device=cpu"])
    _, variant = optimize_bundle(bundle.path, target="torch-bf16", calibration=str(photo_manifest), config=config)
    assert (variant.device, variant.files) == ("cpu", {})
    given_NK = predictor_of(bundle, "torch-bf16").predict(images_NHWC[:11]).probs_NK
    expected_NK = Predictor(bundle).predict(images_NHWC[:11]).probs_NK
    np.testing.assert_allclose(given_NK, expected_NK, atol=0.02)
    assert (given_NK != expected_NK).any()


@pytest.mark.usefixtures("openvino")
@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16 arithmetic")
def test_bfloat16_in_openvino_says_nearly_what_torch_says(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray
):
    bundle = make_bundle()
    for target in ("openvino-fp32", "openvino-bf16"):
        optimize_bundle(bundle.path, target=target, calibration=str(photo_manifest))
    full, reduced = variant_of(bundle, "openvino-fp32"), variant_of(bundle, "openvino-bf16")
    # The same weights, and yet another variant: it gives other probabilities.
    assert full.files["model.bin"] == reduced.files["model.bin"]
    assert full.variant_id != reduced.variant_id
    given_NK = predictor_of(bundle, "openvino-bf16").predict(images_NHWC[:11]).probs_NK
    expected_NK = predictor_of(bundle, "openvino-fp32").predict(images_NHWC[:11]).probs_NK
    np.testing.assert_allclose(given_NK, expected_NK, atol=0.02)
    assert (given_NK != expected_NK).any()


@pytest.mark.usefixtures("openvino")
def test_bfloat16_is_not_measured_where_it_would_be_float32(
    make_bundle: MakeBundle, photo_manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "has_bfloat16", lambda: False)
    bundle = make_bundle()
    with pytest.raises(UsageError, match=r"^openvino-bf16: this processor has no bfloat16 arithmetic; make"):
        optimize_bundle(bundle.path, target="openvino-bf16", calibration=str(photo_manifest))
    assert load_variants(bundle) == []


def test_a_gpu_that_is_asked_for_must_be_there(
    make_bundle: MakeBundle, photo_manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path, config = make_bundle().path, load_config(assignments=["resources.device=cuda"])
    with pytest.raises(UsageError, match=r"^torch-compile: resources\.device is cuda, and torch finds no GPU here$"):
        optimize_bundle(path, target="torch-compile", calibration=str(photo_manifest), config=config)


@pytest.mark.parametrize(("device", "said"), [("cpu", "resources.device is cpu"), ("auto", "torch finds none here")])
def test_float16_is_for_gpus_only(
    make_bundle: MakeBundle, photo_manifest: Path, monkeypatch: pytest.MonkeyPatch, device: str, said: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cpu")
    bundle, config = make_bundle(), load_config(assignments=[f"resources.device={device}"])
    with pytest.raises(UsageError, match=rf"^torch-fp16: is for GPUs only, and {said}"):
        optimize_bundle(bundle.path, target="torch-fp16", calibration=str(photo_manifest), config=config)
    assert load_variants(bundle) == []


@pytest.fixture
def float16_on_cpus(monkeypatch: pytest.MonkeyPatch) -> Config:
    """The same arithmetic, only slower."""
    monkeypatch.setattr(optimize, "_ON_GPU", ())
    monkeypatch.setattr(optimize, "_MEASURE_S", 0.01)
    return load_config(assignments=["resources.device=cpu"])


def test_float16_is_closer_to_torch_than_bfloat16(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray, float16_on_cpus: Config
):
    bundle = make_bundle()
    expected_NK = Predictor(bundle).predict(images_NHWC).probs_NK
    largest = {}
    for target in ("torch-fp16", "torch-bf16"):
        optimize_bundle(bundle.path, target=target, calibration=str(photo_manifest), config=float16_on_cpus)
        given = predictor_of(bundle, target).predict(images_NHWC)
        assert given.errors == [None] * len(images_NHWC)
        largest[target] = np.abs(given.probs_NK - expected_NK).max()
    assert 0 < largest["torch-fp16"] < largest["torch-bf16"] / 2


def test_a_network_whose_numbers_float16_does_not_hold_gets_no_such_variant(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray, float16_on_cpus: Config
):
    weights = build_network("simple_cnn", 3).state_dict()
    # The same logits, by way of activations beyond 65,504.
    weights["features.4.weight"] *= 1e5
    weights["features.8.weight"] /= 1e5
    bundle = make_bundle(state_dict=weights)
    assert Predictor(bundle).predict(images_NHWC).errors == [None] * len(images_NHWC)
    with pytest.raises(UsageError, match=r"the variant gave nothing for \d+ of \d+ images: .* holds NaN or infinity$"):
        optimize_bundle(bundle.path, target="torch-fp16", calibration=str(photo_manifest), config=float16_on_cpus)
    assert load_variants(bundle) == []


def test_a_copy_keeps_what_it_was_given_since(
    make_bundle: MakeBundle, photo_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(optimize, "_MEASURE_S", 0.01)
    bundle, new = make_bundle(), str(tmp_path / "new")
    arguments = {"target": "torch-bf16", "calibration": str(photo_manifest), "output": new}
    copied, _ = optimize_bundle(bundle.path, **arguments)
    assert (copied.path, copied.model_id) == (new, bundle.model_id)
    storage.write_json(f"{new}/metrics.json", {"measured": "since"})
    optimize_bundle(bundle.path, **arguments)
    assert load_metrics(new) == {"measured": "since"}
    calibrated = {"thresholds": None, "provenance": {}, "metrics": {}}
    other = recalibrate_bundle(bundle, str(tmp_path / "calibrated"), temperature=2.0, **calibrated)
    before = Path(other.path, "model.json").read_bytes()
    with pytest.raises(UsageError, match=rf"^{other.path}: holds another model \({other.model_id}\); choose another"):
        optimize_bundle(bundle.path, **arguments | {"output": other.path})
    assert Path(other.path, "model.json").read_bytes() == before
    assert load_variants(other) == []


@pytest.mark.soak
def test_a_compiled_network_says_what_torch_says(
    make_bundle: MakeBundle, photo_manifest: Path, images_NHWC: np.ndarray
):
    bundle = make_bundle()
    _, variant = optimize_bundle(bundle.path, target="torch-compile", calibration=str(photo_manifest))
    assert (variant.device, variant.files, variant.agreement.labels) == ("cpu", {}, 1)
    given = predictor_of(bundle, "torch-compile", batch_size=8).predict(images_NHWC[:11])
    np.testing.assert_allclose(given.probs_NK, Predictor(bundle).predict(images_NHWC[:11]).probs_NK, atol=1e-5)
    reduced = Predictor(bundle, batch_size=8, compiled=True, reduced=torch.bfloat16).predict(images_NHWC[:11])
    np.testing.assert_allclose(reduced.probs_NK, given.probs_NK, atol=0.02)
    with pytest.raises(ValueError, match="gives no features"):
        Predictor(bundle, compiled=True, features=True)


@pytest.mark.parametrize(
    ("target", "device", "crop_size", "expected"),
    [
        ("torch-bf16", "cuda", 224, (64, 128, 256, 512)),
        ("torch-compile", "cuda", 384, (64, 128)),
        ("torch-bf16", "cuda", 512, (64,)),
        ("torch-bf16", "cuda", 1024, (16,)),
        ("onnx-int8", "cuda", 224, (256,)),
        ("onnx-int8", "cuda", 384, (128,)),
        ("onnx-int8", "cpu", 384, (1, 4, 8, 16, 32)),
        ("torch-compile", "cpu", 224, (8,)),
    ],
)
def test_no_batch_is_tried_that_a_unit_would_not_fill(
    target: Target, device: str, crop_size: int, expected: tuple[int, ...]
):
    assert batch_sizes(target, device, PreprocessSpec(resize_size=crop_size, crop_size=crop_size)) == expected


@pytest.mark.parametrize("error", [UsageError("does not run"), torch.OutOfMemoryError("CUDA out of memory")])
def test_batches_are_chosen_among_those_that_the_device_has_room_for(
    tiny_model: ModelBundle, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def build(built: _Built, batch_size: int, _num_threads: int | None) -> Predictor:
        if batch_size > fits:
            raise error
        return Predictor(built.bundle, batch_size=batch_size)

    monkeypatch.setattr(_Built, "build", build)
    built = _Built(tiny_model, "torch-bf16", "cpu", {}, {})
    fits = 4
    assert [candidate.batch_size for candidate in _candidates(built)] == [1, 4]
    fits = 0
    with pytest.raises(type(error)):
        _candidates(built)


def test_images_that_fail_are_none_that_were_done_fast(tiny_model: ModelBundle, images_NHWC: np.ndarray):
    class Failing(BatchedPredictor):
        def _forward(self, images_BHWC: np.ndarray) -> BatchOutput:
            raise RuntimeError(f"{len(images_BHWC)} images")

        def _collect(self, output: BatchOutput) -> BatchOutput:
            return output

    assert measure_rate(Failing(tiny_model, batch_size=4), images_NHWC[:4], 0.01) == 0
    assert measure_rate(Predictor(tiny_model, batch_size=4), images_NHWC[:4], 0.01) > 0


def test_too_few_images_say_too_little(tiny_model: ModelBundle, photos: list[Path], tmp_path: Path):
    pq.write_table(pa.table({"uri": [str(path) for path in photos[:30]]}), tmp_path / "m.parquet")
    with pytest.raises(UsageError, match=r"28 images could be decoded, and at least 50 are needed"):
        optimize_bundle(tiny_model.path, target="openvino-fp32", calibration=str(tmp_path / "m.parquet"))


def test_without_the_package_one_line_says_what_to_install(
    tiny_model: ModelBundle, photo_manifest: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed; pip install 'imgbatch\[openvino\]'"):
        optimize_bundle(tiny_model.path, target="openvino-fp32", calibration=str(photo_manifest))
    assert load_variants(tiny_model) == []


def test_numbers_that_are_none_are_not_made_into_probabilities():
    logits_BK = np.array([[1e4, 0, -1e4], [np.nan, 0, 0], [np.inf, 0, 0]], np.float32)
    single = probabilities(logits_BK, "multiclass", 1.0)
    np.testing.assert_array_equal(single.finite_B, [True, False, False])
    np.testing.assert_array_equal(single.probs_BK, [[1, 0, 0], [0, 0, 0], [0, 0, 0]])
    # A number that is none once it is divided is none either, as in torch.
    assert not probabilities(np.full((1, 3), 3e38, np.float32), "multiclass", 0.5).finite_B.any()
    several = probabilities(logits_BK, "multilabel", (1.0, 2.0, 1.0))
    np.testing.assert_array_equal(several.probs_BK, [[1, 0.5, 0], [0, 0, 0], [0, 0, 0]])
    assert several.probs_BK.dtype == np.float32
