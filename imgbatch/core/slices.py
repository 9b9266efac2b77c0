"""The metrics of parts of the data: one value of a manifest column at a time, worst first."""

from __future__ import annotations

from typing import Any

import numpy as np

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
        values = [_describe(row) for row in _query(scored, f"slice_{i}")]
        values.sort(key=lambda entry: (np.inf if entry["accuracy"] is None else entry["accuracy"], -entry["rows"]))
        described.append({"column": column, "num_values": len(values), "values": values[:MAX_VALUES]})
    return described


def _query(scored: Scored, name: str) -> list[tuple[Any, ...]]:
    target = "null" if scored.labeller.is_multilabel else "target_index"
    return scored.connection.execute(
        f"""
        with cells as (
            select {name} as value, {target} as target_index, count(*) as predicted,
                count(*) filter (is_known) as measured, count(*) filter (is_right) as "right",
                sum(probability::double) filter (is_known) as confidence
            from scored group by all
        ), predicted as (
            select value, sum(predicted) as predicted, sum(measured) as measured, sum("right") as "right",
                sum(confidence) as confidence, avg("right" / measured) filter (target_index is not null) as balanced
            from cells group by value
        ), unpredicted_by_value as (select {name} as value, count(*) as missing from unpredicted group by all)
        select coalesce(p.value, u.value), coalesce(predicted, 0), coalesce(measured, 0), coalesce("right", 0),
            confidence, balanced, coalesce(missing, 0)
        from predicted p full join unpredicted_by_value u on p.value is not distinct from u.value
        order by 1
        """
    ).fetchall()


def _describe(row: tuple[Any, ...]) -> dict[str, Any]:
    value, predicted, measured, right, confidence, balanced, missing = row
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
