"""Metrics against scikit-learn and against slow, plain restatements of published formulas."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle
from sklearn.calibration import calibration_curve
from sklearn.exceptions import UndefinedMetricWarning

from imgbatch.core.metrics import calibration, confusion, intervals, label_errors, probability, ranking

TOLERANCE = 1e-6
deterministic = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@st.composite
def single_label(draw):
    """(targets_N, predicted_N, probs_NK): few classes, some of them absent, probabilities with ties."""
    num_classes = draw(st.integers(2, 6))
    num_rows = draw(st.integers(1, 40))
    present = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=num_classes, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    probs = rng.dirichlet(np.full(num_classes, 0.5), num_rows)
    if draw(st.booleans()):
        probs = np.round(probs * 4) + 1
    probs = (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)
    targets = rng.choice(present, num_rows)
    predicted = probs.argmax(axis=1)
    if draw(st.booleans()):
        predicted = (targets + 1) % num_classes
    return targets, predicted, probs


@st.composite
def multi_label(draw):
    """(truth_NK, probs_NK) where labels may be absent, everywhere, or tied."""
    num_labels, num_rows = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rates = rng.choice([0.0, 0.3, 0.7, 1.0], num_labels)
    probs = rng.random((num_rows, num_labels))
    if draw(st.booleans()):
        probs = np.round(probs * 4) / 4
    return rng.random((num_rows, num_labels)) < rates, probs.astype(np.float32)


def cells_of(confusion_KK: np.ndarray) -> confusion.Cells:
    at = np.nonzero(confusion_KK)
    return confusion.Cells(*at, confusion_KK[at], len(confusion_KK))


@pytest.fixture(autouse=True)
def _quiet_oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndefinedMetricWarning)
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        warnings.filterwarnings("ignore", message="No positive class found in y_true")
        warnings.filterwarnings("ignore", message="A single label was found")
        warnings.filterwarnings("ignore", message="The y_prob values do not sum to one")
        warnings.filterwarnings("ignore", message="'k' .* greater than or equal to 'n_classes'")
        yield


@deterministic
@given(single_label())
def test_scores_of_the_confusion_matrix_equal_the_oracle(case):
    targets, predicted, probs = case
    classes = range(probs.shape[1])
    matrix = oracle.confusion_matrix(targets, predicted, labels=classes)
    cells = cells_of(matrix)
    np.testing.assert_array_equal(cells.matrix(), matrix)
    counts = cells.counts()
    of_rows = confusion.counts_from_cells(targets, predicted, np.ones(len(targets), np.int64), len(classes))
    for name, expected in (("right", matrix.diagonal()), ("target", matrix.sum(axis=1)), ("predicted", matrix.sum(0))):
        np.testing.assert_array_equal(getattr(counts, name), expected)
        np.testing.assert_array_equal(getattr(of_rows, name), expected)
    assert confusion.accuracy(counts) == pytest.approx(oracle.accuracy_score(targets, predicted), abs=TOLERANCE)
    assert confusion.balanced_accuracy(counts) == pytest.approx(
        oracle.balanced_accuracy_score(targets, predicted), abs=TOLERANCE
    )
    scores = confusion.class_scores(counts)
    precision, recall, f1, support = oracle.precision_recall_fscore_support(
        targets, predicted, labels=classes, zero_division=0
    )
    for ours, theirs in zip(
        (scores.precision, scores.recall, scores.f1, counts.target), (precision, recall, f1, support), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    averages = confusion.averages(counts)
    for kind in ("macro", "micro", "weighted"):
        expected = oracle.precision_recall_fscore_support(targets, predicted, average=kind, zero_division=0)[:3]
        ours = [averages[kind][name] for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


@deterministic
@given(multi_label())
def test_multi_label_scores_equal_the_oracle(case):
    truth, probs = case
    said = probs >= 0.5
    counts = confusion.ClassCounts((truth & said).sum(axis=0), truth.sum(axis=0), said.sum(axis=0))
    if truth.shape[1] > 1:
        averages = confusion.averages(counts, all_classes=True)
        for kind in ("macro", "micro", "weighted"):
            expected = oracle.precision_recall_fscore_support(truth, said, average=kind, zero_division=0)[:3]
            ours = [averages[kind][name] for name in ("precision", "recall", "f1")]
            np.testing.assert_allclose(ours, expected, atol=TOLERANCE)
    losses = probability.binary_log_loss_sum(probs, truth) / len(probs)
    briers = probability.binary_brier_sum(probs, truth) / len(probs)
    for k in range(truth.shape[1]):
        assert losses[k] == pytest.approx(oracle.log_loss(truth[:, k], probs[:, k], labels=[False, True]), abs=1e-6)
        brier = oracle.brier_score_loss(truth[:, k], probs[:, k], labels=[False, True], pos_label=True)
        assert briers[k] == pytest.approx(brier, abs=TOLERANCE)


@deterministic
@given(single_label(), st.integers(1, 5))
def test_scores_of_probabilities_equal_the_oracle(case, k):
    targets, _, probs = case
    num_rows, num_classes = probs.shape
    classes = np.arange(num_classes)
    loss = oracle.log_loss(targets, probs, labels=classes)
    assert probability.log_loss_sum(probs, targets) / num_rows == pytest.approx(loss, abs=TOLERANCE)
    brier = oracle.brier_score_loss(targets, probs, labels=classes, scale_by_half=False)
    assert probability.brier_sum(probs, targets) / num_rows == pytest.approx(brier, abs=TOLERANCE)
    if num_classes > 2:
        hits = probability.top_k_hits(probs, targets, k).mean()
        assert hits == pytest.approx(oracle.top_k_accuracy_score(targets, probs, k=k, labels=classes), abs=TOLERANCE)


def test_a_certain_mistake_costs_what_the_oracle_says():
    probs = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
    targets = np.array([1, 1])
    loss = probability.log_loss_sum(probs, targets) / 2
    assert loss == pytest.approx(oracle.log_loss(targets, probs, labels=[0, 1, 2]), abs=TOLERANCE)
    assert np.isfinite(loss)


@deterministic
@given(multi_label())
def test_areas_equal_the_oracle(case):
    truth, probs = case
    for positive, scores in zip(truth.T, probs.T, strict=True):
        if positive.any():
            expected = oracle.average_precision_score(positive, scores)
            assert ranking.average_precision(positive, scores) == pytest.approx(expected, abs=TOLERANCE)
        else:
            assert np.isnan(ranking.average_precision(positive, scores))
        if positive.any() and not positive.all():
            expected = oracle.roc_auc_score(positive, scores)
            assert ranking.roc_auc(positive, scores) == pytest.approx(expected, abs=TOLERANCE)
        else:
            assert np.isnan(ranking.roc_auc(positive, scores))


@deterministic
@given(multi_label())
def test_precision_and_recall_at_every_threshold_equal_the_oracle(case):
    truth, probs = case
    positive, scores = truth[:, 0], probs[:, 0]
    counts = ranking.threshold_counts(positive, scores)
    precision, recall, thresholds = oracle.precision_recall_curve(positive, scores)
    np.testing.assert_allclose(counts.thresholds[::-1], thresholds)
    np.testing.assert_allclose(counts.precision[::-1], precision[:-1], atol=TOLERANCE)
    if positive.any():
        np.testing.assert_allclose(counts.recall[::-1], recall[:-1], atol=TOLERANCE)
    best = ranking.best_f1_point(counts)
    every_f1 = [oracle.f1_score(positive, scores >= t, zero_division=0) for t in np.unique(scores)]
    assert (best.f1 if best else 0) == pytest.approx(max(every_f1), abs=TOLERANCE)


def test_the_precision_point_is_the_lowest_threshold_that_reaches_it():
    positive = np.array([True, True, False, True, False, False])
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    counts = ranking.threshold_counts(positive, scores)
    point = ranking.precision_point(counts, 0.75)
    assert point is not None
    assert (point.threshold, point.precision, point.recall) == (0.6, 0.75, 1.0)
    assert ranking.precision_point(ranking.threshold_counts(~positive, scores), 0.9) is None


def test_bootstrapped_areas_surround_the_estimate():
    rng = np.random.default_rng(0)
    truth = rng.random((2000, 2)) < 0.3
    scores = rng.random((2000, 2)) + 0.5 * truth
    aucs, precisions = ranking.bootstrap_areas(truth, scores, 200, rng)
    auc = np.mean([ranking.roc_auc(truth[:, k], scores[:, k]) for k in range(2)])
    low, high = intervals.percentile_interval(aucs)
    assert low < auc < high
    assert high - low < 0.05
    assert np.std(precisions) > 0


@deterministic
@given(multi_label())
def test_reliability_bins_equal_the_oracle(case):
    truth, probs = case
    right, confidence = truth[:, 0], probs[:, 0]
    bins = calibration.ReliabilityBins()
    for part in np.array_split(np.arange(len(right)), 3):
        bins.add(confidence[part], right[part])
    accuracies, confidences = calibration_curve(right, confidence, n_bins=calibration.NUM_BINS)
    filled = [row for row in bins.rows() if row["count"]]
    np.testing.assert_allclose([row["accuracy"] for row in filled], accuracies, atol=TOLERANCE)
    np.testing.assert_allclose([row["confidence"] for row in filled], confidences, atol=TOLERANCE)
    share = np.array([row["count"] for row in filled]) / len(right)
    expected = np.sum(share * np.abs(accuracies - confidences))
    assert bins.expected_calibration_error() == pytest.approx(expected, abs=TOLERANCE)


@deterministic
@given(multi_label())
def test_risk_at_each_coverage_equals_counting(case):
    truth, probs = case
    right, confidence = truth[:, 0], probs[:, 0]
    curve = calibration.risk_coverage(confidence, right)
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        accepted = confidence >= threshold
        assert coverage == pytest.approx(accepted.mean())
        assert risk == pytest.approx(1 - right[accepted].mean(), abs=TOLERANCE)
    rows = [1 - right[confidence >= c].mean() for c in confidence]
    assert curve.area == pytest.approx(np.mean(rows), abs=TOLERANCE)


def test_without_rows_everything_is_undefined_and_nothing_fails():
    empty = cells_of(np.zeros((3, 3), np.int64))
    counts = empty.counts()
    assert np.isnan(confusion.accuracy(counts))
    assert np.isnan(confusion.balanced_accuracy(counts))
    assert np.isnan(confusion.averages(counts)["macro"]["f1"])
    assert np.isnan(calibration.ReliabilityBins().expected_calibration_error())
    assert np.isnan(calibration.risk_coverage(np.zeros(0), np.zeros(0, bool)).area)
    assert np.isnan(ranking.roc_auc(np.zeros(0, bool), np.zeros(0)))
    assert ranking.best_f1_point(ranking.threshold_counts(np.zeros(0, bool), np.zeros(0))) is None
    assert np.isnan(intervals.wilson_interval(0, 0)).all()
    rng = np.random.default_rng(0)
    no_labels = label_counts(intervals.RowGroups(9).draw(10, rng))
    for replicates in (intervals.bootstrap_confusion(empty, 10, rng), no_labels):
        assert replicates.target.shape == (0, 3)
        averages = confusion.averages(replicates, drawn_from=counts)
        assert np.isnan(intervals.percentile_interval(confusion.accuracy(replicates))).all()
        assert np.isnan(intervals.percentile_interval(averages["macro"]["f1"])).all()


def test_the_bootstrap_over_cells_has_the_spread_of_the_binomial():
    matrix = np.array([[80, 20], [10, 90]])
    replicates = intervals.bootstrap_confusion(cells_of(matrix), 2000, np.random.default_rng(1))
    assert (replicates.target.sum(axis=1) == 200).all()
    spread = confusion.accuracy(replicates).std()
    assert spread == pytest.approx(np.sqrt(0.85 * 0.15 / 200), rel=0.1)
    low, high = intervals.percentile_interval(confusion.accuracy(replicates))
    assert low < 0.85 < high


def test_drawn_rows_add_up_whatever_batches_they_came_in():
    values_NM = np.random.default_rng(1).random((3000, 4)) < [0.9, 0.5, 0.01, 0]
    lots_N = np.random.default_rng(2).integers(2**64, size=3000, dtype=np.uint64)
    whole, parts = intervals.RowGroups(4), intervals.RowGroups(4)
    whole.add(lots_N, values_NM)
    for start in range(0, 3000, 700):
        parts.add(lots_N[::-1][start : start + 700], values_NM[::-1][start : start + 700])
    assert (whole.totals() == values_NM.sum(axis=0)).all()
    drawn_RM, again_RM = (groups.draw(500, np.random.default_rng(3)) for groups in (whole, parts))
    np.testing.assert_array_equal(drawn_RM, again_RM)
    assert drawn_RM.mean(axis=0) == pytest.approx(whole.totals(), rel=0.05)
    # The spread of a sum over drawn rows, of which each holds it or not.
    assert drawn_RM[:, 2].std() == pytest.approx(np.sqrt(whole.totals()[2]), rel=0.15)
    parts.add(lots_N[:0], values_NM[:0])
    assert intervals.RowGroups(4).draw(5, np.random.default_rng(3)).shape == (0, 4)


def labels_of_hard_and_easy_images(num_rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Twenty labels of each row and what a model says; the labels of an image have much in common, so have mistakes."""
    shared_2N1, own_2NK = rng.normal(size=(2, num_rows, 1)), rng.normal(size=(2, num_rows, 20))
    truth_NK, wrong_NK = (shared_2N1 + own_2NK) * np.sqrt(0.5) > [[[0.6]], [[1.0]]]
    return truth_NK, truth_NK ^ wrong_NK


