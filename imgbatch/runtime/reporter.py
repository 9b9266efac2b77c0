"""What a job says while it runs: lines for a person, or one JSON object a line for a log collector."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

from imgbatch.core.results import Receipt
from imgbatch.core.runs import utc_now


class Reporter:
    """Prints messages; in JSON every line carries ``time``, ``run_id`` and ``message``, and units their own lines."""

    def __init__(self, console: Console, *, run_id: str, as_json: bool) -> None:
        self.console = console
        self.as_json = as_json
        self._run_id = run_id

    def say(self, message: str, **fields: Any) -> None:
        """``fields`` stand in the JSON only."""
        if self.as_json:
            record = {"time": utc_now(), "run_id": self._run_id, "message": message, **fields}
            self.console.print(json.dumps(record, ensure_ascii=False, default=str), markup=False)
        else:
            self.console.print(message, markup=False)

    def unit(self, receipt: Receipt) -> None:
        """One unit's outcome; people see the progress instead."""
        if self.as_json:
            self.say(
                "unit",
                unit_id=receipt.unit,
                outcome=receipt.outcome,
                rows=receipt.num_rows,
                counts=receipt.counts,
                seconds={stage: round(seconds, 4) for stage, seconds in receipt.seconds.items()},
                examples=receipt.examples,
            )
