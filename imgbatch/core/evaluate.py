"""How good the stored predictions are: metrics, slices, mistakes and likely label errors, without a model.

DIR/metrics.json           everything that is a number
DIR/mistakes.parquet       the most confident mistakes
DIR/label_errors.parquet   targets that are likely wrong, the likeliest first
DIR/confusion.parquet      target, label, count: every pair that occurs (single-label)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import multi_label, single_label, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.metrics.confusion import Cells
from imgbatch.core.plain import to_plain
from imgbatch.core.rank_sample import RankSample
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import IDENTITY, Scored, open_scored
from imgbatch.core.single_label import NOT_STORED
from imgbatch.core.slices import describe_slices
from imgbatch.errors import UsageError

FORMAT_VERSION = 1
MAX_LISTED = 1000
"""Rows of mistakes.parquet and of label_errors.parquet."""
MAX_UNKNOWN_LISTED = 100
_SEED = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What :func:`evaluate` found and where it wrote it."""

    directory: str
    metrics: dict[str, Any]
    """What metrics.json holds."""


def evaluate(
    out: str,
    *,
    manifest: str | None = None,
    directory: str | None = None,
    split: str | None = None,
    slice_by: Sequence[str] = (),
    target_precision: float = 0.95,
    runs: Sequence[CurrentRun] | None = None,
) -> Evaluation:
    """Measure the current predictions of ``out`` against their targets.

    Every image counts once. Rows without a prediction and targets that the model does not know are counted and
    reported: they are left out of the metrics, and count as wrong in ``accuracy_of_all``. A multi-label row is left
    with the targets that the model knows.

    Args:
        manifest: where the targets are, joined on ``image_id``; none: the classified manifest's own.
        directory: where to write; none: the newest run's directory.
        split: only rows of this split, by whichever of the names that training knows for it.
        slice_by: manifest columns; the metrics of each of their values, worst first.
        target_precision: multi-label: of each label's operating point ``at_precision``.
        runs: finished runs of ``out``, the only ones to measure; none: all of them.

    Raises:
        UsageError: no finished run, no targets, no such column; see :func:`scored.open_scored`.
    """
    with open_scored(out, manifest=manifest, split=split, slice_by=slice_by, runs=runs) as scored:
        labeller = scored.labeller
        directory = storage.absolute(directory or RunPaths(out, labeller.run_ids[-1]).root)
        rows = _count_rows(scored)
        sample = RankSample(rows["measured"], labeller.num_classes, seed=_SEED)
        if labeller.is_multilabel:
            measured = _measure_multi_label(scored, sample, directory, target_precision)
        else:
            measured = _measure_single_label(scored, sample, directory)
        metrics = {
            "format_version": FORMAT_VERSION,
            "task": labeller.task,
            "run_ids": labeller.run_ids,
            "model_ids": labeller.model_ids,
            "targets": manifest or "the classified manifest",
            "split": split,
            "rows": rows,
            "accuracy_of_all": rows.pop("right") / rows["with_target"],
            **measured,
            "slices": describe_slices(scored),
        }
        for name in ("mistakes", "label_errors"):
            if not (measured.get(name) or {}).get("file"):  # an earlier evaluation may have listed some
                storage.remove(storage.join(directory, _file_of(name)))
    plain = to_plain(metrics)
    storage.write_json(storage.join(directory, "metrics.json"), plain)
    return Evaluation(directory, plain)


def find_mistakes(scored: Scored, limit: int) -> list[str]:
    """The image_ids of the most confident mistakes, the worst first; multi-label: of single labels, said or not.

    Raises:
        UsageError: multi-label, and not every class's probability was stored.
    """
    if not scored.labeller.is_multilabel:
        return scored.connection.sql(_mistakes_sql("image_id", limit)).to_arrow_table()["image_id"].to_pylist()
    if not scored.labeller.has_probabilities:
        raise UsageError(f"mistakes: {NOT_STORED}")
    # One image may have several labels wrong.
    first, _ = _take_first(multi_label.iter_mistakes(scored), "probability", "descending")
    return [] if first is None else list(dict.fromkeys(first["image_id"].to_pylist()))[:limit]


def _mistakes_sql(columns: str, limit: int) -> str:
    return (
        f"select {columns} from scored where is_known and not is_right "
        f"order by probability desc, image_id limit {int(limit)}"
    )


