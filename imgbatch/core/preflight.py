"""The first minute: a few images go through fetch and decode before a night's work starts."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np

from imgbatch.core.plan import Run
from imgbatch.core.rows import RowsReader
from imgbatch.core.stages import DecodeStage
from imgbatch.errors import ErrorBudgetExceeded, Stage

SAMPLE_ROWS = 16


def check_sample(run: Run) -> None:
    """Fetch and decode 16 rows spread over the run.

    Raises:
        ErrorBudgetExceeded: not one of them could be fetched; the message says why. Images that are there but do
            not decode are data, and stop nothing.
    """
    if run.config.errors.max_rate >= 1:
        return
    layout = run.plan.layout
    reader = RowsReader(run.paths)
    failures = []
    with DecodeStage(run) as decode:
        positions = np.unique(np.linspace(0, layout.num_rows - 1, SAMPLE_ROWS).astype(int))
        for index, rows in itertools.groupby(positions.tolist(), key=lambda row: layout.unit_of_row(row).index):
            unit = layout.unit(index)
            chosen = reader.read(unit, decode.columns).take([row - unit.first_row for row in rows])
            failures += decode.decode_rows(chosen).errors
    reader.close()
    failed = [error for error in failures if error is not None and error.stage == Stage.FETCH]
    if failures and len(failed) == len(failures):
        status, count = Counter(error.status for error in failed).most_common(1)[0]
        example = next(error.message for error in failed if error.status == status)
        raise ErrorBudgetExceeded(
            f"none of {len(failures)} sampled images could be fetched, {count} of them {status} ({example}); "
            f"put it right and run the same command again"
        )
