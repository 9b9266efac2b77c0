"""Two labellings of the same images, side by side: who is right where, and whether that is more than chance.

    DIR/compare.json            the figures
    DIR/disagreements.parquet   images that the two label differently, the surest disagreements first

Legend of the shape suffixes: ``M`` kinds of rows (target, label of A, label of B), ``K`` classes of either model,
``R`` bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from imgbatch.core import current, storage, views
from imgbatch.core.database import reach
from imgbatch.core.metrics import confusion, intervals
from imgbatch.core.metrics.confusion import ClassCounts
from imgbatch.core.plain import to_plain
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import IDENTITY, Labeller, Scored, open_scored, read_labeller
from imgbatch.errors import UsageError

MAX_LISTED = 10_000
"""Rows of disagreements.parquet."""
MAX_CHANGES = 50
_SEED = 0
_ROW_REPLICATES = 1000
_OUTCOMES = ("both_right", "only_a_right", "only_b_right", "both_wrong", "no_target")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` found and where it wrote it."""

    directory: str
    figures: dict[str, Any]
    """What compare.json holds."""


def compare(
    out_a: str, out_b: str, *, manifest: str | None = None, split: str | None = None, directory: str | None = None
) -> Comparison:
    """Compare the current predictions of two outputs, image by image, over the images that both have labelled.

    Differences are B less A. Without targets only agreement is told. A target that one of the models has no class for
    makes its label wrong.

    Args:
        manifest: where the targets are, joined on ``image_id``; none: those that A's manifest had.
        split: only rows of this split.
        directory: where to write; none: beside B's newest run.

    Raises:
        UsageError: no finished run, different tasks, or no image in common.
    """
    with open_scored(out_a, manifest=manifest, split=split, all_predictions=True) as scored:
        labeller_b = _add_views(scored, out_b)
        labeller_a = scored.labeller
        if labeller_a.is_multilabel != labeller_b.is_multilabel:
            raise UsageError(f"{out_a} and {out_b}: one is multi-label and the other is not; they cannot be compared")
        names = tuple(dict.fromkeys([*labeller_a.class_names, *labeller_b.class_names]))
        _pair(scored)
        images = _count_images(scored, out_a, out_b)
        outcomes = dict.fromkeys(_OUTCOMES, 0) | dict(
            scored.connection.execute("select outcome, count(*) from paired group by outcome").fetchall()
        )
        figures: dict[str, Any] = {
            "task": labeller_a.task,
            "a": _describe(out_a, labeller_a),
            "b": _describe(out_b, labeller_b),
            "split": split,
            "images": images,
            "outcomes": outcomes,
            "agreement": scored.fetch_row("select count(*) filter (same) / count(*) from paired")[0],
            "label_changes": _label_changes(scored),
        }
        if images["with_target"]:
            figures |= _score(scored, names, outcomes)
        if directory is None:
            name = f"compare-{labeller_a.run_ids[-1]}"
            directory = storage.join(RunPaths(out_b, labeller_b.run_ids[-1]).root, name)
        directory = storage.absolute(directory)
        figures["disagreements"] = _write_disagreements(scored, directory)
    plain = to_plain(figures)
    storage.write_json(storage.join(directory, "compare.json"), plain)
    return Comparison(directory, plain)


def _add_views(scored: Scored, out_b: str) -> Labeller:
    """B's views, in a schema of their own beside A's."""
    connection, out_b = scored.connection, storage.absolute(out_b)
    reach(connection, out_b)
    connection.execute("create schema b; set schema='b'")
    for statement in views.view_statements(out_b, current.load(out_b)):
        connection.execute(statement)
    labeller = read_labeller(connection, out_b)
    connection.execute("set schema='main'")
    return labeller


def _pair(scored: Scored) -> None:
    """The view ``paired``: each image that both have labelled, with ``outcome``, and ``same`` where they agree."""
    if scored.labeller.is_multilabel:
        answers = "a.labels as answer_a, b.labels as answer_b"
        same = "list_has_all(answer_a, answer_b) and list_has_all(answer_b, answer_a)"
        right = "list_has_all(truth, answer_{0}) and list_has_all(answer_{0}, truth)"
    else:
        answers = "a.label as answer_a, b.label as answer_b"
        same, right = "answer_a = answer_b", "answer_{0} = truth"
    scored.connection.execute(
        f"""
        create temp view both_labelled as
        select {", ".join(f"a.{name}" for name in IDENTITY)}, a.truth, a.of_train,
            a.label as label_a, a.probability as probability_a, b.label as label_b, b.probability as probability_b,
            {answers}
        from scored a join b.predictions b using (image_id);
        create temp view paired as select *, {same} as same, case
            when truth is null then 'no_target'
            when ({right.format("a")}) and ({right.format("b")}) then 'both_right'
            when {right.format("a")} then 'only_a_right'
            when {right.format("b")} then 'only_b_right'
            else 'both_wrong' end as outcome
        from both_labelled
        """
    )


