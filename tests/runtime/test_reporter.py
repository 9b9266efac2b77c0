from __future__ import annotations

import io
import json

from rich.console import Console

from imgbatch.config import Config
from imgbatch.runtime.job import classify
from tests.conftest import changed


def test_json_lines_carry_the_run_and_the_unit(photo_config: Config) -> None:
    stream = io.StringIO()
    console = Console(file=stream, soft_wrap=True, highlight=False)
    result = classify(changed(photo_config, run__log_format="json"), console)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {record["run_id"] for record in records} == {result.run_id}
    assert all(record["time"] and record["message"] for record in records)
    units = [record for record in records if record["message"] == "unit"]
    assert sorted(unit["unit_id"] for unit in units) == list(range(8))
    assert sum(unit["counts"].get("OK", 0) for unit in units) == result.counts["OK"]
    assert any("TRUNCATED" in unit["examples"] for unit in units)


def test_people_see_no_json(photo_config: Config) -> None:
    stream = io.StringIO()
    classify(photo_config, Console(file=stream, soft_wrap=True, highlight=False))
    assert "120 images in 8 units of 16" in stream.getvalue()
    assert "{" not in stream.getvalue()
