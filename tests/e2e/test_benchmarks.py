"""Benchmarks measure what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.core.model import ModelBundle
from jobs.bench import evaluate


@pytest.mark.soak
def test_the_memory_of_an_evaluation_is_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--rows", "2000"])
    held_by_the_parent = np.ones(2**27)  # 1 GiB
    evaluate.main()
    assert held_by_the_parent.nbytes == 2**30
    assert 0.05 < json.loads(capsys.readouterr().out)["peak_rss_gb"] < 0.95


@pytest.mark.soak
def test_our_clock_starts_with_ray_and_not_with_the_first_unit(
    photos: list[Path], tiny_model: ModelBundle, tmp_path: Path
) -> None:
    manifest, result = tmp_path / "manifest.parquet", tmp_path / "result.json"
    pq.write_table(pa.table({"uri": [str(photo) for photo in photos[:5]]}), manifest)
    command = [sys.executable, "-m", "jobs.bench.peers.imgbatch_command", "--manifest", str(manifest), "--limit", "5"]
    command += ["--model", tiny_model.path, "--object-store-mb", "200"]
    command += ["--out", str(tmp_path / "out"), "--result", str(result)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    subprocess.run(command, check=True, timeout=300, cwd=Path(__file__).parents[2], env=environment)
    measured = json.loads(result.read_text())
    (record,) = (tmp_path / "out").glob("runs/*/run.json")
    run = json.loads(record.read_text())
    first_unit, finished = (datetime.fromisoformat(run[name]) for name in ("engine_ready_at", "finished_at"))
    assert measured["images"] == 5
    assert measured["seconds"] > (finished - first_unit).total_seconds()