def label_counts(sums: np.ndarray) -> confusion.ClassCounts:
    return confusion.ClassCounts(*np.split(sums, 3, axis=-1))


def test_intervals_of_averages_over_labels_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)

    def grouped(num_rows: int) -> intervals.RowGroups:
        truth_NK, said_NK = labels_of_hard_and_easy_images(num_rows, rng)
        groups = intervals.RowGroups(60)
        lots_N = rng.integers(2**64, size=num_rows, dtype=np.uint64)
        groups.add(lots_N, np.concatenate([truth_NK & said_NK, truth_NK, said_NK], axis=1))
        return groups

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        return confusion.averages(label_counts(sums), all_classes=True)["macro"]["f1"]

    expected = float(macro_f1(grouped(200_000).totals()))
    held = []
    for _ in range(200):
        low, high = intervals.percentile_interval(macro_f1(grouped(500).draw(200, rng)))
        held.append(low < expected < high)
    assert 0.9 <= np.mean(held) <= 0.99


def test_what_a_replicate_holds_no_row_of_stays_out_of_its_macro_averages():
    # Three labels of one row each, which is right, and one of sixty rows that are all missed.
    truth_NK = np.zeros((100, 4), bool)
    truth_NK[[0, 1, 2], [0, 1, 2]] = truth_NK[3:63, 3] = True
    said_NK = truth_NK & [True, True, True, False]
    groups = intervals.RowGroups(12)
    groups.add(np.arange(100, dtype=np.uint64), np.concatenate([truth_NK & said_NK, truth_NK, said_NK], axis=1))
    counts = label_counts(groups.totals())
    replicates = label_counts(groups.draw(1000, np.random.default_rng(1)))
    averages = confusion.averages(replicates, all_classes=True, drawn_from=counts)
    num_drawn_R = (replicates.target[:, :3] > 0).sum(axis=1)
    # Of the last label, which is always missed, there are rows in every replicate; it is never said in the data.
    np.testing.assert_allclose(averages["macro"]["f1"], num_drawn_R / (num_drawn_R + 1))
    np.testing.assert_allclose(averages["macro"]["recall"], num_drawn_R / (num_drawn_R + 1))
    np.testing.assert_allclose(averages["macro"]["precision"], num_drawn_R / (num_drawn_R + 1))
    assert (confusion.averages(replicates, all_classes=True)["macro"]["f1"] == num_drawn_R / 4).all()


