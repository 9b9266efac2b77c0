"""How good the labels are, for the page: what ``evaluate`` measured, and the figures of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

import duckdb
import numpy as np

from imgbatch.core import storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.evaluate import Evaluation, evaluate
from imgbatch.core.scored import Labeller
from imgbatch.errors import UsageError
from imgbatch.report import figures
from imgbatch.schema import BANDS, BYTES, IMAGE_ID, RESERVED_COLUMNS, TARGET, TARGETS, URI, WINDOW

MAX_SLICE_VALUES = 50
"""A manifest column of more values is not compared unless it is asked for."""
MAX_SLICE_COLUMNS = 6
MAX_MATRIX_CLASSES = 40
"""Classes of the matrix where metrics.json holds none: those with the most mistakes."""
_NO_SLICES = RESERVED_COLUMNS | {URI, BYTES, IMAGE_ID, TARGET, TARGETS, WINDOW, BANDS}
_SLICE_TYPES = ("VARCHAR", "BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT")


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and what to read in it."""

    title: str
    text: str
    svg: str


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured."""

    directory: str
    metrics: dict[str, Any]
    """What metrics.json holds."""
    headline: tuple[str, float, Sequence[float] | None]
    """Name, value and 95% interval of the one figure to remember."""
    figures: tuple[Figure, ...]
    matrix: Figure | None
    classes: tuple[dict[str, Any], ...]
    """Those that occur, worst F1 first."""
    missing: tuple[tuple[str, str], ...]
    """Names of metrics that could not be had, and why; those of one reason together."""
    includes_training: bool
    """Whether rows of a split called train are among those measured."""


def measure(
    connection: duckdb.DuckDBPyConnection,
    out: str,
    labeller: Labeller,
    *,
    manifest: str | None,
    split: str | None,
    slice_by: Sequence[str],
    runs: Sequence[CurrentRun] | None = None,
) -> Quality | str:
    """Evaluate the current labels; or why that cannot be done.

    Args:
        slice_by: columns to compare the values of; none: those with few values.
        runs: those that ``connection`` has views of; none: all.

    Raises:
        UsageError: ``manifest``, ``split`` or ``slice_by`` do not fit.
    """
    truth = TARGETS if labeller.is_multilabel else TARGET
    asked = bool(manifest or split or slice_by)
    if not asked and truth not in _columns(connection, "predictions"):
        return f"The manifest has no column {truth}: nothing to measure against."
    slice_by = slice_by or ([] if manifest else _choose_slices(connection))
    try:
        evaluation = evaluate(out, manifest=manifest, split=split, slice_by=slice_by, runs=runs)
    except UsageError as error:
        if asked:
            raise
        return f"Not measured: {error}."
    rows = evaluation.metrics["rows"]
    if not rows["measured"]:
        known = ", ".join(f"{name} ({count:,})" for name, count in list(rows["unknown_targets"].items())[:8])
        unknown = f" The model has no class for the targets: {known}." if known else ""
        return f"Not measured: of {rows['with_target']:,} rows with a target none can be compared.{unknown}"
    return _describe(connection, evaluation, split)


def _describe(connection: duckdb.DuckDBPyConnection, evaluation: Evaluation, split: str | None) -> Quality:
    metrics = evaluation.metrics
    name = "top1" if "top1" in metrics else "exact_match"
    measured = [entry for entry in metrics["per_class"] if entry["support"] or entry["predicted"]]
    return Quality(
        directory=evaluation.directory,
        metrics=metrics,
        headline=(name, metrics[name], metrics["intervals"].get(name)),
        figures=tuple(_draw_figures(metrics)),
        matrix=_draw_matrix(connection, evaluation) if name == "top1" else None,
        classes=tuple(sorted(map(_with_thresholds, measured), key=lambda e: (e["f1"] or 0, -e["support"]))),
        missing=_missing(metrics["unavailable"]),
        includes_training=split is None and metrics["rows"]["of_train_split"] > 0,
    )


def _with_thresholds(entry: dict[str, Any]) -> dict[str, Any]:
    """A class with the thresholds of its operating points as text too, under ``shown``."""
    points = {name: entry[name] for name in ("best_f1", "at_precision") if entry.get(name)}
    return entry | {name: {**point, "shown": round_up(point["threshold"])} for name, point in points.items()}


def _missing(unavailable: dict[str, str]) -> tuple[tuple[str, str], ...]:
    names: dict[str, list[str]] = {}
    for name, reason in unavailable.items():
        # The page shows a part of the matrix where metrics.json holds none.
        if name != "confusion":
            names.setdefault(reason, []).append(name.replace("_", " "))
    return tuple((", ".join(group), reason) for reason, group in names.items())


def _choose_slices(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Columns that both predictions and errors have, with few values."""
    types = _columns(connection, "predictions")
    names = [
        name
        for name in _columns(connection, "errors")
        if name not in _NO_SLICES and types.get(name, "") in _SLICE_TYPES
    ]
    if not names:
        return []
    counted = ", ".join("approx_count_distinct(" + '"' + name.replace('"', '""') + '")' for name in names)
    counts = connection.execute(f"select {counted} from predictions").fetchall()[0]
    few = [name for name, count in zip(names, counts, strict=True) if 2 <= count <= MAX_SLICE_VALUES]
    return few[:MAX_SLICE_COLUMNS]


