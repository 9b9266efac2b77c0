"""The metrics of parts of the data: one value of a manifest column at a time, worst first."""

from __future__ import annotations

from typing import Any

from imgbatch.core.metrics.intervals import wilson_interval
from imgbatch.core.scored import Scored

MAX_VALUES = 200
"""Values of a column that are listed: the worst."""


def describe_slices(scored: Scored) -> list[dict[str, Any]]:
    """For each ``slice_by`` column its name, how many values it has, and the worst of them by accuracy.

    ``accuracy`` is over rows with a prediction and a known target (all of whose labels are right, if multi-label);
    ``balanced_accuracy`` is the mean over the classes that occur in the slice, so that slices with different classes
    compare; ``coverage`` is the share of the slice's rows that have a prediction.
    """
    described = []
    for i, column in enumerate(scored.slice_by):
        rows = _query(scored, f"slice_{i}")
        num_values = rows[0][-1] if rows else 0
        described.append({"column": column, "num_values": num_values, "values": [_describe(row) for row in rows]})
    return described


def _query(scored: Scored, name: str) -> list[tuple[Any, ...]]:
    """What :func:`_describe` takes of the values that are listed; last, how many values there are."""
    target, right = ("null", "is_exact") if scored.labeller.is_multilabel else ("target_index", "is_right")
    return scored.connection.execute(
        f"""
        with cells as (
            select {name} as value, {target} as target_index, count(*) as predicted,
                count(*) filter (is_known) as measured, count(*) filter ({right}) as "right",
                sum(probability::double) filter (is_known) as confidence
            from scored group by all
        ), predicted as (
            select value, sum(predicted) as predicted, sum(measured) as measured, sum("right") as "right",
                sum(confidence) as confidence, avg("right" / measured) filter (target_index is not null) as balanced
            from cells group by value
        ), unpredicted_by_value as (
            select {name} as value, count(*) as missing from unpredicted group by all
        ), by_value as (
            select coalesce(p.value, u.value) as value, coalesce(predicted, 0) as predicted,
                coalesce(measured, 0) as measured, coalesce("right", 0) as "right", confidence, balanced,
                coalesce(missing, 0) as missing
            from predicted p full join unpredicted_by_value u on p.value is not distinct from u.value
        )
        select *, count(*) over () as num_values from by_value
        order by "right" / nullif(measured, 0) nulls last, predicted + missing desc, value limit {MAX_VALUES}
        """
    ).fetchall()


def _describe(row: tuple[Any, ...]) -> dict[str, Any]:
    value, predicted, measured, right, confidence, balanced, missing, _ = row
    measured, right = int(measured), int(right)
    return {
        "value": value,
        "rows": int(predicted) + int(missing),
        "measured": measured,
        "coverage": int(predicted) / (int(predicted) + int(missing)),
        "accuracy": right / measured if measured else None,
        "interval": wilson_interval(right, measured),
        "balanced_accuracy": balanced,
        "mean_confidence": confidence / measured if measured else None,
    }
