from __future__ import annotations

from pathlib import Path

import pytest

from imgbatch.cli import run
from imgbatch.config import Config


def test_a_plan_for_people_tells_what_would_run_and_writes_nothing(
    photo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    inputs = ["-m", str(photo_config.model.path), "--manifest", str(photo_config.input.manifest), "-o", str(out)]
    settings = ["classify.engine=local", "classify.unit_rows=16", "resources.device=cpu", "report.price_per_hour=2"]
    assert run(["plan", *inputs, *(part for setting in settings for part in ("--set", setting))]) == 0
    printed = capsys.readouterr()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.out.splitlines() if line.split()}
    assert rows["run"].endswith(": a new run")
    assert rows["rows"] == "120 in 8 units of 16"
    assert rows["decode"].endswith(" ms an image in one process (32 sampled)")
    assert rows["time"].endswith(" (h:mm:ss)")
    assert rows["cost"].startswith("2.00 an hour, ")
    assert rows["cost"].endswith(" in all: nodes only, without requests")
    assert {"pools", "model", "images", "fetch", "images/s", "output", "memory"} <= rows.keys()
    assert "sampled images have no pixels, like TRUNCATED" in printed.err
    assert list(tmp_path.iterdir()) == []