def _columns(connection: duckdb.DuckDBPyConnection, view: str) -> dict[str, str]:
    """Name to type."""
    return {row[0]: row[1] for row in connection.execute(f"describe {view}").fetchall()}


def _draw_figures(metrics: dict[str, Any]) -> list[Figure]:
    drawn = []
    if metrics["reliability"]:
        error = metrics["expected_calibration_error"]
        text = f"On the dashed line, confidence means what it says. Expected calibration error {error:.3f}."
        drawn.append(Figure("Reliability", text, figures.reliability_diagram(metrics["reliability"])))
    if metrics["risk_coverage"] and metrics["risk_coverage"]["coverage"]:
        text = "How many mistakes remain if only the most confident labels are accepted. "
        text += _advice(metrics["risk_coverage"])
        drawn.append(Figure("Risk and coverage", text, figures.risk_coverage(metrics["risk_coverage"])))
    curves = [entry for entry in metrics["per_class"] if entry.get("pr_curve")]
    if any(entry["average_precision"] is not None for entry in curves):
        mean = metrics["rank"]["mean_average_precision"]
        text = f"Each class against the rest. Mean average precision {mean:.3f}."
        drawn.append(Figure("Precision and recall", text, figures.precision_recall(curves)))
    return drawn


def _advice(curve: dict[str, Any]) -> str:
    """What to accept for at most 1% of mistakes, or for at most 5% where that is out of reach."""
    for risk in (0.01, 0.05):
        within = [index for index, each in enumerate(curve["risk"]) if each <= risk]
        if within:
            threshold, coverage = curve["threshold"][within[-1]], curve["coverage"][within[-1]]
            return f"From {round_up(threshold)} up, {coverage:.0%} are accepted and at most {risk:.0%} of them wrong."
    return "At no threshold are 95% of them right."


def round_up(threshold: float) -> str:
    """A threshold from 0 to 1 in digits that accept no row below it: four, or as many as tell it from 1."""
    if threshold >= 1:
        return "1"
    digits = max(4, 1 - math.floor(math.log10(1 - threshold)))
    return str(Decimal(threshold).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING))


def _draw_matrix(connection: duckdb.DuckDBPyConnection, evaluation: Evaluation) -> Figure:
    names = [entry["class_name"] for entry in evaluation.metrics["per_class"]]
    text = "Targets in rows, labels in columns; the shade is the share of the target, blue right and red wrong."
    rows_K = None
    if evaluation.metrics["confusion"] is not None:
        confusion_KK = np.array(evaluation.metrics["confusion"])
    else:
        rows = {entry["class_name"]: entry["support"] for entry in evaluation.metrics["per_class"]}
        names, confusion_KK = _most_confused(connection, evaluation.directory)
        rows_K = np.array([rows[name] for name in names])
        text += f" The {len(names)} classes with the most mistakes; all pairs are in confusion.parquet."
    return Figure("Confusion", text, figures.confusion_matrix(names, confusion_KK, rows_K))


def _most_confused(connection: duckdb.DuckDBPyConnection, directory: str) -> tuple[list[str], np.ndarray]:
    file = storage.join(directory, "confusion.parquet")
    names = [
        name
        for name, _ in connection.execute(
            "select name, sum(if(target <> label, count, 0)) as wrong from (select unnest([target, label]) as name, "
            "target, label, count from read_parquet($file)) group by name order by wrong desc, name limit $limit",
            {"file": file, "limit": MAX_MATRIX_CLASSES},
        ).fetchall()
    ]
    names.sort()
    index = {name: k for k, name in enumerate(names)}
    confusion_KK = np.zeros((len(names), len(names)), np.int64)
    pairs = connection.execute(
        "select target, label, count from read_parquet($file) "
        "where list_contains($names, target) and list_contains($names, label)",
        {"file": file, "names": names},
    ).fetchall()
    for target, label, count in pairs:
        confusion_KK[index[target], index[label]] = count
    return names, confusion_KK
