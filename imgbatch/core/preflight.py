"""The first minute: a few images go through fetch and decode before a night's work starts."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa

from imgbatch.core import storage
from imgbatch.core.plan import Run
from imgbatch.core.row_decoder import image_columns
from imgbatch.core.rows import RowsReader
from imgbatch.core.stages import DecodeStage
from imgbatch.errors import MAY_PASS, ErrorBudgetExceeded, RowError, Stage, Status
from imgbatch.schema import URI

SAMPLE_ROWS = 16


def check_sample(run: Run) -> None:
    """Fetch and decode 16 rows spread over the run, unless the run bears with any number of errors.

    Raises:
        UsageError: images are in an object store, and the AWS profile to ask it with is not there.
        ErrorBudgetExceeded: not one of them could be fetched; the message says why. Images that are there but do
            not decode are data, and stop nothing.
    """
    sample = _read_sample(run)
    uris = [uri for rows in sample if URI in rows.column_names for uri in rows[URI].to_pylist()]
    for uri in filter(storage.is_s3, filter(None, uris)):
        storage.filesystem(uri)
    if run.config.errors.max_rate >= 1:
        return
    failures: list[RowError | None] = []
    with DecodeStage(run) as decode:
        for rows in sample:
            failures += decode.decode_rows(rows).errors
    failed = [error for error in failures if error is not None and _was_not_fetched(error)]
    if failures and len(failed) == len(failures):
        status, count = Counter(error.status for error in failed).most_common(1)[0]
        example = next(error.message for error in failed if error.status == status)
        raise ErrorBudgetExceeded(
            f"none of {len(failures)} sampled images could be fetched, {count} of them {status} ({example}); "
            f"put it right and run the same command again"
        )


def _read_sample(run: Run) -> list[pa.Table]:
    """What decoding needs of the sampled rows, unit by unit."""
    layout = run.plan.layout
    reader = RowsReader(run.paths)
    columns = image_columns(reader.schema.names)
    positions = np.unique(np.linspace(0, layout.num_rows - 1, SAMPLE_ROWS).astype(int))
    sample = []
    for index, rows in itertools.groupby(positions.tolist(), key=lambda row: layout.unit_of_row(row).index):
        unit = layout.unit(index)
        sample.append(reader.read(unit, columns).take([row - unit.first_row for row in rows]))
    reader.close()
    return sample


def _was_not_fetched(error: RowError) -> bool:
    # Rasters in an object store are fetched by whoever decodes them.
    return error.stage == Stage.FETCH or error.status in MAY_PASS | {Status.NOT_FOUND}
