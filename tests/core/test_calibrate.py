"""Temperature and thresholds from stored probabilities, written as a bundle with the same weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, logit, softmax

from imgbatch.core.calibrate import calibrate
from imgbatch.core.metrics import temperature, thresholds
from imgbatch.core.model import ModelBundle, load_bundle, save_bundle
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.variants import Agreement, Variant, load_variants, read_files, save_variant
from imgbatch.errors import UsageError

CLASSES = ("ash", "birch", "cedar", "elm")


def overconfident(seed: int = 0, num_rows: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits three times too large for the targets that are drawn from them, probabilities float32, targets."""
    rng = np.random.default_rng(seed)
    honest = 1.5 * rng.normal(size=(num_rows, 4))
    targets = np.array([rng.choice(4, p=p) for p in softmax(honest, axis=1)])
    return 3 * honest, softmax(3 * honest, axis=1).astype(np.float32), targets


def several_labels() -> tuple[np.ndarray, dict[str, pa.Array]]:
    """Probabilities float32 of logits three times too large for the labels that are drawn from them; ``targets``."""
    rng = np.random.default_rng(4)
    honest = 2 * rng.normal(size=(2000, 4))
    truth = rng.random(honest.shape) < expit(honest)
    lists = [[CLASSES[k] for k in np.flatnonzero(row)] for row in truth]
    return expit(3 * honest).astype(np.float32), {"targets": pa.array(lists, pa.list_(pa.string()))}


@pytest.fixture
def make_model(tmp_path: Path):
    def make(task="multiclass", class_names=CLASSES, factor=1.0, thresholds=None) -> ModelBundle:
        import torch

        from imgbatch.core.simple_cnn import SimpleCNN

        torch.manual_seed(0)
        return save_bundle(
            str(tmp_path / "model"),
            arch="simple_cnn",
            task=task,
            class_names=class_names,
            preprocess=PreprocessSpec(resize_size=16, crop_size=16),
            state_dict=SimpleCNN(num_classes=len(class_names)).state_dict(),
            temperature=factor,
            thresholds=thresholds or {"accept": {class_names[0]: 0.5}},
            provenance={"made_by": "a test"},
            metrics={"top1": 0.5},
        )

    return make


def test_the_softmax_temperature_minimises_the_likelihood_of_the_logits():
    logits, probs, targets = overconfident()

    def loss(factor: float) -> float:
        return -log_softmax(logits / factor, axis=1)[np.arange(len(targets)), targets].mean()

    best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7}).x
    fitted = temperature.fit_softmax_temperature(probs, targets[:, None] == np.arange(4))
    assert fitted == pytest.approx(best, rel=1e-3)
    assert fitted == pytest.approx(3, rel=0.1)
    scaled = temperature.scale_softmax(probs, fitted)
    np.testing.assert_allclose(scaled, softmax(logits / fitted, axis=1), atol=1e-5)


def test_each_label_gets_the_temperature_that_minimises_its_own_loss():
    rng = np.random.default_rng(1)
    honest = 2 * rng.normal(size=(3000, 3))
    truth = rng.random(honest.shape) < expit(honest)
    truth[:, 2] = False
    logits = honest * [2.0, 0.5, 1.0]
    probs = expit(logits).astype(np.float32)
    fitted = temperature.fit_sigmoid_temperatures(probs, truth)
    for k in range(2):

        def loss(factor: float, k: int = k) -> float:
            signed = np.where(truth[:, k], 1, -1) * logits[:, k] / factor
            return np.logaddexp(0, -signed).mean()

        best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7}).x
        assert fitted[k] == pytest.approx(best, rel=1e-3)
    signed = np.where(truth, 1, -1) * logits
    pooled = minimize_scalar(lambda f: np.logaddexp(0, -signed / f).sum(), bounds=(0.05, 20), method="bounded").x
    assert fitted[2] == pytest.approx(pooled, rel=1e-3)
    np.testing.assert_allclose(temperature.scale_sigmoid(probs, fitted), expit(logit(probs) / fitted), atol=1e-5)


def test_temperatures_stay_within_their_limits():
    certain = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    right = np.array([[True, False], [False, True]])
    assert temperature.fit_softmax_temperature(certain, right) == pytest.approx(temperature.LOWEST, rel=1e-3)
    assert temperature.fit_softmax_temperature(certain, ~right) == pytest.approx(temperature.HIGHEST, rel=1e-3)
    assert temperature.fit_softmax_temperature(certain[:0], right[:0]) == 1.0
    saturated = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    assert np.isfinite(temperature.fit_softmax_temperature(saturated, ~right))
    assert np.isfinite(temperature.scale_softmax(saturated, 2.0)).all()


@pytest.mark.parametrize("factor", [0.05, 0.5, 1.0, 3.0, 20.0])
def test_a_threshold_is_taken_to_another_temperature(factor):
    for threshold in (0.0, 0.02, 0.1, 0.2, 0.5, 0.93, 1.0):
        moved = temperature.scale_threshold(threshold, factor)
        assert moved == pytest.approx(expit(logit(threshold) / factor), rel=1e-9, abs=0)
        assert (moved > 0) == (np.float32(moved) > 0) == (threshold > 0)
        if factor == 1 or threshold in (0.0, 0.5, 1.0):
            assert moved == threshold