def _count_images(scored: Scored, out_a: str, out_b: str) -> dict[str, int]:
    both, with_target, of_train = scored.fetch_row(
        "select count(*), count(truth), count(truth) filter (of_train) from paired"
    )
    if not both:
        raise UsageError(f"{out_a} and {out_b}: no image_id in common among their predictions")
    in_a, in_b = (scored.fetch_row(f"select count(*) from {name}")[0] for name in ("predictions", "b.predictions"))
    return {"in_a": in_a, "in_b": in_b, "both": both, "with_target": with_target, "of_train_split": of_train}


def _describe(out: str, labeller: Labeller) -> dict[str, Any]:
    return {"out": out, "run_ids": labeller.run_ids, "model_ids": labeller.model_ids}


def _label_changes(scored: Scored) -> list[dict[str, Any]]:
    """The most frequent pairs of different labels."""
    rows = scored.connection.execute(
        "select label_a, label_b, count(*) from paired where label_a <> label_b "
        f"group by all order by 3 desc, 1, 2 limit {MAX_CHANGES}"
    ).fetchall()
    return [dict(zip(("label_a", "label_b", "count"), row, strict=True)) for row in rows]


@dataclass(frozen=True, slots=True)
class _Paired:
    """Counts per class of both models: of the rows as they are, (K,), and resampled together, (R, K)."""

    counts: tuple[ClassCounts, ClassCounts]
    replicates: tuple[ClassCounts, ClassCounts]
    only_a_K: np.ndarray
    """Rows of the class that only A got right."""
    only_b_K: np.ndarray


def _score(scored: Scored, names: Sequence[str], outcomes: dict[str, int]) -> dict[str, Any]:
    rng = np.random.default_rng(_SEED)
    is_multilabel = scored.labeller.is_multilabel
    paired = (_pair_labels if is_multilabel else _pair_classes)(scored, names, rng)
    four = np.array([outcomes[name] for name in _OUTCOMES[:4]])
    drawn_R4 = np.array(list(intervals.bootstrap_cells(four, _ROW_REPLICATES, rng)))
    accuracy_a, accuracy_b = (four[[0, i]].sum() / four.sum() for i in (1, 2))
    gain_R = (drawn_R4[:, 2] - drawn_R4[:, 1]) / four.sum()
    return {
        "mcnemar": asdict(intervals.mcnemar_test(outcomes["only_a_right"], outcomes["only_b_right"])),
        "exact_match" if is_multilabel else "top1": _difference(accuracy_a, accuracy_b, gain_R),
        **_class_differences(paired, is_multilabel),
        "per_class": _per_class(paired, names),
        "intervals": f"95%, percentiles of resamples of the rows, {_ROW_REPLICATES} for accuracy and "
        f"{len(paired.replicates[0].target)} for what is told by class",
    }


def _difference(a: Any, b: Any, drawn_R: np.ndarray) -> dict[str, Any]:
    return {"a": a, "b": b, "difference": b - a, "interval": intervals.percentile_interval(drawn_R)}


def _class_differences(paired: _Paired, is_multilabel: bool) -> dict[str, Any]:
    def macro_f1(counts: ClassCounts, drawn_from: ClassCounts | None = None) -> np.ndarray:
        return confusion.averages(counts, all_classes=is_multilabel, drawn_from=drawn_from)["macro"]["f1"]

    a, b = map(macro_f1, paired.counts)
    drawn_a_R, drawn_b_R = map(macro_f1, paired.replicates, paired.counts)
    differences = {"macro_f1": _difference(a, b, drawn_b_R - drawn_a_R)}
    if not is_multilabel:
        a, b = map(confusion.balanced_accuracy, paired.counts)
        drawn_a_R, drawn_b_R = map(confusion.balanced_accuracy, paired.replicates)
        differences["balanced_accuracy"] = _difference(a, b, drawn_b_R - drawn_a_R)
    return differences


def _per_class(paired: _Paired, names: Sequence[str]) -> list[dict[str, Any]]:
    """What changed of each class that occurs, the largest change of F1 first."""
    (a, b), (drawn_a, drawn_b) = (
        [confusion.class_scores(counts) for counts in pair] for pair in (paired.counts, paired.replicates)
    )
    ends_2K = np.percentile(drawn_b.f1 - drawn_a.f1, [2.5, 97.5], axis=0)
    entries = [
        {
            "class_name": name,
            "support": paired.counts[0].target[k],
            "only_a_right": paired.only_a_K[k],
            "only_b_right": paired.only_b_K[k],
            **{f"{score}_a": getattr(a, score)[k] for score in ("precision", "recall", "f1")},
            **{f"{score}_b": getattr(b, score)[k] for score in ("precision", "recall", "f1")},
            "f1_difference": b.f1[k] - a.f1[k],
            "f1_interval": ends_2K[:, k],
        }
        for k, name in enumerate(names)
        if any(counts.target[k] or counts.predicted[k] for counts in paired.counts)
    ]
    return sorted(entries, key=lambda entry: -abs(entry["f1_difference"]))


