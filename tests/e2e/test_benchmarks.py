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
from jobs.bench.contest import Contestant, Outcome, compete, write_result
from jobs.bench.peers.__main__ import Labels, describe_labels, describe_lengths
from jobs.bench.peers.data_loader import settings_to_try


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


def test_labels_are_compared_on_the_images_that_all_have_labelled() -> None:
    ours = Labels({"cat/0": "cat", "cat/1": "dog", "dog/2": "dog", "dog/3": "dog"})
    lines = describe_labels(
        {"peer": Labels({"cat/0": "dog", "cat/1": "cat", "dog/2": "dog"}), "imgbatch": ours}
    ).splitlines()
    assert lines[0] == "On the 3 different images that every contestant had:"
    assert lines[4:] == ["| peer | 33.33% | 66.67% | 1, 1 |", "| imgbatch | 100.00% | 66.67% | 0, 0 |"]


def test_a_contest_that_was_too_short_says_so() -> None:
    def outcome(seconds: float) -> list[Outcome]:
        return [Outcome(1000, seconds, 1.0, 1.0)]

    assert "slow" not in describe_lengths({"slow": outcome(200), "fast": outcome(60)})
    assert describe_lengths({"slow": outcome(200), "fast": outcome(60)}).startswith("fast, the fastest, took 60 s")
    assert describe_lengths({"slow": outcome(200), "fast": outcome(130)}) == ""


def test_what_was_measured_outlives_a_contestant_that_fails_or_hangs(tmp_path: Path) -> None:
    def contestant(name: str, code: str) -> Contestant:
        return Contestant(name, [sys.executable, "-c", code, "{result}"], {})

    values = "dict(images=10, seconds=2.0, startup_seconds=1.0)"
    good = contestant("good", f"import json, sys; json.dump({values}, open(sys.argv[1], 'w'))")
    for code, reason in (
        ("raise SystemExit('no such thing')", "bad failed with exit code 1:\nno such thing"),
        ("import time; time.sleep(600)", "bad took longer than 5 s:"),
    ):
        saved = tmp_path / "saved.json"
        with pytest.raises(SystemExit, match=reason):
            compete([good, contestant("bad", code)], repeats=1, scratch=tmp_path / reason[:8], timeout_s=5, save=saved)
        assert [run["seconds"] for run in json.loads(saved.read_text())["runs"]["good"]] == [2.0]


def test_ratios_are_those_of_a_round(tmp_path: Path) -> None:
    runs = {
        "slow": [Outcome(100, 10.0, 1.0, 2000.0), Outcome(100, 20.0, 1.0, 2000.0)],
        "fast": [Outcome(100, 5.0, 1.0, 500.0), Outcome(100, 4.0, 1.0, 500.0)],
    }
    write_result(tmp_path / "page", "Title", "Intro.", runs, yardstick="slow")
    assert "| fast | 22.5 (20 to 25) | 3.5 (2 to 5) |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("cores", [1, 2, 16, 96])
def test_the_loop_to_beat_is_tuned_in_a_dozen_trials(cores: int) -> None:
    settings = settings_to_try(cores)
    assert 2 <= len(settings) <= 12
    assert all(0 <= workers <= cores and 1 <= threads <= cores for workers, threads in settings)