def test_thresholds_for_precision_and_for_a_budget():
    confidence = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    right = np.array([True, True, False, True, False])
    # Three of four are right from 0.6 on, which shows 0.53; both of two from 0.8 on 0.74.
    assert thresholds.for_precision(confidence, right, 0.52) == pytest.approx(0.6)
    assert thresholds.for_precision(confidence, right, 0.73) == pytest.approx(0.8)
    assert thresholds.for_precision(confidence, right, 0.75) is None
    assert thresholds.for_precision(confidence, np.ones(5, bool), 1) is None
    assert thresholds.for_precision(confidence[:0], right[:0], 0.5) is None
    threshold = thresholds.for_review_budget(confidence, 0.4)
    assert (confidence < threshold).sum() == 2
    assert thresholds.for_review_budget(confidence, 0) == pytest.approx(0.5)
    assert thresholds.for_review_budget(confidence, 1) == 1
    tied = np.full(10, 0.5, np.float32)
    assert (tied < thresholds.for_review_budget(tied, 0.3)).sum() == 0


@pytest.mark.parametrize("num_rows", [300, 3000])
def test_a_precision_holds_on_new_rows_too(num_rows):
    rng = np.random.default_rng(5)
    held = []
    for _ in range(200):
        confidence = rng.beta(4, 1, num_rows)
        threshold = thresholds.for_precision(confidence, rng.random(num_rows) < confidence, 0.9)
        # Of Beta(4, 1), which is right as often as it says: the mean from the threshold on.
        held.append(0.8 * (1 - threshold**5) / (1 - threshold**4) >= 0.9)
    assert 0.7 <= np.mean(held) <= 0.9


def test_the_new_bundle_has_the_same_weights_and_another_calibration(store_run, make_model, tmp_path):
    bundle = make_model(factor=2.0)
    _, probs, targets = overconfident()
    names = [CLASSES[t] for t in targets]
    names[0] = "oak"
    out = store_run(CLASSES, probs, columns={"target": names}, model_id=bundle.model_id)
    new = str(tmp_path / "calibrated")
    result = calibrate(str(out), model=bundle.path, new_model=new, target_precision=0.8)
    calibrated = load_bundle(new)
    assert calibrated == result.bundle
    assert calibrated.model_id != bundle.model_id
    weights = [Path(path, "model.safetensors").read_bytes() for path in (bundle.path, new)]
    assert weights[0] == weights[1]
    factor = result.report["temperature_factor"]
    assert calibrated.temperature == pytest.approx(2 * factor)
    assert result.report["after"]["log_loss"] < result.report["before"]["log_loss"]
    assert result.report["after"]["expected_calibration_error"] < 0.03
    accept = calibrated.thresholds["accept"]
    scaled = temperature.scale_softmax(probs, factor)
    for k, name in enumerate(CLASSES):
        accepted = (scaled.argmax(axis=1) == k) & (scaled.max(axis=1) >= accept[name])
        right = (targets == k) & (np.arange(len(targets)) > 0)
        assert right[accepted].mean() >= 0.8
    assert result.report["accept"]["rows"] == len(targets)
    stored = json.loads(Path(new, "metrics.json").read_text())
    assert stored["top1"] == 0.5
    assert stored["calibration"] == result.report
    assert calibrated.provenance["made_by"] == "a test"
    assert calibrated.provenance["calibration"]["calibrated_model"] == bundle.model_id


def test_a_review_budget_is_kept(store_run, make_model, tmp_path):
    bundle = make_model()
    _, probs, targets = overconfident()
    out = store_run(CLASSES, probs, columns={"target": [CLASSES[t] for t in targets]}, model_id=bundle.model_id)
    result = calibrate(str(out), model=bundle.path, new_model=str(tmp_path / "new"), review_budget=0.1)
    assert 0.09 < result.report["accept"]["review_rate"] <= 0.1
    assert len(set(result.bundle.thresholds["accept"].values())) == 1


def test_multi_label_thresholds_say_when_a_label_applies(store_run, make_model, tmp_path):
    bundle = make_model(task="multilabel")
    probs, columns = several_labels()
    truth = np.array([[name in names for name in CLASSES] for names in columns["targets"].to_pylist()])
    out = store_run(CLASSES, probs, task="multilabel", columns=columns, model_id=bundle.model_id)
    result = calibrate(str(out), model=bundle.path, new_model=str(tmp_path / "new"), target_precision=0.9)
    assert result.bundle.temperature == pytest.approx((3, 3, 3, 3), rel=0.2)
    applies = result.bundle.thresholds["labels"]
    scaled = temperature.scale_sigmoid(probs, np.array(result.bundle.temperature))
    for k, name in enumerate(CLASSES):
        assert truth[scaled[:, k] >= applies[name], k].mean() >= 0.9
    assert result.report["accept"]["precision"] >= 0.9