@pytest.mark.parametrize(
    ("num_cells", "num_classes", "expected"),
    [(100, 10, 1000), (200_000, 1000, 500), (500, 5000, 200), (10, 20_000, 100), (0, 1, 1000)],
)
def test_many_cells_or_many_classes_are_resampled_less_often(num_cells, num_classes, expected):
    assert intervals.affordable_replicates(num_cells, num_classes) == expected


@pytest.mark.parametrize(("right", "total", "low", "high"), [(0, 10, 0.0, 0.2775), (9, 10, 0.5958, 0.9821)])
def test_wilson_interval_equals_published_values(right, total, low, high):
    assert intervals.wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (9, 3), (5, 5), (480, 520)])
def test_mcnemar_is_the_binomial_test_for_few_pairs(only_a, only_b):
    from scipy.stats import binomtest

    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert intervals.mcnemar_test(only_a, only_b).p_value == pytest.approx(expected, abs=TOLERANCE)


def test_mcnemar_is_chi_squared_for_many_pairs():
    from scipy.stats import chi2

    test = intervals.mcnemar_test(1100, 1000)
    assert test.p_value == pytest.approx(chi2.sf(99**2 / 2100, 1), abs=TOLERANCE)
    assert intervals.mcnemar_test(2000, 2000).p_value == 1.0


