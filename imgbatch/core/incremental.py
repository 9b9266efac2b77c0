"""Incremental nights: which rows of a manifest the same model has still to label in an output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.config import Config
from imgbatch.core import current
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import spilling
from imgbatch.core.manifest import Manifest
from imgbatch.core.runs import find_run, list_runs
from imgbatch.core.views import view_statements
from imgbatch.errors import Status, UsageError
from imgbatch.schema import ETAG, IMAGE_ID, ROW_ID

_MEMORY_MB = 1000

_OF_CONTENT = (
    Status.NOT_AN_IMAGE,
    Status.UNSUPPORTED_FORMAT,
    Status.TRUNCATED,
    Status.CORRUPT,
    Status.BAD_WINDOW,
)
"""Failures that the same bytes bring again; others are the store's, the machine's or the configuration's."""
_OF_LIMITS = (Status.EMPTY, Status.TOO_LARGE)
"""Failures that the same bytes bring again under the same :data:`_LIMITS`."""
_LIMITS = (("fetch", "max_bytes"), ("decode", "max_pixels"), ("geo", "max_nodata"))


def unlabelled_rows(
    config: Config, manifest: Manifest, out: str, *, num_rows: int, model_id: str, taken_by: Sequence[str] = ()
) -> np.ndarray:
    """Which of the manifest's first ``num_rows`` rows this model has still to label: bool, one per row.

    A row counts as labelled where its image_id has a prediction, unless the object changed since: where both the
    manifest and the prediction know an ``etag`` and they differ. A row that failed is left out too, where both know an
    ``etag``, they agree, and the failure is one of the content: a broken image would fail every night. One that was too
    large, or too empty, is so only under the limits that its run was planned with. Without an ``etag`` nothing says
    whether the image was replaced, and it is tried again.

    Args:
        config: where it names ``input.since_run``, only outcomes in that run and in those planned after it count.
        taken_by: run_ids of which rows that failed are left out as well, whatever the reason.

    Raises:
        UsageError: no such run, or it is unfinished.
    """
    runs = [run for run in _runs_since(out, config.input.since_run) if run.model_id == model_id]
    if not runs:
        return np.ones(num_rows, dtype=bool)
    unlabelled = np.zeros(num_rows, dtype=bool)
    with spilling(out, memory_mb=_MEMORY_MB) as connection:
        for statement in view_statements(out, runs):
            connection.execute(statement)
        connection.register("listed", _listed(manifest, num_rows))
        query = f"select {ROW_ID} from listed anti join all_predictions known on known.{IMAGE_ID} = listed.{IMAGE_ID}"
        if ETAG in manifest.schema.names:
            if ETAG in connection.sql("from all_predictions limit 0").columns:
                query += f" and coalesce(known.{ETAG} = listed.{ETAG}, true)"
            if ETAG in connection.sql("from all_errors limit 0").columns:
                lasting = (
                    f"{_is_in('status', _OF_CONTENT)} or "
                    f"{_is_in('status', _OF_LIMITS)} and {_is_in('run_id', _under_same_limits(out, config))}"
                )
                query += (
                    f" anti join (select {IMAGE_ID}, {ETAG} from all_errors where {lasting}) failed "
                    f"on failed.{IMAGE_ID} = listed.{IMAGE_ID} and failed.{ETAG} = listed.{ETAG}"
                )
        if taken_by:
            query += (
                f" anti join (select {IMAGE_ID} from all_errors where {_is_in('run_id', taken_by)}) taken "
                f"on taken.{IMAGE_ID} = listed.{IMAGE_ID}"
            )
        for batch in connection.sql(query).to_arrow_reader():
            unlabelled[batch.column(0).to_numpy()] = True
    return unlabelled


def _runs_since(out: str, since_run: str | None) -> Sequence[CurrentRun]:
    runs = current.load_finished(out)
    if since_run is None:
        return runs
    first = find_run(out, since_run)
    if not first.finished:
        raise UsageError(f"--since-run {since_run}: that run is unfinished; finish it, or name another")
    return [run for run in runs if run.predicted_at >= first.plan["predicted_at"]]


def _under_same_limits(out: str, config: Config) -> list[str]:
    limits = _limits(config.model_dump(mode="json"))
    return [run.run_id for run in list_runs(out) if _limits(run.plan["config"]) == limits]


def _limits(config: Mapping[str, Any]) -> list[Any]:
    return [config.get(section, {}).get(key) for section, key in _LIMITS]


def _is_in(column: str, values: Sequence[str]) -> str:
    listed = ", ".join(f"'{value}'" for value in values)
    return f"{column} in ({listed})" if values else "false"


def _listed(manifest: Manifest, num_rows: int) -> pa.RecordBatchReader:
    names = [ROW_ID, IMAGE_ID, *([ETAG] if ETAG in manifest.schema.names else [])]
    schema = pa.schema([(ROW_ID, pa.int64()), *((name, pa.string()) for name in names[1:])])

    def batches() -> Iterator[pa.RecordBatch]:
        first_row = 0
        for table in manifest.iter_batches(limit=num_rows):
            row_ids = pa.array(np.arange(first_row, first_row + table.num_rows))
            rows = manifest.with_image_id(table, first_row).add_column(0, ROW_ID, row_ids)
            yield from rows.select(names).cast(schema).to_batches()
            first_row += table.num_rows

    return pa.RecordBatchReader.from_batches(schema, batches())
