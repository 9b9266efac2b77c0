from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from imgbatch.cli import run
from imgbatch.commands.report import report_after_run
from imgbatch.config import load_config

pytest.importorskip("jinja2", reason="the report extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")


@pytest.fixture
def classify_command(photo_config) -> list[str]:
    config = photo_config
    flags = ["-m", config.model.path, "--manifest", config.input.manifest, "-o", config.output.path]
    settings = ("errors.max_rate=1.0", "resources.device=cpu", "report.price_per_hour=7")
    return ["classify", "--engine", "local", *flags, *(part for key in settings for part in ("--set", key))]


def test_classify_leaves_a_page_and_report_writes_it_anew(classify_command, photo_config, tmp_path, capsys):
    out = photo_config.output.path
    assert run(classify_command) == 0
    [page] = Path(out, "runs").glob("*/report.html")
    assert f"report:  {page}" in capsys.readouterr().out
    assert "Speed and cost" in page.read_text()

    written = page.stat().st_mtime_ns
    assert run(classify_command) == 0
    assert page.stat().st_mtime_ns == written

    elsewhere = tmp_path / "page.html"
    command = ["report", out, "-o", str(elsewhere), "--slice-by", "shop", "--thumbnails", "0"]
    assert run([*command, "--set", "report.price_per_hour=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(elsewhere)
    assert "By shop, worst first" in elsewhere.read_text()


def test_a_run_does_not_fail_with_its_page(classify_command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(classify_command) == 0
    messages = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert messages == ["no report: the report needs matplotlib, which pip install 'imgbatch[report]' brings"]


def test_whatever_goes_wrong_with_the_page_is_one_line(tmp_path, capsys):
    report_after_run(str(tmp_path), "r1", keep=False)
    assert capsys.readouterr().err.splitlines() == [f"no report: {tmp_path}: no finished run there"]
    report_after_run(str(tmp_path), "r1", keep=False, config=load_config(None, ["run.log_format=json"]))
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["run_id"], record["message"]) == ("r1", f"no report: {tmp_path}: no finished run there")


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), RuntimeError("Query interrupted")], ids=["here", "in DuckDB"]
)
def test_an_interrupt_of_the_page_leaves_the_run_finished(
    classify_command, photo_config, interrupt, monkeypatch, capsys
):
    def stop(*_, **__):
        raise interrupt

    monkeypatch.setattr("imgbatch.report.page.make_thumbnails", stop)
    assert run(classify_command) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "no report: interrupted; the run is finished"
    assert captured.out.splitlines()[-1].startswith("next:")
    [run_root] = Path(photo_config.output.path, "runs").iterdir()
    with pytest.raises(KeyboardInterrupt):
        report_after_run(photo_config.output.path, run_root.name, keep=False, more_to_do=True)


def test_report_of_nothing_is_wrong_usage(tmp_path, capsys):
    assert run(["report", str(tmp_path)]) == 2
    assert "no finished run there" in capsys.readouterr().err