@deterministic
@given(single_label())
def test_suspects_follow_the_paper(case):
    targets, _, probs = case
    num_classes = probs.shape[1]
    self_confidence = label_errors.SelfConfidence.empty(num_classes)
    for part in np.array_split(np.arange(len(targets)), 2):
        self_confidence.add(probs[part], targets[part])
    thresholds = self_confidence.thresholds()
    found = label_errors.suspects(probs, targets, thresholds)
    for row, (target, p) in enumerate(zip(targets, probs, strict=True)):
        means = [
            probs[targets == j, j].mean(dtype=np.float64) if (targets == j).any() else np.inf
            for j in range(num_classes)
        ]
        np.testing.assert_allclose(thresholds, means, rtol=1e-6)
        confident = [j for j in range(num_classes) if p[j] >= thresholds[j]]
        expected = max(confident, key=lambda j: (p[j], -j)) if confident else target
        assert found.class_N[row] == expected
        assert found.margin_N[row] == pytest.approx(p[target] - np.delete(p, target).max(), abs=TOLERANCE)


def test_confused_pairs_come_most_frequent_first():
    matrix = np.array([[5, 3, 0], [1, 5, 4], [0, 0, 0]])
    assert confusion.confused_pairs(cells_of(matrix), ("a", "b", "c"), 2) == [
        {"target": "b", "label": "c", "count": 4, "share": 0.4},
        {"target": "a", "label": "b", "count": 3, "share": 0.375},
    ]


def test_thinning_keeps_both_ends():
    assert ranking.thin_out(1000, 5).tolist() == [0, 250, 500, 749, 999]
    assert ranking.thin_out(3, 10).tolist() == [0, 1, 2]
    assert ranking.thin_out(0, 10).tolist() in ([], [0])