def _count_rows(scored: Scored) -> dict[str, Any]:
    unknown_name = "null" if scored.labeller.is_multilabel else "case when not is_known then truth end"
    groups = scored.connection.execute(
        f"select {unknown_name} as name, count(*), count(*) filter (is_right), count(*) filter (of_train) "
        "from scored group by name"
    ).fetchall()
    predicted = sum(count for _, count, _, _ in groups)
    by_status = scored.connection.execute(
        "select coalesce(status, 'NOT_CLASSIFIED') as status, count(*) from unpredicted group by 1 order by 2 desc, 1"
    ).fetchall()
    without = sum(count for _, count in by_status)
    unknown = Counter({name: count for name, count, _, _ in groups if name is not None})
    unknown.update(_unknown_names(scored, "unpredicted"))
    if scored.labeller.is_multilabel:
        unknown.update(_unknown_names(scored, "scored"))
    listed = sorted(unknown.items(), key=lambda item: (-item[1], item[0]))
    return {
        "with_target": predicted + without,
        "predicted": predicted,
        "coverage": predicted / (predicted + without),
        "measured": sum(count for name, count, _, _ in groups if name is None),
        "without_prediction": without,
        "without_prediction_by_status": dict(by_status),
        "unknown_target": _count_unknown(scored, unknown),
        "unknown_targets": dict(listed[:MAX_UNKNOWN_LISTED]),
        "predicted_without_target": scored.fetch_row("select count(*) from predictions")[0] - predicted,
        "of_train_split": sum(of_train for name, _, _, of_train in groups if name is None),
        "right": sum(right for _, _, right, _ in groups),
    }


def _count_unknown(scored: Scored, unknown: Counter[str]) -> int:
    """Rows with a target of these names; a row of several labels may have more than one of them."""
    if not scored.labeller.is_multilabel:
        return unknown.total()
    both = "(select truth from scored union all select truth from unpredicted)"
    query = f"select count(*) from {both} where list_has_any(truth, ?::varchar[])"
    return scored.connection.execute(query, [list(unknown)]).fetchall()[0][0]


def _unknown_names(scored: Scored, relation: str) -> dict[str, int]:
    """How often ``relation`` has each target that the model has no class for."""
    names = "unnest(truth)" if scored.labeller.is_multilabel else "truth"
    scored.connection.register("known_names", pa.table({"name": list(scored.labeller.class_names)}))
    return dict(
        scored.connection.execute(
            f"select name, count(*) from (select {names} as name from {relation}) "
            "anti join known_names using (name) where name is not null group by name"
        ).fetchall()
    )


def _measure_single_label(scored: Scored, sample: RankSample, directory: str) -> dict[str, Any]:
    sums = single_label.collect(scored, sample)
    metrics = single_label.summarise(scored, sums)
    _write_confusion(scored, sums.cells, directory)
    columns = f"{', '.join(IDENTITY)}, truth as target, label, probability"
    mistakes = scored.connection.sql(_mistakes_sql(columns, MAX_LISTED)).to_arrow_table()
    metrics["mistakes"] = _write(directory, "mistakes", mistakes)
    if scored.labeller.has_probabilities:
        suspects = single_label.iter_suspects(scored, sums.self_confidence.thresholds())
        metrics["label_errors"] = _write_first(directory, "label_errors", suspects, "margin", "ascending")
    return metrics


def _measure_multi_label(scored: Scored, sample: RankSample, directory: str, target_precision: float) -> dict[str, Any]:
    sums = multi_label.collect(scored, sample)
    metrics = multi_label.summarise(scored, sums, target_precision=target_precision)
    if scored.labeller.has_probabilities:
        mistakes = multi_label.iter_mistakes(scored)
        metrics["mistakes"] = _write_first(directory, "mistakes", mistakes, "probability", "descending")
        suspects = multi_label.iter_suspects(scored, sums.self_confidence)
        metrics["label_errors"] = _write_first(directory, "label_errors", suspects, "margin", "ascending")
    return metrics


def _write_confusion(scored: Scored, cells: Cells, directory: str) -> None:
    names = pa.array(scored.labeller.class_names)
    target, label = (names.take(pa.array(index_M)) for index_M in (cells.target_M, cells.predicted_M))
    _write(directory, "confusion", pa.table({"target": target, "label": label, "count": cells.count_M}))


def _write_first(
    directory: str, name: str, tables: Iterable[pa.Table], column: str, order: str
) -> dict[str, Any] | None:
    first, count = _take_first(tables, column, order)
    if first is None:
        return {"file": None, "listed": 0, "found": 0}
    return _write(directory, name, first) | {"found": count}


def _take_first(tables: Iterable[pa.Table], column: str, order: str) -> tuple[pa.Table | None, int]:
    """The first rows by ``column`` (then image_id) of many tables, held a few at a time; and how many there are."""
    keys = [(column, order), ("image_id", "ascending")]
    first: pa.Table | None = None
    count = 0
    for table in tables:
        count += table.num_rows
        joined = table if first is None else pa.concat_tables([first, table])
        first = joined.sort_by(keys).slice(0, MAX_LISTED)
    return first, count


def _write(directory: str, name: str, table: pa.Table) -> dict[str, Any]:
    file = _file_of(name)
    with storage.staged_file(storage.join(directory, file)) as staged:
        pq.write_table(table, staged, compression="zstd")
    return {"file": file, "listed": table.num_rows}


def _file_of(name: str) -> str:
    return f"{name}.parquet"
