"""Result rows: from probabilities to the columns of a unit file, and the commit of one unit.

Shape suffixes: N images, K classes, D features, T entries of ``top_k``.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.runs import RunPaths
from imgbatch.errors import MAY_PASS, CannotWrite, RowError, Status, normalise_message
from imgbatch.schema import ROW_ID, TOP_K_TYPE, UNIT_SCHEMA

DEFAULT_LABEL_THRESHOLD = 0.5
"""Multi-label: the probability from which a label applies, where the bundle states none."""


@dataclass(frozen=True)
class LabelRules:
    """How probabilities become columns: what the bundle and the output settings say."""

    class_names: tuple[str, ...]
    task: str
    """binary, multiclass or multilabel."""
    probabilities: str
    """all, top_k or none."""
    top_k: int
    thresholds: Mapping[str, Any] | None = None
    """``{"accept": {class: probability}}`` fills ``decision``; ``{"labels": {class: probability}}`` multi-label."""


def prediction_columns(
    probs_NK: np.ndarray, rules: LabelRules, features_ND: np.ndarray | None = None
) -> dict[str, pa.Array]:
    """The columns that follow from the model's output, for rows that have one.

    Args:
        probs_NK: float32, 0 to 1, class order of ``rules.class_names``.
        features_ND: float32, the embeddings; none: not wanted.
    """
    num_rows, num_classes = probs_NK.shape
    listed = min(rules.top_k, num_classes)
    top_NT = _top_indices(probs_NK, max(listed, min(2, num_classes)))
    rows_N = np.arange(num_rows)
    label_index_N = top_NT[:, 0].astype(np.int32)
    probability_N = probs_NK[rows_N, label_index_N]
    names = pa.array(rules.class_names, pa.string())
    label_N = names.take(pa.array(label_index_N))
    columns = {
        "label": label_N,
        "label_index": pa.array(label_index_N),
        "probability": pa.array(probability_N),
        "margin": pa.nulls(num_rows, pa.float32()),
        "top_k": pa.nulls(num_rows, TOP_K_TYPE),
        "probabilities": pa.nulls(num_rows, pa.list_(pa.float32())),
        "labels": pa.nulls(num_rows, pa.list_(pa.string())),
        "decision": pa.nulls(num_rows, pa.string()),
        "embedding": pa.nulls(num_rows, pa.list_(pa.float32())),
    }
    if rules.task != "multilabel":
        second_N = probs_NK[rows_N, top_NT[:, 1]] if num_classes > 1 else np.zeros_like(probability_N)
        columns["margin"] = pa.array(probability_N - second_N)
    else:
        columns["labels"] = _applying_labels(probs_NK, names, rules)
    if rules.probabilities != "none":
        listed_NT = top_NT[:, :listed]
        entries = pa.StructArray.from_arrays(
            [names.take(pa.array(listed_NT.ravel())), pa.array(np.take_along_axis(probs_NK, listed_NT, 1).ravel())],
            fields=list(TOP_K_TYPE.value_type),
        )
        columns["top_k"] = _lists(entries, np.full(num_rows, listed))
    if rules.probabilities == "all":
        columns["probabilities"] = _lists(pa.array(probs_NK.ravel()), np.full(num_rows, num_classes))
    if features_ND is not None:
        columns["embedding"] = _lists(pa.array(features_ND.ravel()), np.full(num_rows, features_ND.shape[1]))
    accept = (rules.thresholds or {}).get("accept")
    if accept is not None:
        needed_N = np.array([accept.get(name, np.inf) for name in rules.class_names])[label_index_N]
        columns["decision"] = pa.array(np.where(probability_N >= needed_N, "accept", "review"), pa.string())
    return columns


def _top_indices(probs_NK: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest of each row, largest first, ties by lower index."""
    if count * 8 >= probs_NK.shape[1]:
        return np.argsort(-probs_NK, axis=1, kind="stable")[:, :count]
    candidates = np.sort(np.argpartition(-probs_NK, count, axis=1)[:, :count], axis=1)
    # A tie at the edge may have left a lower index out of the partition; the first place must be argmax's.
    candidates[:, 0] = np.where(
        (candidates == probs_NK.argmax(axis=1)[:, None]).any(axis=1), candidates[:, 0], probs_NK.argmax(axis=1)
    )
    order = np.argsort(-np.take_along_axis(probs_NK, candidates, 1), axis=1, kind="stable")
    return np.take_along_axis(candidates, order, 1)


def _applying_labels(probs_NK: np.ndarray, names: pa.Array, rules: LabelRules) -> pa.Array:
    stated = (rules.thresholds or {}).get("labels", {})
    needed_K = np.array([stated.get(name, DEFAULT_LABEL_THRESHOLD) for name in rules.class_names])
    applies_NK = probs_NK >= needed_K
    return _lists(names.take(pa.array(np.nonzero(applies_NK)[1])), applies_NK.sum(axis=1))


