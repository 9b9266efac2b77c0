"""Incremental nights: which rows of a manifest the same model has still to label in an output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from imgbatch.core import current
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import spilling
from imgbatch.core.manifest import Manifest
from imgbatch.core.runs import find_run
from imgbatch.core.views import view_statements
from imgbatch.errors import Status, UsageError
from imgbatch.schema import ETAG, IMAGE_ID, ROW_ID

_MEMORY_MB = 1000

_OF_CONTENT = (
    Status.EMPTY,
    Status.NOT_AN_IMAGE,
    Status.UNSUPPORTED_FORMAT,
    Status.TRUNCATED,
    Status.CORRUPT,
    Status.TOO_LARGE,
    Status.BAD_WINDOW,
    Status.NON_FINITE,
)
"""Failures that the same bytes bring again; others are the store's, the machine's or the configuration's."""


def unlabelled_rows(manifest: Manifest, out: str, *, num_rows: int, model_id: str, since_run: str | None) -> np.ndarray:
    """Which of the manifest's first ``num_rows`` rows this model has still to label: bool, one per row.

    A row counts as labelled where its image_id has a prediction, unless the object changed since: where both the
    manifest and the prediction know an ``etag`` and they differ. A row that failed is left out too, where both know an
    ``etag``, they agree, and the failure is one of the content: a broken image would fail every night. Without an
    ``etag`` nothing says whether the image was replaced, and it is tried again.

    Args:
        since_run: only outcomes in this run and in those planned after it count; none: those of every finished run.

    Raises:
        UsageError: no such run, or it is unfinished.
    """
    runs = [run for run in _runs_since(out, since_run) if run.model_id == model_id]
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
                lasting = ", ".join(f"'{status}'" for status in _OF_CONTENT)
                query += (
                    f" anti join (select {IMAGE_ID}, {ETAG} from all_errors where status in ({lasting})) failed "
                    f"on failed.{IMAGE_ID} = listed.{IMAGE_ID} and failed.{ETAG} = listed.{ETAG}"
                )
        for batch in connection.sql(query).to_arrow_reader():
            unlabelled[batch.column(0).to_numpy()] = True
    return unlabelled


def _runs_since(out: str, since_run: str | None) -> Sequence[CurrentRun]:
    runs = current.load(out)
    if since_run is None:
        return runs
    first = find_run(out, since_run)
    if not first.finished:
        raise UsageError(f"--since-run {since_run}: that run is unfinished; finish it, or name another")
    return [run for run in runs if run.predicted_at >= first.plan["predicted_at"]]


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
