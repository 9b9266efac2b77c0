from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run
from imgbatch.config import load_config
from imgbatch.core.clean import abandoned_runs
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths, find_run, list_runs
from imgbatch.core.views import open_views
from imgbatch.errors import Interrupted
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.job import classify

LABELS_SQL = "select image_id, label, probability from predictions order by image_id"


@pytest.fixture
def out(store_run: Callable[..., Path]) -> str:
    probs_NK = np.array([[0.75, 0.25], [0.125, 0.875]], np.float32)
    return str(store_run(("cat", 'a "big" dog, really'), probs_NK, image_ids=["one", "zwei ü"]))


@pytest.fixture(scope="module")
def finished(photo_manifest: Path, tiny_model: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the local engine over 120 photos, 6 of which are cut short; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    flags = {
        "input.manifest": str(photo_manifest),
        "model.path": tiny_model.path,
        "output.path": str(folder),
        "classify.engine": "local",
        "errors.max_rate": 1.0,
        "resources.device": "cpu",
    }
    classify(load_config(flags=flags))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def run_id_of(out: Path) -> str:
    (folder,) = (out / "runs").iterdir()
    return folder.name


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command line printed; it must end with ``code`` and say nothing else unless it failed."""
    assert run([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert bool(captured.err) == bool(code), captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The one line that a refused command line prints."""
    assert run([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert message.startswith("imgbatch: ")
    assert message.count("\n") == 1
    return message


def test_a_query_prints_a_table_with_every_value_whole(out, capsys):
    header, *rows = printed(capsys, "query", out, LABELS_SQL).splitlines()
    assert header.split() == ["image_id", "label", "probability"]
    assert [" ".join(row.split()) for row in rows] == ["one cat 0.7500", 'zwei ü a "big" dog, really 0.8750']
    assert ":id: [red]" in printed(capsys, "query", out, "select ':id: [red]' as label")
    long_value = "x" * 400
    assert long_value in printed(capsys, "query", out, f"select '{long_value}' long")


def test_the_help_of_query_names_every_view(out, capsys):
    with open_views(out) as connection:
        rows = connection.sql("select view_name from duckdb_views() where not internal").fetchall()
    views = {name for (name,) in rows}
    assert {"predictions", "runs"} <= views
    assert views <= set(re.findall(r"\w+", printed(capsys, "query", "--help")))


def test_csv_comes_back_as_it_was(out, capsys):
    rows = list(csv.reader(printed(capsys, "query", out, LABELS_SQL, "--format", "csv").splitlines()))
    assert rows == [
        ["image_id", "label", "probability"],
        ["one", "cat", "0.75"],
        ["zwei ü", 'a "big" dog, really', "0.875"],
    ]


def test_json_keeps_nulls_lists_and_structs(out, capsys):
    sql = "select image_id, labels, probabilities, top_k[1] best, predicted_at from predictions order by 1 limit 1"
    assert json.loads(printed(capsys, "query", out, sql, "--format", "json")) == [
        {
            "image_id": "one",
            "labels": None,
            "probabilities": [0.75, 0.25],
            "best": {"label": "cat", "probability": 0.75},
            "predicted_at": "2026-01-02 03:04:05+00:00",
        }
    ]
    assert json.loads(printed(capsys, "query", out, "from predictions where false", "--format", "json")) == []


def test_json_is_json_whatever_the_query_gives(out, capsys):
    sql = (
        "select 'nan'::float as share, [1, '-inf'::double] as shares, 1.5 as price, 1 as a, 2 as a, "
        "map {date '2026-01-02': 0.25} as by_day, map {7: 'x'} as by_number"
    )
    found = printed(capsys, "query", out, sql, "--format", "json")
    assert json.loads(found, parse_constant=pytest.fail) == [
        {
            "share": None,
            "shares": [1, None],
            "price": 1.5,
            "a": 1,
            "a_1": 2,
            "by_day": {"2026-01-02": 0.25},
            "by_number": {"7": "x"},
        }
    ]


@pytest.mark.parametrize("output_format", ["csv", "json", "table"])
def test_a_file_holds_what_would_have_been_printed(out, output_format, tmp_path, capsys):
    file = tmp_path / "result"
    on_screen = printed(capsys, "query", out, LABELS_SQL, "--format", output_format)
    assert printed(capsys, "query", out, LABELS_SQL, "--format", output_format, "-o", file) == ""
    assert file.read_text().splitlines() == on_screen.splitlines()


def test_parquet_goes_into_a_file_with_its_types(out, tmp_path, capsys):
    file = tmp_path / "result.parquet"
    printed(capsys, "query", out, LABELS_SQL, "--format", "parquet", "-o", file)
    table = pq.read_table(file)
    assert [str(field.type) for field in table.schema] == ["string", "string", "float"]
    assert table["image_id"].to_pylist() == ["one", "zwei ü"]
    assert "parquet: name a file with -o" in refused(capsys, "query", out, LABELS_SQL, "--format", "parquet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["selec label from predictions"], "syntax error"),
        (["select lable from predictions"], "lable"),
        (["from nothing"], "nothing"),
        (["select 1", "--format", "xml"], "one of table, csv, json, parquet"),
        (["select 1", "--formt", "csv"], "--formt"),
        ([], "sql"),
    ],
)
def test_a_wrong_query_is_one_line(out, arguments, words, capsys):
    assert words in refused(capsys, "query", out, *arguments)


@pytest.mark.parametrize("output_format", ["table", "csv", "json"])
def test_what_fails_at_a_late_row_is_one_line_too(out, output_format, tmp_path, capsys):
    sql = "select case when range < 500000 then 'row' else error('too late') end from range(1000000)"
    file = tmp_path / "result"
    message = refused(capsys, "query", out, sql, "--format", output_format, "-o", file)
    assert message.startswith("imgbatch: query: ")
    assert "too late" in message
    assert list(tmp_path.glob("*result*")) == []


@pytest.mark.parametrize(
    "arguments", [("status",), ("verify",), ("query", "select 1"), ("clean", "--run", "r0", "--yes")]
)
def test_a_directory_without_runs_is_one_line(arguments, tmp_path, capsys):
    command, *rest = arguments
    assert str(tmp_path) in refused(capsys, command, tmp_path, *rest)


def test_status_counts_rows_units_and_outcomes(finished, capsys):
    header, row = printed(capsys, "status", finished).splitlines()
    assert header.split() == ["run", "state", "rows", "units", "predictions", "errors", "images/s", "started"]
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert (shown["state"], shown["rows"], shown["predictions"], shown["errors"]) == ("finished", "120", "114", "6")
    (state,) = json.loads(printed(capsys, "status", finished, "--json"))
    assert state["run_id"] == shown["run"] == run_id_of(finished)
    assert state["units_done"] == state["num_units"]
    assert state["counts"]["OK"] == 114
    assert sum(state["counts"].values()) == state["num_rows"] == 120


def test_verify_says_what_it_checked(finished, capsys):
    run_id = run_id_of(finished)
    *checks, histogram = printed(capsys, "verify", finished).splitlines()
    assert [check.split()[:2] for check in checks] == [["ok", run_id]] * len(checks)
    assert f"ok   {run_id} rows: 120 of 120 rows" in checks
    assert histogram.startswith(f"{run_id}: ")
    assert "114 OK" in histogram
    result = json.loads(printed(capsys, "verify", finished, "--run", run_id, "--json"))
    assert result["ok"] is True
    assert sum(result["counts"][run_id].values()) == 120
    assert "r000000000000" in refused(capsys, "verify", finished, "--run", "r000000000000")


def test_verify_names_the_file_that_was_damaged(copied, capsys):
    (part,) = (copied / "predictions").rglob("*.parquet")
    part.write_bytes(part.read_bytes()[:-1])
    message = refused(capsys, "verify", copied, code=5)
    assert f"{part.relative_to(copied)}: content differs" in message
    assert run(["verify", str(copied), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["ok"] is False
    part.unlink()
    assert "missing" in refused(capsys, "verify", copied, code=5)


def test_verify_finds_a_stray_file(copied, capsys):
    (part,) = (copied / "predictions").rglob("*.parquet")
    shutil.copy(part, part.with_name("part-00001.parquet"))
    assert "part-00001.parquet: not in files.json" in refused(capsys, "verify", copied, code=5)


def test_compact_takes_the_size_of_files_from_the_configuration_too(copied, capsys):
    setting = ("--set", "output.target_file_mb=7")
    assert "nothing to do" not in printed(capsys, "compact", copied, *setting)
    assert "nothing to do" in printed(capsys, "compact", copied, "--target-file-mb", "7")
    assert "nothing to do" not in printed(capsys, "compact", copied, "--target-file-mb", "8", *setting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("query", "select 1"), "interrupted"), (("retry",), "interrupted; the same command continues")],
)
def test_an_interruption_promises_what_the_command_keeps(arguments, message, out, monkeypatch, capsys):
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(duckdb, "connect", interrupt)
    command, *rest = arguments
    assert refused(capsys, command, out, *rest, code=4) == f"imgbatch: {message}\n"


def test_clean_removes_a_run_and_nothing_else(copied, capsys):
    run_id = run_id_of(copied)
    beside = copied / "notes.txt"
    beside.write_text("of a person")
    assert "r000000000000" in refused(capsys, "clean", copied, "--run", "r000000000000", "--yes")
    assert "--run" in refused(capsys, "clean", copied, "--yes")
    assert "--run" in refused(capsys, "clean", copied, "--run", run_id, "--abandoned", "--yes")
    assert printed(capsys, "clean", copied, "--run", run_id, "--yes") == f"removed {run_id}\n"
    assert sorted(path.name for path in copied.rglob("*") if path.is_file()) == ["current.json", "notes.txt"]
    assert str(copied) in refused(capsys, "query", copied, "select 1")


def given_up(out: Path, photo_manifest: Path, tiny_model: ModelBundle, limit: int) -> RunPaths:
    """A run that stopped after its first unit, and that another one was started in place of."""
    flags = {
        "input.manifest": str(photo_manifest),
        "model.path": tiny_model.path,
        "output.path": str(out),
        "classify.engine": "local",
        "classify.unit_rows": 16,
        "errors.max_rate": 1.0,
        "resources.device": "cpu",
        "input.limit": limit,
        "run.on_unfinished": "abandon",
    }
    stop = StopSwitch(itertools.count().__next__)
    with pytest.raises(Interrupted):
        classify(load_config(flags=flags | {"run.stop_after_s": 1.5}), stop=stop)
    return find_run(str(out)).paths


def test_clean_removes_what_was_given_up_and_nothing_else(
    copied: Path, photo_manifest: Path, tiny_model: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert printed(capsys, "clean", copied, "--abandoned") == "no run there that was given up, nothing to remove\n"
    first, second, unfinished = (given_up(copied, photo_manifest, tiny_model, limit) for limit in (40, 50, 60))
    files = [[path for path in Path(each.root).rglob("*") if path.is_file()] for each in (first, second)]
    sizes = [sum(path.stat().st_size for path in written) for written in files]
    assert [each.num_bytes for each in abandoned_runs(str(copied))] == sizes
    _, *rows, removed = printed(capsys, "clean", copied, "--abandoned", "--yes").splitlines()
    assert [row.split()[:3] for row in rows] == [
        [each.run_id, str(limit), f"{size / 1e6:,.1f}"]
        for each, limit, size in zip((first, second), (40, 50), sizes, strict=True)
    ]
    assert removed == f"removed 2 runs, {sum(sizes) / 1e6:,.1f} MB"
    assert [entry.run_id for entry in list_runs(str(copied))] == [run_id_in(before), unfinished.run_id]
    assert not Path(first.root).exists()
    assert {path: path.read_bytes() for path in before} == before


def run_id_in(files: Iterable[Path]) -> str:
    (run_id,) = {path.parent.name for path in files if path.name == "plan.json"}
    return run_id


@pytest.mark.parametrize("sign", ["_SUCCESS", "heartbeat.json"])
def test_clean_leaves_a_run_that_was_given_up_too_early(
    sign: str, copied: Path, photo_manifest: Path, tiny_model: ModelBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its driver was cut off for a while, came back, and has finished it, or is still at work."""
    first, _ = (given_up(copied, photo_manifest, tiny_model, limit) for limit in (40, 50))
    alive = {"host": "elsewhere", "pid": 1, "time": time.time()}
    Path(first.root, sign).write_text(json.dumps(alive) if sign == "heartbeat.json" else "")
    assert printed(capsys, "clean", copied, "--abandoned", "--yes").startswith("no run there that was given up")
    assert Path(first.plan).exists()


@pytest.mark.parametrize("abandoned", [False, True], ids=["one run", "abandoned"])
@pytest.mark.parametrize("said", ["n\n", "\n", ""], ids=["no", "nothing", "the end"])
def test_clean_asks_and_takes_no_for_an_answer(
    copied, photo_manifest, tiny_model, monkeypatch, tmp_path, capsys, said, abandoned
):
    answer = tmp_path / "answer"
    which = ["--run", run_id_of(copied)]
    if abandoned:
        which = ["--abandoned"]
        for limit in (40, 50):
            given_up(copied, photo_manifest, tiny_model, limit)
    answer.write_text(said)
    before = sorted(copied.rglob("*"))
    with answer.open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run(["clean", str(copied), *which]) == 1
    captured = capsys.readouterr()
    assert ("Remove these 1 runs of" if abandoned else "its labels included?") in captured.out
    assert captured.err == "nothing was removed; --yes removes without asking\n"
    assert sorted(copied.rglob("*")) == before
