"""The output as DuckDB views, the same in ``imgbatch query``, in query.sql and in every command that reads it.

predictions      one current row per image_id: the newest run that labelled it wins
all_predictions  every prediction of every finished run
errors           rows that failed and that no later run has labelled
embeddings       of the current predictions: row_id, image_id, embedding; no rows where none were asked for
runs             one row per finished run
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import connect
from imgbatch.errors import UsageError

if TYPE_CHECKING:
    import duckdb

_NO_PREDICTIONS = (
    "select null::bigint row_id, null::varchar image_id, null::varchar uri, null::varchar label, "
    "null::int label_index, null::float probability, null::float margin, "
    "null::struct(label varchar, probability float)[] top_k, null::float[] probabilities, null::varchar[] labels, "
    "null::varchar decision, null::int width, null::int height, null::varchar model_id, "
    "null::timestamptz predicted_at, null::varchar run_id where false"
)
"""Where no run has a file of predictions: a partitioned output in which every row failed."""


_NO_EMBEDDINGS = (
    "select null::bigint row_id, null::varchar image_id, null::float[] embedding, null::varchar run_id where false"
)


def open_views(out: str, runs: Sequence[CurrentRun] | None = None) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with the views over ``out``; close it when done.

    Args:
        runs: finished runs of it, and the views show no other; none: all of them.

    Raises:
        UsageError: no finished run there.
    """
    connection = connect(out)
    try:
        for statement in view_statements(out, current.load(out) if runs is None else runs):
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


def view_statements(out: str, runs: Sequence[CurrentRun]) -> list[str]:
    """``create view`` statements over the finished ``runs`` of ``out``; raises :class:`UsageError` without any."""
    if not runs:
        raise UsageError(f"{out}: no finished run there")
    base = storage.absolute(out)
    labelled = [_read(base, run.predictions, run.partition_types) for run in runs if run.predictions]
    predictions = _union(labelled) if labelled else _NO_PREDICTIONS
    errors = _union([_read(base, run.errors, {}) for run in runs])
    embedded = [_read(base, run.embeddings, {}) for run in runs if run.embeddings]
    return [
        f"create view runs as {_runs_table(runs)}",
        f"create view all_predictions as {predictions}",
        f"create view predictions as {_current_predictions(runs)}",
        f"create view all_errors as {errors}",
        f"create view errors as {_current_errors(runs)}",
        f"create view all_embeddings as {_union(embedded) if embedded else _NO_EMBEDDINGS}",
        f"create view embeddings as {_current_embeddings(runs)}",
    ]


def _read(base: str, files: Sequence[str], partition_types: Mapping[str, str]) -> str:
    paths = ", ".join(quote(storage.join(base, file)) for file in files)
    types = ", ".join(f"{quote(name)}: {kind}" for name, kind in {"run_id": "varchar", **partition_types}.items())
    return f"select * from read_parquet([{paths}], hive_partitioning=true, hive_types={{{types}}})"


def _union(selects: Sequence[str]) -> str:
    return " union all by name ".join(selects)


def _runs_table(runs: Sequence[CurrentRun]) -> str:
    rows = ", ".join(
        f"({quote(run.run_id)}, {quote(run.parent)}, timestamptz {quote(run.predicted_at)}, "
        f"{quote(run.model_id)}, {run.num_predictions}, {run.num_errors})"
        for run in runs
    )
    return f"select * from (values {rows}) t(run_id, parent, predicted_at, model_id, predictions, errors)"


def _current_predictions(runs: Sequence[CurrentRun]) -> str:
    if len(runs) == 1 and runs[0].unique_ids:
        return "select * from all_predictions"
    return (
        "select * from all_predictions qualify row_number() over "
        "(partition by image_id order by predicted_at desc, run_id desc, row_id desc) = 1"
    )


def _current_errors(runs: Sequence[CurrentRun]) -> str:
    if len(runs) == 1 and runs[0].unique_ids:
        return "select * from all_errors"
    return (
        "with failed as (select e.*, runs.predicted_at as failed_at from all_errors e join runs using (run_id)) "
        "select * exclude (failed_at) from failed where not exists (select 1 from all_predictions p "
        "where p.image_id = failed.image_id and p.predicted_at > failed.failed_at) "
        "qualify row_number() over (partition by image_id order by failed_at desc, run_id desc, row_id desc) = 1"
    )


def _current_embeddings(runs: Sequence[CurrentRun]) -> str:
    if len(runs) == 1 and runs[0].unique_ids:
        return "select * from all_embeddings"
    return "select * from all_embeddings semi join predictions using (run_id, row_id)"


def quote(text: str | None) -> str:
    """As SQL writes it."""
    return "null" if text is None else "'" + text.replace("'", "''") + "'"
