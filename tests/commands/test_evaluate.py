from __future__ import annotations

import io
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from imgbatch.cli import run
from imgbatch.core import rank_sample
from imgbatch.core.model import load_bundle

CLASSES = ("red", "green", "blue")


@pytest.fixture
def output(store_run, tiny_model):
    """An output of the tiny model with targets, sites and one failed row."""
    targets = np.random.default_rng(0).integers(0, 3, 300)

    def make(out: str, strength: float = 2.0) -> str:
        logits = np.random.default_rng(1).normal(size=(300, 3)) + strength * (targets[:, None] == np.arange(3))
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        columns = {"target": [CLASSES[t] for t in targets], "site": ["north", "south"] * 150}
        columns["target"][0] = "violet"
        failed = {"image_id": ["bad"], "target": ["red"], "site": ["north"], "status": ["EMPTY"]}
        probs = probs.astype(np.float32)
        model_id = tiny_model.model_id
        return str(store_run(CLASSES, probs, columns=columns, failed=failed, model_id=model_id, out=out))

    return make


def test_evaluate_prints_a_summary_and_writes_the_figures(output, tmp_path, capsys):
    out = output("out")
    assert run(["evaluate", out, "-o", str(tmp_path / "eval"), "--slice-by", "site"]) == 0
    printed = capsys.readouterr().out
    for text in ("301 rows with a target", "1 EMPTY", "violet (1)", "top1", "Worst of 2 values of site", "mistakes"):
        assert text in printed
    assert (tmp_path / "eval" / "metrics.json").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_and_numbers_are_whole_in_a_pipe_and_on_a_narrow_terminal(store_run, monkeypatch, capsys):
    names = ("ž" * 90, ":id:", "[red]")
    targets = [names[k % 3] for k in range(27)] + [names[2], names[0], ":cat:"]
    probs = (np.tile(np.eye(3), (10, 1)) * 0.7 + 0.1).astype(np.float32)
    out = str(store_run(names, probs, columns={"target": targets}))
    numbers = r" +\d\.\d{4} +\d\.\d{4} +\d\.\d{4} +\d+"
    assert run(["evaluate", out]) == 0
    printed = capsys.readouterr().out
    assert "targets unknown to the model: :cat: (1)" in printed
    for name in names:
        assert re.search(f"^{re.escape(name)}{numbers} *$", printed, re.MULTILINE), name

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert run(["evaluate", out]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert re.search(f"^ž+{numbers} *$", shown, re.MULTILINE)
    assert "…" not in shown
    assert shown.count("ž") == printed.count("ž")


def test_rows_that_the_model_was_trained_on_are_pointed_out(store_run, tiny_model, tmp_path, capsys):
    columns = {"target": list(CLASSES) * 20, "split": ["train"] * 40 + ["test"] * 20}
    failed = {"image_id": ["bad"], "target": ["red"], "split": ["test"], "status": ["EMPTY"]}
    probs = np.tile(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], np.float32), (30, 1))
    out = str(store_run(CLASSES, probs, columns=columns, failed=failed, model_id=tiny_model.model_id))
    assert run(["evaluate", out, "--split", "test"]) == 0
    assert "40 predictions have no target or are of other splits" in capsys.readouterr().out
    notice = "40 rows are of split train, which a model may know by heart"
    calibrate = ["calibrate", out, "-m", tiny_model.path, "-o", str(tmp_path / "calibrated")]
    for command in (["evaluate", out], calibrate, ["compare", out, out, "-o", str(tmp_path), "--thumbnails", "0"]):
        assert run(command) == 0
        assert notice in capsys.readouterr().out
        assert run([*command, "--split", "test"]) == 0
        assert "by heart" not in capsys.readouterr().out


def test_evaluate_as_json_prints_what_it_wrote(output, tmp_path, capsys):
    out = output("out")
    assert run(["evaluate", out, "-o", str(tmp_path / "eval"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "eval" / "metrics.json").read_text())


def test_a_summary_says_why_there_is_no_interval(output, capsys, monkeypatch):
    monkeypatch.setattr(rank_sample, "_BOOTSTRAP_VALUES", 1000)
    assert run(["evaluate", output("out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no intervals of roc_auc and average_precision: 299 rows of 3 classes are too many" in printed


def test_a_multi_label_summary(store_run, capsys):
    truth = np.random.default_rng(0).random((100, 3)) < 0.5
    probs = np.where(truth, 0.8, 0.3).astype(np.float32)
    lists = pa.array([[CLASSES[k] for k in np.flatnonzero(row)] for row in truth], pa.list_(pa.string()))
    out = store_run(CLASSES, probs, task="multilabel", columns={"targets": lists})
    assert run(["evaluate", str(out)]) == 0
    assert "exact_match" in capsys.readouterr().out


def test_evaluate_without_targets_is_one_line(store_run, capsys):
    out = store_run(CLASSES, np.eye(3, dtype=np.float32))
    assert run(["evaluate", str(out)]) == 2
    assert "no column 'target'" in capsys.readouterr().err


def test_calibrate_writes_a_bundle_that_loads(output, tiny_model, tmp_path, capsys):
    out, new = output("out"), str(tmp_path / "calibrated")
    assert run(["calibrate", out, "-m", tiny_model.path, "--target-precision", "0.9", "-o", new]) == 0
    assert load_bundle(new).model_id in capsys.readouterr().out
    assert load_bundle(new).thresholds["accept"]
    assert run(["calibrate", out, "-m", tiny_model.path, "--review-budget", "0.1", "-o", new, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_id"] == load_bundle(new).model_id


def test_compare_prints_a_summary_or_json(output, tmp_path, capsys):
    a, b = output("a", 1.0), output("b", 2.0)
    assert run(["compare", a, b, "-o", str(tmp_path / "diff"), "--thumbnails", "0"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "diff" / "compare.html").exists()
    assert "300 images in both" in printed
    assert "McNemar" in printed
    assert run(["compare", a, b, "-o", str(tmp_path / "diff"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "diff" / "compare.json").read_text())
