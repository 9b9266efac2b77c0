"""Metrics of multi-label predictions, summed up in one pass over the scored rows.

What the model said of a row is its stored ``labels``; an empty list is an answer like any other. Legend of the shape
suffixes: ``N`` rows, ``K`` labels, ``R`` bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.core.metrics import confusion, intervals, probability
from imgbatch.core.metrics.calibration import ReliabilityBins, risk_coverage
from imgbatch.core.metrics.label_errors import SelfConfidence, suspects
from imgbatch.core.rank_sample import RankSample, rank_metrics
from imgbatch.core.scored import IDENTITY, Scored
from imgbatch.core.single_label import NO_ROWS, NOT_STORED, describe_classes, thinned


@dataclass(slots=True)
class Sums:
    """What one pass adds up; memory is 5 bytes a row beside what depends on the number of labels."""

    groups: intervals.RowGroups
    """Of what is right, the target and predicted, label by label."""
    self_confidence: list[SelfConfidence]
    """One per label, of the two classes "not it" and "it"."""
    sample: RankSample
    log_loss_K: np.ndarray
    brier_K: np.ndarray
    num_rows: int = 0
    num_exact: int = 0
    num_wrong_cells: int = 0
    reliability: ReliabilityBins = field(default_factory=ReliabilityBins)
    confidence_parts: list[np.ndarray] = field(default_factory=list)
    right_parts: list[np.ndarray] = field(default_factory=list)

    @property
    def counts(self) -> confusion.ClassCounts:
        return confusion.ClassCounts(*np.split(self.groups.totals(), 3))


def collect(scored: Scored, sample: RankSample) -> Sums:
    """One pass over all rows of ``scored``."""
    labeller = scored.labeller
    num_classes = labeller.num_classes
    per_label = [SelfConfidence.empty(2) for _ in labeller.class_names]
    sums = Sums(intervals.RowGroups(3 * num_classes), per_label, sample, np.zeros(num_classes), np.zeros(num_classes))
    columns = ["truth", "labels", "is_exact", f"hash(image_id, {sample.seed}) as lot"]
    if labeller.has_probabilities:
        columns.append("probabilities")
    for batch in scored.iter_batches(columns):
        truth_NK, said_NK = scored.membership(batch["truth"]), scored.membership(batch["labels"])
        wrong_NK = truth_NK != said_NK
        exact_N = batch["is_exact"].to_numpy(zero_copy_only=False)
        sums.num_rows += len(exact_N)
        sums.num_exact += int(exact_N.sum())
        sums.num_wrong_cells += int(wrong_NK.sum())
        lots_N = batch["lot"].to_numpy()
        sums.groups.add(lots_N, np.concatenate([truth_NK & said_NK, truth_NK, said_NK], axis=1))
        if labeller.has_probabilities:
            probs_NK = scored.probabilities(batch["probabilities"])
            _add_probabilities(sums, probs_NK, truth_NK, said_NK, exact_N)
            sample.add(lots_N, probs_NK, truth_NK)
    return sums


def _add_probabilities(
    sums: Sums, probs_NK: np.ndarray, truth_NK: np.ndarray, said_NK: np.ndarray, exact_N: np.ndarray
) -> None:
    sums.log_loss_K += probability.binary_log_loss_sum(probs_NK, truth_NK)
    sums.brier_K += probability.binary_brier_sum(probs_NK, truth_NK)
    sums.reliability.add(probs_NK.ravel(), truth_NK.ravel())
    for k, self_confidence in enumerate(sums.self_confidence):
        self_confidence.add(_two_classes(probs_NK[:, k]), truth_NK[:, k].astype(np.int64))
    # A row's answer is as sure as its least sure label.
    sums.confidence_parts.append(_confidence(probs_NK, said_NK).min(axis=1))
    sums.right_parts.append(exact_N)


def _confidence(probs_NK: np.ndarray, said_NK: np.ndarray) -> np.ndarray:
    """The probability of what the model said: of the label, or of its absence; thresholds need not be one half."""
    return np.where(said_NK, probs_NK, 1 - probs_NK)


def _two_classes(probs_N: np.ndarray) -> np.ndarray:
    return np.stack([1 - probs_N, probs_N], axis=1)


def summarise(scored: Scored, sums: Sums, *, target_precision: float) -> dict[str, Any]:
    """The metrics as plain values and arrays; what could not be computed is none, its reason under ``unavailable``.

    Args:
        target_precision: of the operating point ``at_precision`` of each label.
    """
    labeller = scored.labeller
    rng = np.random.default_rng(sums.sample.seed)
    num_replicates = intervals.affordable_replicates(labeller.num_classes, labeller.num_classes)
    counts = sums.counts
    replicates = confusion.ClassCounts(*np.split(sums.groups.draw(num_replicates, rng), 3, axis=1))
    per_class = describe_classes(labeller.class_names, counts, replicates)
    cells = max(sums.num_rows * labeller.num_classes, 1)
    stored = labeller.has_probabilities and sums.num_rows > 0
    metrics: dict[str, Any] = {
        "exact_match": sums.num_exact / sums.num_rows if sums.num_rows else None,
        "hamming_loss": sums.num_wrong_cells / cells if sums.num_rows else None,
        **confusion.averages(counts, all_classes=True),
        "log_loss": float(sums.log_loss_K.sum() / cells) if stored else None,
        "brier": float(sums.brier_K.sum() / cells) if stored else None,
        "expected_calibration_error": sums.reliability.expected_calibration_error() if stored else None,
        "rank": rank_metrics(sums.sample, per_class, binary=False, target_precision=target_precision)
        if stored
        else None,
        "intervals": _intervals(sums, replicates),
        "per_class": per_class,
        "reliability": sums.reliability.rows() if stored else None,
        "risk_coverage": _risk_coverage(sums) if stored else None,
    }
    reason = NOT_STORED if sums.num_rows else NO_ROWS
    unavailable = dict.fromkeys((name for name, value in metrics.items() if value is None), reason)
    if not labeller.has_probabilities:
        unavailable |= {"label_errors": NOT_STORED, "mistakes": NOT_STORED}
    return metrics | {"unavailable": unavailable}


def _risk_coverage(sums: Sums) -> dict[str, Any]:
    return thinned(risk_coverage(np.concatenate(sums.confidence_parts), np.concatenate(sums.right_parts)))


def _intervals(sums: Sums, replicates: confusion.ClassCounts) -> dict[str, Any]:
    averages = confusion.averages(replicates, all_classes=True, drawn_from=sums.counts)
    named = {f"{kind}_{score}": averages[kind][score] for kind in averages for score in confusion.SCORES}
    return {
        "exact_match": intervals.wilson_interval(sums.num_exact, sums.num_rows),
        **{name: intervals.percentile_interval(values_R) for name, values_R in named.items()},
        "method": f"95%, percentiles of {len(replicates.target)} resamples of the images; exact_match, and precision "
        "and recall of a label: Wilson",
    }


def iter_mistakes(scored: Scored) -> Iterator[pa.Table]:
    """Labels that the model was wrong about, one row each: said and not so, or so and not said.

    ``probability`` is the model's in what it said: of the label, or of its absence.
    """
    for rows, probs_NK, truth_NK, said_NK in _iter_probabilities(scored):
        row, k = np.nonzero(said_NK != truth_NK)
        if row.size:
            probability_M = _confidence(probs_NK, said_NK)[row, k]
            yield _cells(scored, rows, row, k, truth_NK).append_column("probability", pa.array(probability_M))


def iter_suspects(scored: Scored, self_confidence: list[SelfConfidence]) -> Iterator[pa.Table]:
    """Labels of rows that confident learning finds wrong, each label taken as a question of two classes."""
    for rows, probs_NK, truth_NK, _ in _iter_probabilities(scored):
        wrong_NK, margin_NK = np.zeros(truth_NK.shape, bool), np.zeros(probs_NK.shape, np.float32)
        for k, each in enumerate(self_confidence):
            found = suspects(_two_classes(probs_NK[:, k]), truth_NK[:, k].astype(np.int64), each.thresholds())
            wrong_NK[:, k] = found.class_N != truth_NK[:, k]
            margin_NK[:, k] = found.margin_N
        row, column = np.nonzero(wrong_NK)
        if row.size:
            table = _cells(scored, rows, row, column, truth_NK)
            table = table.append_column("probability", pa.array(probs_NK[row, column]))
            yield table.append_column("margin", pa.array(margin_NK[row, column]))


def _iter_probabilities(scored: Scored) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray, np.ndarray]]:
    """Batches with their probabilities, what is true, and what the model said."""
    for batch in scored.iter_batches([*IDENTITY, "truth", "labels", "probabilities"]):
        truth_NK, said_NK = scored.membership(batch["truth"]), scored.membership(batch["labels"])
        yield batch, scored.probabilities(batch["probabilities"]), truth_NK, said_NK


def _cells(scored: Scored, rows: pa.RecordBatch, row: np.ndarray, k: np.ndarray, truth_NK: np.ndarray) -> pa.Table:
    table = pa.Table.from_batches([rows.select(IDENTITY)]).take(row)
    names = pa.array(scored.labeller.class_names)
    table = table.append_column("class_name", names.take(pa.array(k)))
    return table.append_column("in_targets", pa.array(truth_NK[row, k]))