@pytest.mark.parametrize("goal", [{}, {"review_budget": 0.1}], ids=["temperature only", "a review budget"])
def test_the_same_labels_apply_at_the_new_temperature(store_run, make_model, tmp_path, goal):
    stated = {"ash": 0.2, "birch": 0.8, "cedar": 0.5}
    bundle = make_model(task="multilabel", thresholds={"labels": stated, "accept": {"ash": 0.5}})
    probs, columns = several_labels()
    out = store_run(CLASSES, probs, task="multilabel", columns=columns, model_id=bundle.model_id)
    result = calibrate(str(out), model=bundle.path, new_model=str(tmp_path / "new"), **goal)
    moved = result.bundle.thresholds["labels"]
    assert moved.keys() == stated.keys()
    assert moved["cedar"] == 0.5
    assert moved["ash"] > 0.3
    assert moved["birch"] < 0.7
    scaled = temperature.scale_sigmoid(probs, np.array(result.bundle.temperature))
    for k, name in enumerate(stated):
        np.testing.assert_array_equal(scaled[:, k] >= moved[name], probs[:, k] >= stated[name])
    assert result.bundle.thresholds.get("accept") != {"ash": 0.5}


def test_labels_keep_their_thresholds_where_the_temperature_stays(store_run, make_model, tmp_path):
    stated = {"ash": 0.2, "birch": 0.8}
    bundle = make_model(task="multilabel", thresholds={"labels": stated})
    probs, columns = several_labels()
    out = store_run(CLASSES, probs, task="multilabel", columns=columns, model_id=bundle.model_id, keep="top_k")
    result = calibrate(str(out), model=bundle.path, new_model=str(tmp_path / "new"))
    assert result.bundle.thresholds == {"labels": stated}


@pytest.mark.parametrize("target_precision", [None, 0.9])
def test_variants_come_along(store_run, make_model, tmp_path, target_precision):
    bundle = make_model(task="multilabel", thresholds={"labels": {"ash": 0.2}})
    agreement = {"images": 9, "labels": 1, "largest_difference": 0, "mean_difference": 0, "images_with_target": 0}
    contents = {"model.xml": b"<net/>", "model.bin": b"\0\1"}
    variant = Variant(
        target="openvino-fp32",
        device="cpu",
        weights_sha256=bundle.weights_sha256,
        crop_size=16,
        mean=bundle.preprocess.mean,
        std=bundle.preprocess.std,
        files={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        batch_size=4,
        images_per_s={"original": 1.0, "variant": 2.0},
        agreement=Agreement(**agreement),
        provenance={},
    )
    save_variant(bundle, variant, contents)
    probs, columns = several_labels()
    out = store_run(CLASSES, probs, task="multilabel", columns=columns, model_id=bundle.model_id)
    new = str(tmp_path / "new")
    result = calibrate(str(out), model=bundle.path, new_model=new, target_precision=target_precision)
    assert load_variants(load_bundle(new)) == [variant]
    assert read_files(load_bundle(new), variant) == contents
    told = result.report["variants"]
    assert told["copied"] == ["openvino-fp32"]
    assert (told["note"] is None) == (target_precision is None)
    assert target_precision is None or bundle.model_id in told["note"]


def test_from_the_best_classes_only_thresholds_are_chosen(store_run, make_model, tmp_path):
    bundle = make_model()
    _, probs, targets = overconfident()
    columns = {"target": [CLASSES[t] for t in targets]}
    out = store_run(CLASSES, probs, columns=columns, model_id=bundle.model_id, keep="top_k")
    result = calibrate(str(out), model=bundle.path, new_model=str(tmp_path / "new"), review_budget=0.25)
    assert result.bundle.temperature == 1.0
    assert "only the best classes" in result.report["unavailable"]["temperature_factor"]
    assert result.report["accept"]["review_rate"] == pytest.approx(0.25, abs=0.01)


def test_wrong_usage_is_one_line(store_run, make_model, tmp_path):
    bundle = make_model()
    _, probs, targets = overconfident(num_rows=50)
    columns = {"target": [CLASSES[t] for t in targets]}
    other = str(store_run(CLASSES, probs, columns=columns))
    new = str(tmp_path / "new")
    with pytest.raises(UsageError, match="was labelled by m000000000001"):
        calibrate(other, model=bundle.path, new_model=new)
    with pytest.raises(UsageError, match="give one of them"):
        calibrate(other, model=bundle.path, new_model=new, target_precision=0.9, review_budget=0.1)
    out = str(store_run(CLASSES, probs, columns=columns, model_id=bundle.model_id, out="out2"))
    with pytest.raises(UsageError, match="the model itself"):
        calibrate(out, model=bundle.path, new_model=bundle.path)
    with pytest.raises(UsageError, match="the model itself"):
        calibrate(out, model=bundle.path, new_model=f"{bundle.path}/../{Path(bundle.path).name}/")
    unknown = str(store_run(CLASSES, probs, columns={"target": ["oak"] * 50}, model_id=bundle.model_id, out="out3"))
    with pytest.raises(UsageError, match="no row has both"):
        calibrate(unknown, model=bundle.path, new_model=new)
    assert not Path(new).exists()
