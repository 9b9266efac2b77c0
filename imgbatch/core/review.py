"""What a person should look at: the least certain predictions, as a CSV to fill in or as tasks for Label Studio.

Least certain means the smallest margin; for multi-label, the probability that lies closest to its label's threshold,
and the margin is that distance.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO
from xml.sax.saxutils import quoteattr

import duckdb
import pyarrow as pa

from imgbatch.core import storage
from imgbatch.core.database import bounded_memory
from imgbatch.core.model import load_bundle
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD
from imgbatch.core.scored import Labeller, read_labeller, told_label_thresholds
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.schema import IMAGE_ID, TARGET, TARGETS, URI

ReviewFormat = Literal["csv", "label-studio"]

CORRECTED = "corrected"
"""The column that a person fills in."""
LABEL, LABELS, NEAREST_LABEL = "label", "labels", "nearest_label"
SEPARATOR = "|"
"""Between the labels of one image in a cell; where a name holds it, the cell is a JSON list."""

CHOICES, IMAGE = "choices", "image"
"""Names of the control and of the image in Label Studio's labelling interface."""

_ROWS_AT_ONCE = 10_000
_ALL_LABELS = (
    "select labels, unnest(names) as label, unnest(probabilities) as probability from predictions, label_names"
)


@dataclass(frozen=True, slots=True)
class ReviewList:
    """What :func:`export_review` wrote."""

    path: str
    num_images: int
    interface: str | None
    """Label Studio's labelling interface (XML) that the tasks belong to."""


