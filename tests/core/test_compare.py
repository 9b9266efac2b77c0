"""Two outputs side by side, held to the same figures computed from the arrays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest
from sklearn import metrics as oracle

from imgbatch.core.compare import compare
from imgbatch.errors import UsageError

CLASSES = ("ash", "birch", "cedar", "elm")


def make_probs(targets_N: np.ndarray, strength: float, seed: int) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(len(targets_N), 4))
    logits += strength * (targets_N[:, None] == np.arange(4))
    exp = np.exp(logits)
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def targets() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, 600)


def test_differences_equal_those_of_the_arrays(store_run, targets, tmp_path):
    a, b = make_probs(targets, 1.5, 1), make_probs(targets, 2.5, 2)
    columns = {"target": [CLASSES[t] for t in targets]}
    out_a = store_run(CLASSES, a, columns=columns, out="a")
    # The second output holds other images too, its classes stand in another order, and it lacks one image.
    order = [2, 0, 3, 1]
    ids = [f"image-{i}" for i in range(1, 600)] + ["elsewhere"]
    out_b = store_run(
        [CLASSES[k] for k in order], np.roll(b[:, order], -1, axis=0), out="b", image_ids=ids, model_id="m2"
    )
    result = compare(str(out_a), str(out_b), directory=str(tmp_path / "diff"))
    figures = result.figures
    assert figures["images"] == {"in_a": 600, "in_b": 600, "both": 599, "with_target": 599, "of_train_split": 0}
    truth, said_a, said_b = targets[1:], a.argmax(axis=1)[1:], b.argmax(axis=1)[1:]
    right_a, right_b = said_a == truth, said_b == truth
    assert figures["outcomes"] == {
        "both_right": (right_a & right_b).sum(),
        "only_a_right": (right_a & ~right_b).sum(),
        "only_b_right": (~right_a & right_b).sum(),
        "both_wrong": (~right_a & ~right_b).sum(),
        "no_target": 0,
    }
    only_a, only_b = figures["mcnemar"]["only_a"], figures["mcnemar"]["only_b"]
    assert figures["mcnemar"]["p_value"] == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, abs=1e-6)
    assert figures["top1"]["difference"] == pytest.approx(right_b.mean() - right_a.mean())
    expected = [oracle.f1_score(truth, said, average="macro") for said in (said_a, said_b)]
    assert [figures["macro_f1"][name] for name in "ab"] == pytest.approx(expected)
    expected = [oracle.balanced_accuracy_score(truth, said) for said in (said_a, said_b)]
    assert [figures["balanced_accuracy"][name] for name in "ab"] == pytest.approx(expected)
    for name in ("top1", "macro_f1", "balanced_accuracy"):
        low, high = figures[name]["interval"]
        assert 0 < low < figures[name]["difference"] < high
    f1_a, f1_b = (oracle.f1_score(truth, said, average=None) for said in (said_a, said_b))
    for entry in figures["per_class"]:
        k = CLASSES.index(entry["class_name"])
        assert entry["f1_difference"] == pytest.approx(f1_b[k] - f1_a[k])
        assert entry["only_b_right"] == (~right_a & right_b & (truth == k)).sum()
    changes = [abs(entry["f1_difference"]) for entry in figures["per_class"]]
    assert changes == sorted(changes, reverse=True)
    assert figures["agreement"] == pytest.approx((said_a == said_b).mean())
    listed = pq.read_table(tmp_path / "diff" / "disagreements.parquet").to_pylist()
    assert len(listed) == figures["disagreements"]["found"] == (said_a != said_b).sum()
    sureness = [row["probability_a"] + row["probability_b"] for row in listed]
    assert sureness == sorted(sureness, reverse=True)
    assert figures["label_changes"][0]["count"] >= figures["label_changes"][-1]["count"]
    assert json.loads(Path(tmp_path, "diff", "compare.json").read_text()) == figures


def test_the_same_labels_differ_in_nothing(store_run, targets):
    probs = make_probs(targets, 1.5, 1)
    columns = {"target": [CLASSES[t] for t in targets]}
    outs = [str(store_run(CLASSES, probs, columns=columns, out=name)) for name in "ab"]
    result = compare(*outs)
    assert result.figures["agreement"] == 1
    assert result.figures["mcnemar"]["p_value"] == 1
    assert result.figures["top1"]["interval"] == [0, 0]
    assert result.directory.endswith("runs/r000000000001/compare-r000000000001")


def test_multi_label_is_compared_label_by_label(store_run):
    rng = np.random.default_rng(3)
    truth = rng.random((500, 4)) < 0.4
    a, b = (np.clip(rng.random((500, 4)) * 0.8 + s * truth, 0, 1).astype(np.float32) for s in (0.1, 0.3))
    lists = pa.array([[CLASSES[k] for k in np.flatnonzero(row)] for row in truth], pa.list_(pa.string()))
    outs = [
        str(store_run(CLASSES, probs, task="multilabel", columns={"targets": lists}, out=name))
        for name, probs in (("a", a), ("b", b))
    ]
    figures = compare(*outs).figures
    said_a, said_b = a >= 0.5, b >= 0.5
    exact = [oracle.accuracy_score(truth, said) for said in (said_a, said_b)]
    assert [figures["exact_match"][name] for name in "ab"] == pytest.approx(exact)
    expected = [oracle.f1_score(truth, said, average="macro") for said in (said_a, said_b)]
    assert [figures["macro_f1"][name] for name in "ab"] == pytest.approx(expected)
    low, high = figures["macro_f1"]["interval"]
    assert low < figures["macro_f1"]["difference"] < high
    for entry in figures["per_class"]:
        k = CLASSES.index(entry["class_name"])
        assert entry["precision_a"] == pytest.approx(oracle.precision_score(truth[:, k], said_a[:, k]))
        assert entry["recall_b"] == pytest.approx(oracle.recall_score(truth[:, k], said_b[:, k]))
        assert entry["only_a_right"] == (truth & said_a & ~said_b)[:, k].sum()


def test_labels_that_a_resample_does_not_hold_do_not_narrow_a_difference(store_run):
    truth = np.eye(100, 4, dtype=bool)
    lists = pa.array([[CLASSES[k] for k in np.flatnonzero(row)] for row in truth], pa.list_(pa.string()))
    a, b = np.where(truth, 0.9, 0.1).astype(np.float32), np.full((100, 4), 0.1, np.float32)
    outs = [
        str(store_run(CLASSES, probs, task="multilabel", columns={"targets": lists}, out=name))
        for name, probs in (("a", a), ("b", b))
    ]
    macro_f1 = compare(*outs).figures["macro_f1"]
    assert macro_f1["difference"] == -1
    assert macro_f1["interval"] == [-1, -1]


def test_without_targets_agreement_is_told(store_run, targets):
    probs = [make_probs(targets, 1.5, seed) for seed in (1, 2)]
    outs = [str(store_run(CLASSES, p, out=name)) for name, p in zip("ab", probs, strict=True)]
    figures = compare(*outs).figures
    assert figures["agreement"] == pytest.approx((probs[0].argmax(axis=1) == probs[1].argmax(axis=1)).mean())
    assert figures["outcomes"]["no_target"] == 600
    assert "mcnemar" not in figures


def test_targets_from_a_manifest_and_unknown_ones(store_run, targets, tmp_path):
    probs = [make_probs(targets, strength, 1) for strength in (1.0, 2.0)]
    outs = [str(store_run(CLASSES, p, out=name)) for name, p in zip("ab", probs, strict=True)]
    ids = [f"image-{i}" for i in range(100)]
    names = ["oak", *(CLASSES[t] for t in targets[1:100])]
    pq.write_table(pa.table({"image_id": ids, "uri": ids, "target": names}), tmp_path / "targets.parquet")
    figures = compare(*outs, manifest=str(tmp_path / "targets.parquet")).figures
    assert figures["images"]["with_target"] == 100
    assert figures["outcomes"]["no_target"] == 500
    right_b = (probs[1].argmax(axis=1) == targets)[1:100].sum()
    assert figures["top1"]["b"] == pytest.approx(right_b / 100)


def test_wrong_usage_is_one_line(store_run, targets, tmp_path):
    probs = make_probs(targets, 1.5, 1)
    out = str(store_run(CLASSES, probs, columns={"target": [CLASSES[t] for t in targets]}))
    with pytest.raises(UsageError, match="no finished run"):
        compare(out, str(tmp_path / "nowhere"))
    elsewhere = str(store_run(CLASSES, probs[:1], out="elsewhere", image_ids=["other"]))
    with pytest.raises(UsageError, match="no image_id in common"):
        compare(out, elsewhere)
    lists = {"targets": pa.array([["ash"]] * 600)}
    several = str(store_run(CLASSES, probs, task="multilabel", columns=lists, out="several"))
    with pytest.raises(UsageError, match="cannot be compared"):
        compare(out, several)
