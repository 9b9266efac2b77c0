from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image

from imgbatch.cli import app, run
from imgbatch.core.manifest import open_manifest
from imgbatch.core.manifest_build import parse_split_shares
from tests.rasters import noise, write_raster


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"]:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(path)
    return tmp_path / "photos"


def test_build_prints_what_it_wrote(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "m.parquet"
    arguments = ["manifest", "build", str(photos), "--targets-from", "folder", "-o", str(output)]
    assert run([*arguments, "--split", "train=0.5,test=0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"{output}: 3 images" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert ["class", "test", "train", "all"] in lines or ["class", "train", "all"] in lines
    assert any(line[:1] == ["cat"] and line[-1:] == ["2"] for line in lines)
    assert any(line[:1] == ["images"] and line[-1:] == ["3"] for line in lines)
    assert open_manifest(str(output)).schema.names == ["uri", "target", "split"]


@pytest.mark.parametrize("command", ["build", "tile"])
def test_the_splits_in_the_help_are_those_that_training_wants(command: str) -> None:
    group: Any = typer.main.get_command(app)
    (option,) = [option for option in group.commands["manifest"].commands[command].params if option.name == "split"]
    (example,) = re.findall(r"\w+=0\.\d(?:,\w+=0\.\d)+", option.help)
    assert {"train", "validation"} <= parse_split_shares(example).keys()


def test_build_does_not_overwrite_unless_told(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["manifest", "build", str(photos), "-o", str(tmp_path / "m.parquet")]
    assert run(arguments) == 0
    assert run(arguments) == 2
    assert "exists; choose another name or give --overwrite" in capsys.readouterr().err
    assert run([*arguments, "--overwrite"]) == 0


def test_build_from_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,kinds\na.jpg,x|y\n")
    output = str(tmp_path / "m.parquet")
    options = ["--column", "uri=file", "--column", "targets=kinds", "--targets-separator", "|", "--root", "/data"]
    assert run(["manifest", "build", str(tmp_path / "list.csv"), "-o", output, *options]) == 0
    (table,) = open_manifest(output).iter_batches()
    assert table.to_pydict() == {"uri": ["/data/a.jpg"], "targets": [["x", "y"]]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no such file or directory"),
        (["empty"], "no image found"),
        (["notes.txt"], "of no known kind"),
        (["*.csv"], "no file matches"),
        (["photos", "--split", "train=2"], "the shares add up to 2"),
        (["photos", "--column", "uri"], "--column uri: expected NEW=OLD"),
        (["photos", "--column", "uri=a", "--column", "target=a"], "column 'a' is used twice"),
        (["photos", "--split", "train=1", "--split-from", "folder"], "give one of them"),
        (["photos", "--split-from", "folder"], "--split-from folder needs a folder named"),
        (["photos", "--targets-from", "file"], "--targets-from"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("not a list")
    source = str(tmp_path / arguments[0])
    assert photos.exists()
    assert run(["manifest", "build", source, *arguments[1:], "-o", str(tmp_path / "m.parquet")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "m.parquet").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(["manifest", "build", str(photos), "-o", str(tmp_path / "file" / "m.parquet")]) == 2
    captured = capsys.readouterr()
    assert "cannot be written" in captured.err
    assert captured.err.count("\n") == 1


def test_check_shows_and_ends_with_its_code(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(tmp_path / "m.parquet")
    assert run(["manifest", "build", str(photos), "--targets-from", "folder", "-o", manifest]) == 0
    assert run(["manifest", "check", manifest]) == 0
    printed = capsys.readouterr().out
    assert "sample: 3 of 3 images can be read" in printed
    assert "20 x 10" in printed
    assert "no problem found" in printed

    (photos / "cat" / "a.jpg").write_text("no longer an image")
    assert run(["manifest", "check", manifest]) == 5
    captured = capsys.readouterr()
    assert "problem: 1 of 3 sampled images cannot be read" in captured.out
    assert captured.err.count("\n") == 1

    assert run(["manifest", "check", manifest, "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["num_rows"] == 3
    assert [row["status"] for row in report["sample"]] == ["NOT_AN_IMAGE", "OK", "OK"]


def test_check_says_that_it_did_not_list_every_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imgbatch.core.tally.MAX_TARGETS", 40)
    rows = {"uri": [f"{n}.jpg" for n in range(50)], "target": [f"class {n}" for n in range(50)]}
    pq.write_table(pa.table(rows), tmp_path / "m.parquet")
    check = ["manifest", "check", str(tmp_path / "m.parquet"), "--sample", "0"]
    assert run(check) == 0
    assert "and at least 10 more classes" in capsys.readouterr().out
    assert run([*check, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (len(report["targets"]), report["targets_not_listed"]) == (40, 10)


def test_check_of_nothing_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["manifest", "check", str(tmp_path / "m.parquet")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_stats_prints_what_the_bands_hold(tmp_path, capsys):
    samples = noise(2, 16, 16)
    path = write_raster(tmp_path / "scene.tif", samples)
    pq.write_table(pa.table({"uri": [str(path)]}), tmp_path / "m.parquet")
    assert run(["manifest", "stats", str(tmp_path / "m.parquet"), "--bands", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["tiles"] == 1
    assert printed["bands"][0] == pytest.approx(
        {
            "band": 2,
            "missing": 0,
            "min": samples[1].min(),
            "p2": np.percentile(samples[1], 2),
            "mean": samples[1].mean(),
            "std": samples[1].std(),
            "p98": np.percentile(samples[1], 98),
            "max": samples[1].max(),
        }
    )
    assert run(["manifest", "stats", str(tmp_path / "m.parquet")]) == 0
    assert "1 tiles read, 0 not" in capsys.readouterr().out
    assert run(["manifest", "stats", str(tmp_path / "m.parquet"), "--bands", "0"]) == 2