def _pair_classes(scored: Scored, names: Sequence[str], rng: np.random.Generator) -> _Paired:
    """Single-label: resamples the kinds of rows, so that both models see the same drawn rows."""
    index = {name: k for k, name in enumerate(names)}
    cells = scored.connection.sql(
        "select truth, label_a, label_b, count(*) as rows from paired where truth is not null group by all order by all"
    ).to_arrow_table()
    unknown = len(names)
    target_M, a_M, b_M = (
        np.array([index.get(name, unknown) for name in cells[column].to_pylist()])
        for column in ("truth", "label_a", "label_b")
    )
    rows_M = cells["rows"].to_numpy()

    def both(count_M: np.ndarray) -> tuple[ClassCounts, ClassCounts]:
        a, b = (_known(confusion.counts_from_cells(target_M, said_M, count_M, unknown + 1)) for said_M in (a_M, b_M))
        return a, b

    drawn = intervals.bootstrap_cells(rows_M, intervals.affordable_replicates(len(rows_M), unknown), rng)
    replicates_a, replicates_b = zip(*(both(count_M) for count_M in drawn), strict=True)
    only_a_M, only_b_M = (a_M == target_M) & (b_M != target_M), (b_M == target_M) & (a_M != target_M)
    return _Paired(
        both(rows_M),
        (intervals.stack_counts(replicates_a, unknown), intervals.stack_counts(replicates_b, unknown)),
        *(
            np.bincount(target_M[only], rows_M[only], unknown + 1)[:unknown].astype(int)
            for only in (only_a_M, only_b_M)
        ),
    )


def _known(counts: ClassCounts) -> ClassCounts:
    """Without the last class, which stands for targets that neither model knows."""
    return ClassCounts(counts.right[:-1], counts.target[:-1], counts.predicted[:-1])


def _pair_labels(scored: Scored, names: Sequence[str], rng: np.random.Generator) -> _Paired:
    """Multi-label: resamples rows, with all their labels, so that both models see the same drawn rows."""
    num_labels = len(names)
    groups = intervals.RowGroups(5 * num_labels)
    only_a_K, only_b_K = np.zeros((2, num_labels), np.int64)
    relation = scored.connection.sql(
        f"select truth, answer_a, answer_b, hash(image_id, {_SEED}) as lot from paired where truth is not null"
    )
    for batch in relation.to_arrow_reader(max(1024, (1 << 21) // num_labels)):
        truth_NK, a_NK, b_NK = (scored.membership(batch[i], names) for i in range(3))
        groups.add(
            batch["lot"].to_numpy(), np.concatenate([truth_NK, truth_NK & a_NK, a_NK, truth_NK & b_NK, b_NK], axis=1)
        )
        only_a_K += (truth_NK & a_NK & ~b_NK).sum(axis=0)
        only_b_K += (truth_NK & b_NK & ~a_NK).sum(axis=0)
    drawn_RM = groups.draw(intervals.affordable_replicates(num_labels, num_labels), rng)
    return _Paired(_both_counts(groups.totals()), _both_counts(drawn_RM), only_a_K, only_b_K)


def _both_counts(sums: np.ndarray) -> tuple[ClassCounts, ClassCounts]:
    """Of A and of B, from (..., 5 K): the target, then what each has right and said."""
    target, right_a, said_a, right_b, said_b = np.split(sums, 5, axis=-1)
    return ClassCounts(right_a, target, said_a), ClassCounts(right_b, target, said_b)


def _write_disagreements(scored: Scored, directory: str) -> dict[str, Any]:
    found = scored.fetch_row("select count(*) from paired where not same")[0]
    truth, answers = (
        ("targets", "answer_a as labels_a, answer_b as labels_b,") if scored.labeller.is_multilabel else ("target", "")
    )
    rows = scored.connection.sql(
        f"select {', '.join(IDENTITY)}, truth as {truth}, {answers} label_a, probability_a, label_b, probability_b, "
        f"outcome from paired where not same order by probability_a + probability_b desc, image_id limit {MAX_LISTED}"
    ).to_arrow_table()
    with storage.staged_file(storage.join(directory, "disagreements.parquet")) as staged:
        pq.write_table(rows, staged, compression="zstd")
    return {"file": "disagreements.parquet", "listed": rows.num_rows, "found": found}
