"""Which images the report shows: of every label, the least certain, the failed, mistakes, likely label errors.

All are chosen by DuckDB in bounded memory and the same way each time: samples go by a hash of the ``image_id``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import duckdb

from imgbatch.core import storage
from imgbatch.core.scored import told_label_thresholds
from imgbatch.report.summary import UNLABELLED

_IDENTITY = "image_id, uri, run_id, row_id"
_PACKED = "struct_pack(image_id, uri, run_id, row_id, label, probability, top_k)"


@dataclass(frozen=True, slots=True)
class Pick:
    """An image to show, and what to say of it."""

    image_id: str
    uri: str | None
    """None where the image is embedded in the manifest."""
    run_id: str
    row_id: int
    title: str
    """A class name or a status."""
    probability: float | None = None
    """Of ``title``."""
    note: str = ""
    """A second line."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images that belong together."""

    name: str
    picks: tuple[Pick, ...]


def pick_per_label(
    connection: duckdb.DuckDBPyConnection, labels: Iterable[str], each: int, *, is_multilabel: bool = False
) -> list[Gallery]:
    """``each`` images of every one of ``labels``; multi-label: of those that were given it among others."""
    relation = "predictions"
    if is_multilabel:
        relation = (
            "(select * replace (said as label, "
            "list_filter(top_k, lambda entry: entry.label = said)[1].probability as probability) "
            "from (select *, unnest(labels) as said from predictions))"
        )
    rows = connection.execute(
        f"select label, arg_min({_PACKED}, hash(image_id), ?) from {relation} "
        "where label in (select unnest(?::varchar[])) group by label",
        [each, list(labels)],
    ).fetchall()
    found = {label: tuple(_labelled(entry) for entry in entries) for label, entries in rows}
    return [Gallery(label, found[label]) for label in labels if label in found]


def pick_least_certain(connection: duckdb.DuckDBPyConnection, limit: int, *, is_multilabel: bool) -> tuple[Pick, ...]:
    """The images between whose two best classes the model could hardly decide; the smallest margin first.

    Multi-label rows have no margin: of the best labels, or the best one where only that was stored, each row's closest
    to the probability from which it applies counts. The row is shown with it.
    """
    if is_multilabel:
        return _pick_undecided(connection, limit)
    rows = _fetch(
        connection,
        f"select {_IDENTITY}, label, probability, top_k from predictions "
        f"order by margin nulls last, image_id limit {int(limit)}",
    )
    return tuple(_labelled(row, runner_up=True) for row in rows)


def _pick_undecided(connection: duckdb.DuckDBPyConnection, limit: int) -> tuple[Pick, ...]:
    needed = told_label_thresholds(connection)
    distance = "abs(e.probability - thresholds[list_position(names, e.label)])"
    rows = _fetch(
        connection,
        f"""
        with rules as (select $names::varchar[] as names, $thresholds::double[] as thresholds), closest as (
            select {_IDENTITY}, list_min(list_transform(
                coalesce(top_k, [{{label: label, probability: probability}}]),
                lambda e: {{distance: {distance}, label: e.label, probability: e.probability}}
            )) as entry from predictions, rules
        )
        select {_IDENTITY}, entry.label as label, entry.probability as probability from closest
        order by entry.distance nulls last, image_id limit {int(limit)}
        """,
        {"names": list(needed), "thresholds": list(needed.values())},
    )
    return tuple(_labelled(row) for row in rows)


def pick_failed(connection: duckdb.DuckDBPyConnection, limit: int, each: int) -> tuple[Pick, ...]:
    """At most ``each`` images without a label of every status, the commonest status first, ``limit`` in all."""
    rows = connection.execute(
        f"select status, arg_min(struct_pack({_IDENTITY}, error_message), hash(image_id), ?) "
        f"from {UNLABELLED} group by status order by count(*) desc, status",
        [each],
    ).fetchall()
    picks = [_failed(status, entry) for status, entries in rows for entry in entries]
    return tuple(picks[:limit])


def pick_mistakes(connection: duckdb.DuckDBPyConnection, directory: str, limit: int) -> tuple[Pick, ...]:
    """The first rows of the mistakes.parquet that an evaluation wrote to ``directory``."""
    return tuple(_mistaken(row) for row in _read(connection, directory, "mistakes", "probability desc", limit))


def pick_label_errors(connection: duckdb.DuckDBPyConnection, directory: str, limit: int) -> tuple[Pick, ...]:
    """The first rows of the label_errors.parquet that an evaluation wrote to ``directory``."""
    return tuple(_doubted(row) for row in _read(connection, directory, "label_errors", "margin", limit))


def _labelled(row: dict[str, Any], *, runner_up: bool = False) -> Pick:
    note = ""
    if runner_up and row["top_k"] and len(row["top_k"]) > 1:
        second = row["top_k"][1]
        note = f"or {second['label']} {second['probability']:.2f}"
    return _pick(row, row["label"], row["probability"], note)


def _failed(status: str, row: dict[str, Any]) -> Pick:
    return _pick(row, status, None, row["error_message"] or "")


def _mistaken(row: dict[str, Any]) -> Pick:
    if "target" in row:
        return _pick(row, row["label"], row["probability"], f"is {row['target']}")
    said, truth = ("no ", "is one") if row["in_targets"] else ("", "is none")
    return _pick(row, said + row["class_name"], row["probability"], truth)


def _doubted(row: dict[str, Any]) -> Pick:
    if "target" in row:
        return _pick(row, row["target"], row["target_probability"], f"rather {row['suggested']}?")
    is_target = row["in_targets"]
    return _pick(row, row["class_name"], row["probability"], "a target: rather not?" if is_target else "missing?")


def _pick(row: dict[str, Any], title: str, probability: float | None, note: str) -> Pick:
    return Pick(row["image_id"], row["uri"], row["run_id"], row["row_id"], title, probability, note)


def _read(
    connection: duckdb.DuckDBPyConnection, directory: str, name: str, order: str, limit: int
) -> list[dict[str, Any]]:
    file = storage.join(directory, f"{name}.parquet")
    sql = f"select * from read_parquet($file) order by {order}, image_id limit {int(limit)}"
    return _fetch(connection, sql, {"file": file})


def _fetch(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    result = connection.execute(sql, parameters)
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
