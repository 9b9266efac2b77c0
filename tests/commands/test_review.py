from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run


@pytest.fixture
def out(store_run):
    probs = np.array([[0.9, 0.1], [0.45, 0.55]], np.float32)
    return str(store_run(("cat", "dog"), probs, columns={"margin": pa.array([0.8, 0.1], pa.float32())}))


def test_a_list_goes_out_and_comes_back(out, tmp_path, capsys):
    review, targets = tmp_path / "review.csv", tmp_path / "targets.parquet"
    assert run(["review", "export", out, "-o", str(review), "--limit", "1"]) == 0
    assert f"review import {review}" in capsys.readouterr().out
    with review.open(newline="") as file:
        header, row = csv.reader(file)
    with review.open("w", newline="") as file:
        csv.writer(file).writerows([header, [*row[:-1], "cat"]])
    assert run(["review", "import", str(review), "-o", str(targets), "--out", out]) == 0
    assert "1 images looked at, 1 of them labelled otherwise" in capsys.readouterr().out
    assert pq.read_table(targets)["target"].to_pylist() == ["cat"]


def test_label_studio_tasks_come_with_their_interface(out, tmp_path, capsys):
    tasks = tmp_path / "tasks.json"
    assert run(["review", "export", out, "-o", str(tasks), "--format", "label-studio", "--per-class", "1"]) == 0
    assert '<Choice value="dog"/>' in capsys.readouterr().out
    assert len(json.loads(tasks.read_text())) == 2


def test_wrong_use_is_one_line(out, tmp_path, capsys):
    assert run(["review", "export", out, "-o", str(tmp_path / "x"), "--format", "xml"]) == 2
    assert run(["review", "import", str(tmp_path / "none.csv"), "-o", str(tmp_path / "t.parquet")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