def export_review(
    out: str,
    path: str,
    *,
    review_format: ReviewFormat = "csv",
    per_class: int | None = None,
    limit: int | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> ReviewList:
    """Write the current predictions of ``out`` to ``path``, least certain first.

    Args:
        per_class: at most so many images of each label (multi-label: of each label that is closest to its threshold).
        limit: at most so many images in all.
        model: multi-label: the bundle that made the predictions, for its thresholds; none: those that the predictions
            tell, see :func:`imgbatch.core.scored.told_label_thresholds`.

    Raises:
        UsageError: ``path`` is there already, no finished run, runs of models with different classes, or ``model`` is
            another one.
    """
    refuse_existing(path, overwrite=overwrite)
    out = storage.absolute(out)
    with open_views(out) as connection, bounded_memory(connection):
        labeller = read_labeller(connection, out)
        thresholds = _label_thresholds(connection, labeller, model)
        names = {row[0] for row in connection.execute("describe predictions").fetchall()}
        truth = TARGETS if labeller.is_multilabel else TARGET
        columns = _columns(labeller, truth if truth in names else None)
        rows = _iter_rows(connection, labeller, columns, thresholds, per_class, limit)
        with storage.staged_file(path) as staged, staged.open("w", encoding="utf-8", newline="") as file:
            if review_format == "csv":
                num_images = _write_csv(file, rows, columns)
            else:
                num_images = _write_tasks(file, rows, " ".join(labeller.model_ids))
    interface = labelling_interface(labeller) if review_format == "label-studio" else None
    return ReviewList(path, num_images, interface)


def refuse_existing(path: str, *, overwrite: bool) -> None:
    """Raise :class:`UsageError` for a file that somebody may have filled in."""
    if not overwrite and storage.exists(path):
        raise UsageError(f"-o {path}: exists; choose another name or give --overwrite")


def labelling_interface(labeller: Labeller) -> str:
    """Label Studio's labelling interface for the classes, to be pasted into a project's settings."""
    choice = "multiple" if labeller.is_multilabel else "single"
    choices = "".join(f"\n    <Choice value={quoteattr(name)}/>" for name in labeller.class_names)
    return (
        f'<View>\n  <Image name="{IMAGE}" value="${IMAGE}"/>\n'
        f'  <Choices name="{CHOICES}" toName="{IMAGE}" choice="{choice}">{choices}\n  </Choices>\n</View>\n'
    )


def join_labels(labels: Iterable[str]) -> str:
    """Several labels as one cell of a CSV; none are ``[]``."""
    labels = list(labels)
    plain = labels and not any(SEPARATOR in name or name.startswith("[") for name in labels)
    return SEPARATOR.join(labels) if plain else json.dumps(labels, ensure_ascii=False)


def _label_thresholds(connection: duckdb.DuckDBPyConnection, labeller: Labeller, model: str | None) -> list[float]:
    stated: Mapping[str, float] = {}
    if model is not None:
        bundle = load_bundle(model)
        if bundle.model_id not in labeller.model_ids:
            raise UsageError(
                f"model {model}: is {bundle.model_id}, but the predictions come from {', '.join(labeller.model_ids)}"
            )
        stated = (bundle.thresholds or {}).get("labels", {})
    elif labeller.is_multilabel and labeller.has_probabilities:
        connection.register("label_names", pa.table({"names": [list(labeller.class_names)]}))
        stated = told_label_thresholds(connection, _ALL_LABELS)
    elif labeller.is_multilabel:
        stated = told_label_thresholds(connection)
    return [stated.get(name, DEFAULT_LABEL_THRESHOLD) for name in labeller.class_names]


def _columns(labeller: Labeller, target: str | None) -> list[str]:
    said = [LABELS, NEAREST_LABEL] if labeller.is_multilabel else [LABEL]
    return [IMAGE_ID, URI, *said, "probability", "margin", *([target] if target else [])]


def _iter_rows(
    connection: duckdb.DuckDBPyConnection,
    labeller: Labeller,
    columns: Sequence[str],
    thresholds: list[float],
    per_class: int | None,
    limit: int | None,
) -> Iterator[dict[str, Any]]:
    """The review's rows with their columns by name, least certain first; lists stay lists."""
    if labeller.is_multilabel:
        rules = pa.table({"names": [list(labeller.class_names)], "thresholds": [thresholds]})
        connection.register("label_rules", rules)
        source = (
            f"select * replace (nearest.probability as probability, nearest.distance as margin), "
            f"nearest.label as {NEAREST_LABEL} "
            f"from (select *, {_nearest(labeller)} as nearest from predictions, label_rules)"
        )
    else:
        source = "select * from predictions"
    if per_class is not None:
        kind = NEAREST_LABEL if labeller.is_multilabel else LABEL
        source = (
            f"select * from ({source}) "
            f"qualify row_number() over (partition by {kind} order by margin, {IMAGE_ID}) <= {per_class}"
        )
    first = f" limit {limit}" if limit is not None else ""
    found = connection.execute(f"select {', '.join(columns)} from ({source}) order by margin, {IMAGE_ID}{first}")
    while rows := found.fetchmany(_ROWS_AT_ONCE):
        for row in rows:
            yield dict(zip(columns, row, strict=True))


def _nearest(labeller: Labeller) -> str:
    """SQL for the stored probability that is closest to its threshold: struct(distance, label, probability)."""
    if labeller.has_probabilities:
        stored, label, probability, threshold = "list_zip(names, probabilities, thresholds)", "e[1]", "e[2]", "e[3]"
    else:  # the best few, or only the best
        stored = "coalesce(top_k, [{label: label, probability: probability}])"
        label, probability = "e.label", "e.probability"
        threshold = "thresholds[list_position(names, e.label)]"
    entry = f"{{distance: abs({probability} - {threshold}), label: {label}, probability: {probability}}}"
    return f"list_min(list_transform({stored}, lambda e: {entry}))"


def _write_csv(file: TextIO, rows: Iterator[dict[str, Any]], columns: Sequence[str]) -> int:
    writer = csv.writer(file)
    writer.writerow([*columns, CORRECTED])
    count = 0
    for row in rows:
        writer.writerow([*(_cell(row[name]) for name in columns), ""])
        count += 1
    return count


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return join_labels(value)
    return f"{value:.6f}" if isinstance(value, float) else value


def _write_tasks(file: TextIO, rows: Iterator[dict[str, Any]], model_version: str) -> int:
    """Label Studio's basic JSON: a list of tasks, each with the label as a prediction, one task a line."""
    count = 0
    file.write("[")
    for row in rows:
        file.write(",\n" if count else "\n")
        json.dump(_task(row, model_version), file, ensure_ascii=False)
        count += 1
    file.write("\n]\n")
    return count


def _task(row: dict[str, Any], model_version: str) -> dict[str, Any]:
    said = row[LABELS] if LABELS in row else [row[LABEL]]
    chosen = {"from_name": CHOICES, "to_name": IMAGE, "type": "choices", "value": {"choices": said}}
    prediction = {"model_version": model_version, "score": row["probability"], "result": [chosen] if said else []}
    return {"data": {IMAGE: row[URI], **row}, "predictions": [prediction]}