def _lists(values: pa.Array, lengths_N: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def unit_table(
    row_ids: pa.Array,
    errors: Sequence[RowError | None],
    widths: np.ndarray,
    heights: np.ndarray,
    columns: Mapping[str, pa.Array],
) -> pa.Table:
    """A unit's rows in :data:`UNIT_SCHEMA`: predictions where there is no error, else the error.

    Args:
        errors: one entry per row; ``None`` for a prediction.
        widths, heights: int32 px of the source, one per row, 0 where unknown.
        columns: from :func:`prediction_columns`, for the rows without an error, in order.
    """
    ok = np.array([error is None for error in errors], dtype=bool)
    position = np.cumsum(ok) - 1
    take = pa.array(position, mask=~ok)
    failed = [error for error in errors if error is not None]
    error_take = pa.array(np.cumsum(~ok) - 1, mask=ok)

    def of_errors(values: list[Any], arrow_type: pa.DataType) -> pa.Array:
        return pa.array(values, arrow_type).take(error_take)

    status = of_errors([error.status.value for error in failed], pa.string()).fill_null(Status.OK.value)
    arrays = {
        ROW_ID: row_ids,
        "status": status,
        "error_stage": of_errors([error.stage.value for error in failed], pa.string()),
        "error_message": of_errors([error.message for error in failed], pa.string()),
        "attempts": of_errors([error.attempts for error in failed], pa.int32()),
        "width": pa.array(widths.astype(np.int32), mask=widths == 0),
        "height": pa.array(heights.astype(np.int32), mask=heights == 0),
        **{name: column.take(take) for name, column in columns.items()},
    }
    return pa.table([arrays[name] for name in UNIT_SCHEMA.names], schema=UNIT_SCHEMA)


@dataclass(frozen=True)
class Receipt:
    """What became of one unit; small, because the driver reads one per unit."""

    unit: int
    outcome: str
    """``committed``; ``existed`` (another writer was first); ``deferred`` (left for a later pass)."""
    num_rows: int
    counts: dict[str, int]
    """Rows by status."""
    examples: dict[str, str] = field(default_factory=dict)
    """One error message per status."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Busy seconds per stage: fetch, decode, classify, commit."""
    started_at: float = 0.0
    """When work on the unit began, seconds since 1970."""
    num_changed: int = 0
    """Objects that were not what the manifest lists, whatever became of them."""
    isolated: bool = False
    """Whether the unit had to be classified row by row in processes of their own."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def commit_unit(
    paths: RunPaths, unit_index: int, expected_row_ids: pa.Array, results: pa.Table, *, defer_above: float | None
) -> Receipt:
    """Write a unit's file unless it exists; the first writer wins and unit files never change.

    Args:
        expected_row_ids: int64, the unit's rows as planned.
        results: in :data:`UNIT_SCHEMA`.
        defer_above: leave the unit uncommitted where more than this share of the rows failed for reasons that may
            pass; ``None`` commits whatever came.

    Raises:
        ValueError: the results are not exactly the unit's rows; nothing was written.
        CannotWrite: the file cannot be written.
    """
    if not results.schema.equals(UNIT_SCHEMA) or not results[ROW_ID].combine_chunks().equals(expected_row_ids):
        raise ValueError(f"unit {unit_index}: the results are not the rows that were planned")
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(results["status"]).to_pylist()}
    may_pass = sum(counts.get(status.value, 0) for status in MAY_PASS)
    if defer_above is not None and may_pass > defer_above * results.num_rows:
        outcome = "deferred"
    else:
        created = _create(paths, unit_index, _parquet_bytes(results))
        outcome = "committed" if created else "existed"
    failed = results.filter(pc.not_equal(results["status"], Status.OK.value))
    examples = dict(zip(failed["status"].to_pylist()[::-1], failed["error_message"].to_pylist()[::-1], strict=True))
    return Receipt(unit_index, outcome, results.num_rows, counts, examples)


def _create(paths: RunPaths, unit_index: int, data: bytes) -> bool:
    uri = paths.unit_file(unit_index)
    try:
        return storage.create_if_absent(uri, data)
    except Exception as error:  # every object store's client has exceptions of its own
        if isinstance(error, FileNotFoundError):
            with contextlib.suppress(Exception):
                if paths.is_finished():
                    return False  # another driver was faster, and has removed the units' directory
        reason = f"{type(error).__name__}: {normalise_message(error)}"
        raise CannotWrite(
            f"unit file {uri}: cannot be written ({reason}); put it right and run the same command again"
        ) from error


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
