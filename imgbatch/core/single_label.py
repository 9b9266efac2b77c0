"""Metrics of binary and multi-class predictions, summed up in one pass over the scored rows.

Legend of the shape suffixes: ``N`` rows, ``K`` classes, ``R`` bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.core.metrics import confusion, intervals, probability, ranking
from imgbatch.core.metrics.calibration import ReliabilityBins, RiskCoverage, risk_coverage
from imgbatch.core.metrics.label_errors import SelfConfidence, suspects
from imgbatch.core.rank_sample import RankSample, rank_metrics
from imgbatch.core.scored import IDENTITY, Labeller, Scored

MAX_MATRIX_CLASSES = 100
"""Up to so many classes the confusion matrix stands in metrics.json; beyond, only its pairs, in confusion.parquet."""
MAX_CURVE_POINTS = 200
MAX_PAIRS = 50
_TOP = 5
_KNOWN = "is_known"
NO_ROWS = "no row has both a prediction and a target that the model knows"
NOT_STORED = "needs every class's probability, and the run stored only the best few (output.probabilities)"


@dataclass(slots=True)
class Sums:
    """What one pass adds up; memory is 5 bytes a row beside what depends on the number of classes."""

    cells: confusion.Cells
    self_confidence: SelfConfidence
    sample: RankSample
    top5_hits: int = 0
    log_loss: float = 0.0
    brier: float = 0.0
    least_listed: int | None = None
    """Fewest classes that any row lists in ``top_k``; none without rows."""
    reliability: ReliabilityBins = field(default_factory=ReliabilityBins)
    confidence_parts: list[np.ndarray] = field(default_factory=list)
    right_parts: list[np.ndarray] = field(default_factory=list)


def collect(scored: Scored, sample: RankSample) -> Sums:
    """Of the rows whose target the model knows: DuckDB counts the pairs of classes, one pass sums up the rest."""
    num_classes = scored.labeller.num_classes
    sums = Sums(_count_cells(scored), SelfConfidence.empty(num_classes), sample)
    columns = ["target_index", "label_index", "probability"]
    if scored.labeller.has_probabilities:
        columns += ["probabilities", f"hash(image_id, {sample.seed}) as lot"]
    else:
        columns += [f"list_contains([entry.label for entry in top_k[1:{_TOP}]], truth) as in_top5", "len(top_k) as num"]
    for batch in scored.iter_batches(columns, _KNOWN):
        targets_N, predicted_N = batch["target_index"].to_numpy(), batch["label_index"].to_numpy()
        confidence_N = batch["probability"].to_numpy()
        right_N = targets_N == predicted_N
        sums.reliability.add(confidence_N, right_N)
        sums.confidence_parts.append(confidence_N.copy())
        sums.right_parts.append(right_N)
        if scored.labeller.has_probabilities:
            _add_probabilities(sums, scored.probabilities(batch["probabilities"]), targets_N, batch["lot"].to_numpy())
        else:
            _add_listed(sums, batch)
    return sums


def _count_cells(scored: Scored) -> confusion.Cells:
    table = scored.connection.sql(
        f"select target_index, label_index, count(*) as num from scored where {_KNOWN} group by all order by all"
    ).to_arrow_table()
    target_M, predicted_M, count_M = (column.to_numpy() for column in table.columns)
    return confusion.Cells(target_M, predicted_M, count_M, scored.labeller.num_classes)


def _add_probabilities(sums: Sums, probs_NK: np.ndarray, targets_N: np.ndarray, lots_N: np.ndarray) -> None:
    sums.log_loss += probability.log_loss_sum(probs_NK, targets_N)
    sums.brier += probability.brier_sum(probs_NK, targets_N)
    sums.top5_hits += int(probability.top_k_hits(probs_NK, targets_N, _TOP).sum())
    sums.self_confidence.add(probs_NK, targets_N)
    sums.sample.add_single_label(lots_N, probs_NK, targets_N)


def _add_listed(sums: Sums, batch: pa.RecordBatch) -> None:
    sums.top5_hits += int(batch["in_top5"].fill_null(False).to_numpy(zero_copy_only=False).sum())
    listed = int(batch["num"].fill_null(0).to_numpy().min())
    sums.least_listed = listed if sums.least_listed is None else min(listed, sums.least_listed)


def summarise(scored: Scored, sums: Sums) -> dict[str, Any]:
    """The metrics as plain values and arrays; what could not be computed is none, its reason under ``unavailable``."""
    labeller = scored.labeller
    counts = sums.cells.counts()
    replicates = _replicates(sums.cells, sums.sample.seed)
    per_class = describe_classes(labeller.class_names, counts, replicates)
    curve = risk_coverage(_joined(sums.confidence_parts, np.float32), _joined(sums.right_parts, bool))
    metrics = {
        "top1": confusion.accuracy(counts),
        "balanced_accuracy": confusion.balanced_accuracy(counts),
        **confusion.averages(counts),
        "expected_calibration_error": sums.reliability.expected_calibration_error(),
        **_probability_metrics(sums, labeller, int(counts.target.sum())),
        "rank": rank_metrics(sums.sample, per_class, binary=labeller.task == "binary")
        if labeller.has_probabilities and sums.confidence_parts
        else None,
        "intervals": _intervals(counts, replicates),
        "per_class": per_class,
        "confusion": sums.cells.matrix() if labeller.num_classes <= MAX_MATRIX_CLASSES else None,
        "confused_pairs": confusion.confused_pairs(sums.cells, labeller.class_names, MAX_PAIRS),
        "reliability": sums.reliability.rows(),
        "risk_coverage": thinned(curve),
    }
    return metrics | {"unavailable": _unavailable(metrics, sums, labeller)}


def describe_classes(
    class_names: tuple[str, ...], counts: confusion.ClassCounts, replicates: confusion.ClassCounts
) -> list[dict[str, Any]]:
    """One mapping per class: its counts, its scores and their intervals.

    Precision and recall are shares of rows and have Wilson's interval, which is honest for a few rows; F1 has that of
    the replicates that hold the class.
    """
    scores = confusion.class_scores(counts)
    f1_KR = _drawn_f1(replicates).T
    return [
        {
            "class_name": class_name,
            "support": int(counts.target[k]),
            "predicted": int(counts.predicted[k]),
            **{name: getattr(scores, name)[k] for name in confusion.SCORES},
            "intervals": {
                "precision": intervals.wilson_interval(int(counts.right[k]), int(counts.predicted[k])),
                "recall": intervals.wilson_interval(int(counts.right[k]), int(counts.target[k])),
                "f1": intervals.percentile_interval(f1_KR[k]),
            },
        }
        for k, class_name in enumerate(class_names)
    ]


def _drawn_f1(replicates: confusion.ClassCounts) -> np.ndarray:
    """float64 (R, K), NaN where a replicate does not hold the class."""
    occurs_RK = replicates.target + replicates.predicted > 0
    return np.where(occurs_RK, confusion.class_scores(replicates).f1, np.nan)


def thinned(curve: RiskCoverage) -> dict[str, Any]:
    """The curve at a few hundred points, and its area."""
    at = ranking.thin_out(len(curve.threshold), MAX_CURVE_POINTS)
    return {
        "threshold": curve.threshold[at],
        "coverage": curve.coverage[at],
        "risk": curve.risk[at],
        "area": curve.area,
    }


def _probability_metrics(sums: Sums, labeller: Labeller, num_rows: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {"top5": None, "log_loss": None, "brier": None}
    if not num_rows:
        return found
    if labeller.has_probabilities:
        halves = 2 if labeller.num_classes == 2 else 1
        found |= {"log_loss": sums.log_loss / num_rows, "brier": sums.brier / halves / num_rows}
    if labeller.num_classes > _TOP and (labeller.has_probabilities or (sums.least_listed or 0) >= _TOP):
        found["top5"] = sums.top5_hits / num_rows
    return found


def _unavailable(metrics: dict[str, Any], sums: Sums, labeller: Labeller) -> dict[str, str]:
    if not sums.confidence_parts:
        return dict.fromkeys((name for name in metrics if metrics[name] is None), NO_ROWS)
    reasons = {}
    if not labeller.has_probabilities:
        reasons = dict.fromkeys(["log_loss", "brier", "rank", "label_errors"], NOT_STORED)
    if labeller.num_classes <= _TOP:
        reasons["top5"] = f"the model has only {labeller.num_classes} classes"
    elif metrics["top5"] is None:
        listed = sums.least_listed or 0
        reasons["top5"] = f"needs the {_TOP} best classes, and the run stored {listed} (output.top_k)"
    if metrics["confusion"] is None:
        reasons["confusion"] = f"more than {MAX_MATRIX_CLASSES} classes: see confusion.parquet"
    return reasons


def _replicates(cells: confusion.Cells, seed: int) -> confusion.ClassCounts:
    num_replicates = intervals.affordable_replicates(len(cells.count_M), cells.num_classes)
    return intervals.bootstrap_confusion(cells, num_replicates, np.random.default_rng(seed))


def _intervals(counts: confusion.ClassCounts, replicates: confusion.ClassCounts) -> dict[str, Any]:
    averages = confusion.averages(replicates, drawn_from=counts)
    drawn = {
        "balanced_accuracy": confusion.balanced_accuracy(replicates),
        **{f"macro_{name}": averages["macro"][name] for name in confusion.SCORES},
        **{f"weighted_{name}": averages["weighted"][name] for name in confusion.SCORES},
    }
    return {
        "top1": intervals.wilson_interval(int(counts.right.sum()), int(counts.target.sum())),
        **{name: intervals.percentile_interval(values_R) for name, values_R in drawn.items()},
        "method": f"95%, percentiles of {len(replicates.target)} resamples of the confusion counts; top1, and "
        "precision and recall of a class: Wilson",
    }


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def iter_suspects(scored: Scored, thresholds_K: np.ndarray) -> Iterator[pa.Table]:
    """Rows that confident learning finds mislabelled, batch by batch: a second pass over the probabilities."""
    names = pa.array(scored.labeller.class_names)
    listed = [*IDENTITY, "target", "label", "probability"]
    columns = [*IDENTITY, "truth as target", "label", "probability", "target_index", "probabilities"]
    for batch in scored.iter_batches(columns, _KNOWN):
        targets_N = batch["target_index"].to_numpy()
        probs_NK = scored.probabilities(batch["probabilities"])
        found = suspects(probs_NK, targets_N, thresholds_K)
        at = np.flatnonzero(found.class_N != targets_N)
        if at.size:
            rows = pa.Table.from_batches([batch.select(listed)]).take(at)
            rows = rows.append_column("suggested", names.take(pa.array(found.class_N[at])))
            rows = rows.append_column("target_probability", pa.array(probs_NK[at, targets_N[at]]))
            yield rows.append_column("margin", pa.array(found.margin_N[at]))
