"""Evaluation of stored predictions, held to scikit-learn on the same arrays."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as oracle

from imgbatch.core import rank_sample
from imgbatch.core.evaluate import evaluate
from imgbatch.core.metrics.intervals import wilson_interval
from imgbatch.errors import UsageError

CLASSES = ("ash", "birch", "cedar", "elm")


def make_probs(targets_N: np.ndarray, num_classes: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(targets_N), num_classes)) + 1.5 * (targets_N[:, None] == np.arange(num_classes))
    exp = np.exp(logits)
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def targets() -> np.ndarray:
    return np.random.default_rng(1).integers(0, len(CLASSES), 500)


def named(indices) -> list[str]:
    return [CLASSES[k] for k in indices]


def test_multiclass_metrics_equal_the_oracle(store_run, targets):
    probs = make_probs(targets, 4)
    metrics = evaluate(str(store_run(CLASSES, probs, columns={"target": named(targets)}))).metrics
    predicted = probs.argmax(axis=1)
    precision, recall, f1, support = oracle.precision_recall_fscore_support(targets, predicted)
    assert metrics["top1"] == pytest.approx(oracle.accuracy_score(targets, predicted))
    assert metrics["accuracy_of_all"] == metrics["top1"]
    assert metrics["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(targets, predicted))
    assert metrics["top5"] is None
    assert metrics["macro"]["f1"] == pytest.approx(f1.mean())
    assert metrics["log_loss"] == pytest.approx(oracle.log_loss(targets, probs), abs=1e-6)
    brier = oracle.brier_score_loss(targets, probs, scale_by_half=False, labels=range(4))
    assert metrics["brier"] == pytest.approx(brier, abs=1e-6)
    one_hot = targets[:, None] == np.arange(4)
    auc = oracle.roc_auc_score(one_hot, probs, average="macro")
    assert metrics["rank"]["roc_auc"] == pytest.approx(auc, abs=1e-6)
    ap = oracle.average_precision_score(one_hot, probs, average="macro")
    assert metrics["rank"]["mean_average_precision"] == pytest.approx(ap, abs=1e-6)
    assert metrics["rank"]["sample"] == {"rows": 500, "of": 500, "seed": 0}
    assert metrics["confusion"] == oracle.confusion_matrix(targets, predicted).tolist()
    for k, entry in enumerate(metrics["per_class"]):
        assert entry["class_name"] == CLASSES[k]
        assert entry["support"] == support[k]
        assert (entry["precision"], entry["recall"], entry["f1"]) == pytest.approx((precision[k], recall[k], f1[k]))
        low, high = entry["intervals"]["f1"]
        assert low < f1[k] < high
    low, high = metrics["intervals"]["top1"]
    assert low < metrics["top1"] < high
    assert metrics["unavailable"] == {"top5": "the model has only 4 classes"}


def test_top5_equals_the_oracle(store_run):
    targets = np.random.default_rng(7).integers(0, 8, 300)
    classes = [f"class {k}" for k in range(8)]
    probs = make_probs(targets, 8)
    metrics = evaluate(str(store_run(classes, probs, columns={"target": [classes[t] for t in targets]}))).metrics
    assert metrics["top5"] == pytest.approx(oracle.top_k_accuracy_score(targets, probs, k=5))
    assert metrics["unavailable"] == {}


def test_binary_metrics_are_of_the_second_class(store_run):
    targets = np.random.default_rng(2).integers(0, 2, 300)
    probs = make_probs(targets, 2)
    out = store_run(("no", "yes"), probs, task="binary", columns={"target": ["yes" if t else "no" for t in targets]})
    metrics = evaluate(str(out)).metrics
    assert metrics["rank"]["roc_auc"] == pytest.approx(oracle.roc_auc_score(targets, probs[:, 1]), abs=1e-6)
    ap = oracle.average_precision_score(targets, probs[:, 1])
    assert metrics["rank"]["average_precision"] == pytest.approx(ap, abs=1e-6)
    assert metrics["brier"] == pytest.approx(oracle.brier_score_loss(targets, probs[:, 1]), abs=1e-6)


def test_multi_label_metrics_equal_the_oracle(store_run):
    rng = np.random.default_rng(3)
    truth = rng.random((400, 4)) < [0.1, 0.4, 0.7, 0.0]
    probs = np.clip(rng.random((400, 4)) * 0.7 + 0.3 * truth, 0, 1).astype(np.float32)
    lists = [named(np.flatnonzero(row)) for row in truth]
    out = store_run(CLASSES, probs, task="multilabel", columns={"targets": pa.array(lists, pa.list_(pa.string()))})
    result = evaluate(str(out))
    metrics, said = result.metrics, probs >= 0.5
    assert metrics["exact_match"] == pytest.approx(oracle.accuracy_score(truth, said))
    assert metrics["hamming_loss"] == pytest.approx(oracle.hamming_loss(truth, said))
    for kind in ("macro", "micro", "weighted"):
        expected = oracle.f1_score(truth, said, average=kind, zero_division=0)
        assert metrics[kind]["f1"] == pytest.approx(expected, abs=1e-6)
    ap = np.mean([oracle.average_precision_score(truth[:, k], probs[:, k]) for k in range(3)])
    assert metrics["rank"]["mean_average_precision"] == pytest.approx(ap, abs=1e-6)
    assert metrics["rank"]["classes_measured"] == 3
    losses = [oracle.log_loss(truth[:, k], probs[:, k], labels=[False, True]) for k in range(4)]
    assert metrics["log_loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert metrics["per_class"][3]["average_precision"] is None
    point = metrics["per_class"][2]["at_precision"]
    accepted = probs[:, 2] >= point["threshold"]
    assert point["precision"] == pytest.approx(truth[accepted, 2].mean())
    assert point["precision"] >= 0.95
    assert metrics["mistakes"]["found"] == (truth != said).sum()
    mistakes = pq.read_table(Path(result.directory, "mistakes.parquet"))
    assert mistakes["probability"].to_pylist() == sorted(mistakes["probability"].to_pylist(), reverse=True)
    assert metrics["label_errors"]["found"] > 0


def test_multi_label_mistakes_are_what_the_stored_labels_have_wrong(store_run, tmp_path):
    """Of a model whose labels apply from 0.2 and from 0.8 on."""
    probs = np.array([[0.3, 0.7], [0.25, 0.7], [0.1, 0.9]], np.float32)
    said, true = [["ash"], ["ash"], ["birch"]], [["ash"], ["birch"], ["birch"]]
    out = store_run(CLASSES[:2], probs, task="multilabel", columns={"labels": said, "targets": true})
    metrics = evaluate(str(out), directory=str(tmp_path / "eval")).metrics
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    assert metrics["mistakes"]["found"] == 2
    mistakes = pq.read_table(tmp_path / "eval" / "mistakes.parquet").to_pylist()
    assert [(row["image_id"], row["class_name"], row["in_targets"]) for row in mistakes] == [
        ("image-1", "birch", True),
        ("image-1", "ash", False),
    ]
    assert [row["probability"] for row in mistakes] == pytest.approx([0.3, 0.25])
    assert metrics["risk_coverage"]["threshold"] == pytest.approx([0.9, 0.3, 0.25])
    assert metrics["risk_coverage"]["risk"] == pytest.approx([0, 0, 1 / 3])


def test_labels_that_the_model_does_not_know_are_left_out_of_the_metrics(store_run):
    probs = np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.1], [0.9, 0.1]], np.float32)
    columns = {
        "targets": [["ash", "oak", "yew"], ["ash", "oak"], ["oak"], ["ash"]],
        "site": ["north", "north", "south", "south"],
    }
    failed = {"image_id": ["bad"], "status": ["EMPTY"], "targets": [["oak", "ash"]], "site": ["south"]}
    out = str(store_run(CLASSES[:2], probs, task="multilabel", columns=columns, failed=failed))
    metrics = evaluate(out, slice_by=["site"]).metrics
    assert metrics["exact_match"] == 3 / 4
    assert metrics["intervals"]["exact_match"] == pytest.approx(wilson_interval(3, 4))
    assert metrics["risk_coverage"]["risk"][-1] == 1 / 4
    assert metrics["accuracy_of_all"] == 1 / 5
    assert metrics["rows"]["unknown_target"] == 4
    assert metrics["rows"]["unknown_targets"] == {"oak": 4, "yew": 1}
    (by_site,) = metrics["slices"]
    assert [(entry["value"], entry["accuracy"]) for entry in by_site["values"]] == [("north", 1 / 2), ("south", 1)]


def test_what_an_earlier_evaluation_listed_does_not_stay(store_run, tmp_path):
    probs = np.tile(np.array([[0.9, 0.1], [0.1, 0.9]], np.float32), (20, 1))
    given = [["ash"], ["birch"]] * 20
    given[0] = ["birch"]
    out = str(store_run(CLASSES[:2], probs, task="multilabel", columns={"targets": given}))
    directory = tmp_path / "eval"
    evaluate(out, directory=str(directory))
    listed = {"metrics.json", "mistakes.parquet", "label_errors.parquet"}
    assert {path.name for path in directory.iterdir()} == listed
    ids = [f"image-{i}" for i in range(40)]
    corrected = {"image_id": ids, "uri": ids, "targets": [["ash"], ["birch"]] * 20}
    pq.write_table(pa.table(corrected), tmp_path / "corrected.parquet")
    evaluate(out, manifest=str(tmp_path / "corrected.parquet"), directory=str(directory))
    assert {path.name for path in directory.iterdir()} == {"metrics.json"}


def test_labels_of_one_image_each_have_honest_intervals(store_run):
    truth = np.eye(100, 4, dtype=bool)
    lists = [named(np.flatnonzero(row)) for row in truth]
    probs = np.where(truth, 0.9, 0.1).astype(np.float32)
    out = store_run(CLASSES, probs, task="multilabel", columns={"targets": pa.array(lists, pa.list_(pa.string()))})
    metrics = evaluate(str(out)).metrics
    assert metrics["macro"]["f1"] == 1
    assert metrics["intervals"]["macro_f1"] == metrics["intervals"]["macro_precision"] == [1, 1]
    for entry in metrics["per_class"]:
        assert entry["intervals"]["recall"] == pytest.approx(wilson_interval(1, 1))
        assert entry["intervals"]["precision"] == pytest.approx(wilson_interval(1, 1))
        assert entry["intervals"]["f1"] == [1, 1]


def test_a_few_rows_that_are_all_right_prove_little(store_run):
    targets = np.array([0] * 20 + [1] * 3)
    probs = np.full((23, 4), 0.01, np.float32)
    probs[np.arange(23), targets] = 0.97
    metrics = evaluate(str(store_run(CLASSES, probs, columns={"target": named(targets)}))).metrics
    assert metrics["intervals"]["top1"] == pytest.approx(wilson_interval(23, 23))
    _, birch, cedar, _ = metrics["per_class"]
    assert birch["intervals"]["recall"] == pytest.approx(wilson_interval(3, 3))
    assert birch["intervals"]["precision"] == pytest.approx(wilson_interval(3, 3))
    assert birch["intervals"]["f1"] == [1, 1]
    assert cedar["intervals"] == {score: [None, None] for score in ("precision", "recall", "f1")}


def test_memory_does_not_grow_with_the_square_of_the_classes(store_run):
    classes = [f"class {k}" for k in range(20_000)]
    targets = np.random.default_rng(0).integers(0, 20_000, 30)
    probs = np.zeros((30, 20_000), np.float32)
    probs[np.arange(30), targets] = 0.9
    names = [classes[k] for k in targets]
    names[0] = "class 0"
    out = str(store_run(classes, probs, columns={"target": names}, keep="top_k"))
    tracemalloc.start()
    try:
        result = evaluate(out)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.metrics["top1"] == pytest.approx(29 / 30)
    pair = {"target": "class 0", "label": classes[targets[0]], "count": 1, "share": 1.0}
    assert result.metrics["confused_pairs"] == [pair]
    pairs = pq.read_table(Path(result.directory, "confusion.parquet"))
    assert sum(pairs["count"].to_pylist()) == 30
    assert peak_bytes < 400e6  # the matrix of all pairs is 3.2 GB


def test_rows_without_a_prediction_and_unknown_targets_are_counted(store_run, targets):
    probs = make_probs(targets, 4)
    names = named(targets)
    names[:3] = ["oak", "oak", "yew"]
    names[3] = None
    failed = {"image_id": ["bad-1", "bad-2"], "status": ["NOT_FOUND", "CORRUPT"], "target": ["ash", "oak"]}
    metrics = evaluate(str(store_run(CLASSES, probs, columns={"target": names}, failed=failed))).metrics
    rows = metrics["rows"]
    assert rows["with_target"] == 501
    assert rows["predicted"] == 499
    assert rows["measured"] == 496
    assert rows["without_prediction"] == 2
    assert rows["without_prediction_by_status"] == {"CORRUPT": 1, "NOT_FOUND": 1}
    assert rows["unknown_targets"] == {"oak": 3, "yew": 1}
    assert rows["predicted_without_target"] == 1
    assert rows["coverage"] == pytest.approx(499 / 501)
    right = (probs.argmax(axis=1) == targets)[4:].sum()
    assert metrics["top1"] == pytest.approx(right / 496)
    assert metrics["accuracy_of_all"] == pytest.approx(right / 501)


def test_targets_may_come_from_another_manifest(store_run, targets, tmp_path):
    probs = make_probs(targets, 4)
    failed = {"image_id": ["bad"], "status": ["EMPTY"]}
    out = store_run(CLASSES, probs, failed=failed)
    ids = [f"image-{i}" for i in range(200)] + ["bad", "never seen"]
    table = {
        "image_id": ids,
        "uri": ids,
        "target": [*named(targets[:200]), "ash", "ash"],
        "site": ["a", "b"] * 101,
    }
    pq.write_table(pa.table(table), tmp_path / "targets.parquet")
    result = evaluate(
        str(out), manifest=str(tmp_path / "targets.parquet"), directory=str(tmp_path / "eval"), slice_by=["site"]
    )
    rows = result.metrics["rows"]
    assert (rows["with_target"], rows["predicted"], rows["predicted_without_target"]) == (202, 200, 300)
    assert rows["without_prediction_by_status"] == {"EMPTY": 1, "NOT_CLASSIFIED": 1}
    assert result.metrics["top1"] == pytest.approx((probs.argmax(axis=1) == targets)[:200].mean())
    assert json.loads(Path(tmp_path, "eval", "metrics.json").read_text()) == result.metrics
    assert sum(entry["rows"] for entry in result.metrics["slices"][0]["values"]) == 202


@pytest.mark.parametrize("of_manifest", [False, True], ids=["own targets", "of another manifest"])
def test_rows_that_training_takes_are_counted(store_run, targets, tmp_path, of_manifest):
    columns = {"target": named(targets), "split": ["train", "training", "test", None] * 125}
    failed = {"image_id": ["bad"], "status": ["EMPTY"], "target": ["ash"], "split": ["train"]}
    stored = {} if of_manifest else {"columns": columns, "failed": failed}
    out = str(store_run(CLASSES, make_probs(targets, 4), **stored))
    ids = [f"image-{i}" for i in range(500)]
    pq.write_table(pa.table({"image_id": ids, "uri": ids, **columns}), tmp_path / "targets.parquet")
    manifest = str(tmp_path / "targets.parquet") if of_manifest else None
    assert evaluate(out, manifest=manifest).metrics["rows"]["of_train_split"] == 250
    assert evaluate(out, manifest=manifest, split="test").metrics["rows"]["of_train_split"] == 0


def test_slices_come_worst_first(store_run, targets):
    probs = make_probs(targets, 4)
    right = probs.argmax(axis=1) == targets
    sites = np.where(right, "easy", "hard").tolist()
    sites[:50] = [None] * 50
    years = (2000 + targets).tolist()
    columns = {"target": named(targets), "site": sites, "year": years}
    metrics = evaluate(str(store_run(CLASSES, probs, columns=columns)), slice_by=["site", "year"]).metrics
    by_site, by_year = metrics["slices"]
    assert [entry["value"] for entry in by_site["values"]] == ["hard", None, "easy"]
    assert by_site["values"][0]["accuracy"] == 0
    assert by_site["values"][1]["accuracy"] == pytest.approx(right[:50].mean())
    accuracies = [entry["accuracy"] for entry in by_year["values"]]
    assert accuracies == sorted(accuracies)
    for entry in by_year["values"]:
        of_year = targets == int(entry["value"]) - 2000
        assert entry["accuracy"] == pytest.approx(right[of_year].mean())
        assert entry["balanced_accuracy"] == pytest.approx(right[of_year].mean())
        low, high = entry["interval"]
        assert low < entry["accuracy"] < high


def test_of_a_column_of_many_values_the_worst_are_listed_and_all_are_counted(store_run, targets):
    probs = make_probs(targets, 4)
    right = probs.argmax(axis=1) == targets
    sites = [f"site {i:03d}" for i in range(500)]
    failed = {"image_id": ["bad"], "status": ["EMPTY"], "target": ["ash"], "site": ["nowhere"]}
    out = str(store_run(CLASSES, probs, columns={"target": named(targets), "site": sites}, failed=failed))
    (by_site,) = evaluate(out, slice_by=["site"]).metrics["slices"]
    assert by_site["num_values"] == 501
    expected = [*np.flatnonzero(~right), *np.flatnonzero(right)][:200]
    assert [entry["value"] for entry in by_site["values"]] == [sites[i] for i in expected]


def test_only_rows_of_the_split_count(store_run, targets):
    probs = make_probs(targets, 4)
    splits = np.where(np.arange(500) < 100, "test", "train").tolist()
    out = str(store_run(CLASSES, probs, columns={"target": named(targets), "split": splits}))
    metrics = evaluate(out, split="test").metrics
    assert metrics["rows"]["with_target"] == 100
    assert metrics["top1"] == pytest.approx((probs.argmax(axis=1) == targets)[:100].mean())
    with pytest.raises(UsageError, match="no row in split 'dev' has a target; there are some in: test, train"):
        evaluate(out, split="dev")


@pytest.mark.parametrize("of_manifest", [False, True], ids=["own targets", "of another manifest"])
def test_a_split_goes_by_the_names_that_training_knows(store_run, targets, tmp_path, of_manifest):
    columns = {"target": named(targets), "split": ["train", "val", "valid", "holdout", None] * 100}
    out = str(store_run(CLASSES, make_probs(targets, 4), **({} if of_manifest else {"columns": columns})))
    ids = [f"image-{i}" for i in range(500)]
    pq.write_table(pa.table({"image_id": ids, "uri": ids, **columns}), tmp_path / "targets.parquet")
    manifest = str(tmp_path / "targets.parquet") if of_manifest else None
    for split, num_rows in (("validation", 200), ("val", 200), ("holdout", 100)):
        assert evaluate(out, manifest=manifest, split=split).metrics["rows"]["with_target"] == num_rows
    with pytest.raises(UsageError, match="there are some in: holdout, train, val, valid"):
        evaluate(out, manifest=manifest, split="test")


@pytest.mark.parametrize(
    ("keep", "top_k", "missing"), [("top_k", 5, []), ("top_k", 2, ["top5"]), ("none", 5, ["top5"])]
)
def test_what_needs_all_probabilities_says_so(store_run, keep, top_k, missing):
    targets = np.random.default_rng(5).integers(0, 12, 300)
    classes = [f"class {k}" for k in range(12)]
    probs = make_probs(targets, 12)
    out = store_run(classes, probs, columns={"target": [classes[t] for t in targets]}, keep=keep, top_k=top_k)
    metrics = evaluate(str(out)).metrics
    assert metrics["top1"] == pytest.approx((probs.argmax(axis=1) == targets).mean())
    assert sorted(metrics["unavailable"]) == sorted(["log_loss", "brier", "rank", "label_errors", *missing])
    assert all(metrics[name] is None for name in ("log_loss", "brier", "rank"))
    if not missing:
        assert metrics["top5"] == pytest.approx(oracle.top_k_accuracy_score(targets, probs, k=5))


def test_planted_label_errors_are_found_first(store_run, tmp_path):
    targets = np.random.default_rng(6).integers(0, 4, 400)
    probs = np.full((400, 4), 0.01, np.float32)
    probs[np.arange(400), targets] = 0.97
    given = named(targets)
    given[7] = CLASSES[(targets[7] + 1) % 4]
    result = evaluate(str(store_run(CLASSES, probs, columns={"target": given})), directory=str(tmp_path / "eval"))
    assert result.metrics["label_errors"] == {"file": "label_errors.parquet", "listed": 1, "found": 1}
    (row,) = pq.read_table(tmp_path / "eval" / "label_errors.parquet").to_pylist()
    assert row["image_id"] == "image-7"
    assert row["suggested"] == CLASSES[targets[7]]
    (mistake,) = pq.read_table(tmp_path / "eval" / "mistakes.parquet").to_pylist()
    assert (mistake["image_id"], mistake["target"]) == ("image-7", given[7])


@pytest.mark.parametrize("right", [True, False], ids=["all right", "all wrong"])
def test_degenerate_targets_give_numbers_or_null(store_run, right):
    probs = np.tile(np.array([[0.7, 0.1, 0.1, 0.1]], np.float32), (20, 1))
    metrics = evaluate(str(store_run(CLASSES, probs, columns={"target": ["ash" if right else "elm"] * 20}))).metrics
    assert metrics["top1"] == float(right)
    assert metrics["rank"]["roc_auc"] is None
    assert metrics["risk_coverage"]["area"] == float(not right)
    assert "NaN" not in json.dumps(metrics)


def test_nothing_measured_is_null_with_a_reason(store_run):
    probs = make_probs(np.zeros(5, int), 4)
    metrics = evaluate(str(store_run(CLASSES, probs, columns={"target": ["oak"] * 5}))).metrics
    assert metrics["top1"] is None
    assert metrics["accuracy_of_all"] == 0
    assert "no row has both" in metrics["unavailable"]["log_loss"]


def test_rank_metrics_of_many_rows_come_from_a_stated_sample(store_run, targets, monkeypatch):
    monkeypatch.setattr(rank_sample, "MAX_ROWS", 100)
    probs = make_probs(targets, 4)
    out = str(store_run(CLASSES, probs, columns={"target": named(targets)}))
    first, second = (evaluate(out).metrics["rank"] for _ in range(2))
    assert first == second
    assert first["sample"]["of"] == 500
    assert 50 < first["sample"]["rows"] < 150
    full = oracle.average_precision_score(targets[:, None] == np.arange(4), probs)
    assert first["mean_average_precision"] == pytest.approx(full, abs=0.15)
    assert first["intervals"]["rows"] == first["sample"]["rows"]


def test_intervals_of_rank_metrics_are_of_all_rows_of_the_sample_or_none(store_run, targets, monkeypatch):
    out = str(store_run(CLASSES, make_probs(targets, 4), columns={"target": named(targets)}))
    monkeypatch.setattr(rank_sample, "_BOOTSTRAP_VALUES", 50 * 500 * 4)
    rank = evaluate(out).metrics["rank"]
    assert (rank["intervals"]["rows"], rank["intervals"]["replicates"]) == (500, 50)
    for name in ("roc_auc", "average_precision"):
        low, high = rank["intervals"][name]
        assert low < rank[name] < high
    monkeypatch.setattr(rank_sample, "_BOOTSTRAP_VALUES", 39 * 500 * 4)
    reason = "500 rows of 4 classes are too many to draw again and again"
    assert evaluate(out).metrics["rank"]["intervals"] == {"unavailable": reason}


def test_a_newer_run_supersedes_an_older_one(store_run, targets):
    worse, better = make_probs(targets, 4, seed=8), make_probs(targets, 4, seed=9)
    store_run(CLASSES, worse, columns={"target": named(targets)})
    out = store_run(
        CLASSES,
        better[:100],
        columns={"target": named(targets[:100])},
        run_id="r000000000002",
        predicted_at="2026-01-03T03:04:05.000000+00:00",
        failed={"image_id": ["image-100", "new"], "status": ["EMPTY", "EMPTY"], "target": ["ash", "ash"]},
    )
    result = evaluate(str(out))
    assert result.directory.endswith("r000000000002")
    rows = result.metrics["rows"]
    assert (rows["with_target"], rows["predicted"], rows["without_prediction"]) == (501, 500, 1)
    expected = np.concatenate([better[:100], worse[100:]]).argmax(axis=1)
    assert result.metrics["top1"] == pytest.approx((expected == targets).mean())


def test_wrong_usage_is_one_line(store_run, targets, tmp_path):
    probs = make_probs(targets, 4)
    with pytest.raises(UsageError, match="no finished run"):
        evaluate(str(tmp_path / "nowhere"))
    out = str(store_run(CLASSES, probs, columns={"target": named(targets)}))
    with pytest.raises(UsageError, match=r"--slice-by sight: no such column .*target"):
        evaluate(out, slice_by=["sight"])
    with pytest.raises(UsageError, match="no column 'split'"):
        evaluate(out, split="test")
    twice = tmp_path / "twice.parquet"
    pq.write_table(pa.table({"image_id": ["a", "a"], "uri": ["a", "a"], "target": ["ash", "elm"]}), twice)
    with pytest.raises(UsageError, match="'a' stands there more than once"):
        evaluate(out, manifest=str(twice))
    bare = store_run(CLASSES, probs, out="bare")
    with pytest.raises(UsageError, match="no column 'target'"):
        evaluate(str(bare))
    store_run(CLASSES[:3], probs[:, :3], out="bare", run_id="r000000000002", image_ids=map(str, range(500)))
    with pytest.raises(UsageError, match="different classes"):
        evaluate(str(bare))
