from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run
from imgbatch.config import Config
from imgbatch.errors import ExitCode
from imgbatch.runtime.job import classify
from tests.conftest import changed


def classify_again(config: Config, listed: list[Path], tmp_path: Path) -> list[str]:
    """The command for only what is not labelled, of images that are listed without an etag."""
    manifest = tmp_path / "listed.parquet"
    if not manifest.exists():
        pq.write_table(pa.table({"uri": [str(path) for path in listed]}), manifest)
    inputs = ["-m", str(config.model.path), "--manifest", str(manifest), "-o", str(config.output.path)]
    settings = ["--engine", "local", "--set", "errors.max_rate=1", "--set", "resources.device=cpu"]
    return ["classify", *inputs, *settings, "--skip-existing"]


def test_what_failed_in_a_finished_run_is_for_a_retry_and_the_same_command_says_so(
    photo_config: Config, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "late.jpg"
    command = classify_again(photo_config, [*photos[:3], late], tmp_path)
    assert run(command) == ExitCode.DONE
    assert " retry " not in capsys.readouterr().out
    shutil.copy(photos[3], late)
    assert run(command) == ExitCode.DONE
    done, told, *_ = capsys.readouterr().out.splitlines()
    assert done.endswith(" is finished already, nothing to do")
    assert told.startswith("the rows that failed in it are tried again by `")
    _, *retry = shlex.split(told.split("`")[1])
    assert retry[:2] == ["retry", str(photo_config.output.path)]
    assert run([*retry, "--engine", "local", "--set", "resources.device=cpu"]) == ExitCode.DONE
    assert "1 rows: 1 predictions, 0 errors" in capsys.readouterr().out


def test_where_nothing_failed_no_retry_is_named(
    photo_config: Config, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = classify_again(photo_config, photos[:3], tmp_path)
    for _ in range(2):
        assert run(command) == ExitCode.DONE
    told = capsys.readouterr().out
    assert "finished already, nothing to do" in told
    assert " retry " not in told


def test_a_run_without_a_prediction_names_the_retry(
    photo_config: Config, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = tmp_path / "late.jpg"
    command = classify_again(photo_config, [late], tmp_path)
    assert run(command) == ExitCode.ERROR_BUDGET
    shutil.copy(photos[3], late)
    capsys.readouterr()
    assert run(command) == ExitCode.ERROR_BUDGET
    told = capsys.readouterr().err.strip()
    assert f"and try the rows again with `imgbatch retry {photo_config.output.path} --run " in told
    _, *retry = shlex.split(told.split("`")[-2])
    assert run([*retry, "--engine", "local", "--set", "resources.device=cpu"]) == ExitCode.DONE


def nights(config: Config, photos: list[Path], tmp_path: Path) -> list[str]:
    """run_ids of three nights; in each of the first two an image was not there."""
    runs = []
    for number, late in enumerate(["a.jpg", "b.jpg", None]):
        images = [photos[6 + number], *([tmp_path / late] if late else [])]
        pq.write_table(pa.table({"uri": [str(path) for path in images]}), tmp_path / f"{number}.parquet")
        runs.append(classify(changed(config, input__manifest=str(tmp_path / f"{number}.parquet"))).run_id)
    return runs


def test_older_nights_with_failures_are_named_and_retried_all_at_once(
    photo_config: Config, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = nights(photo_config, photos, tmp_path)
    out = str(photo_config.output.path)
    settings = ["--engine", "local", "--set", "resources.device=cpu"]
    assert run(["retry", out, *settings]) == ExitCode.DONE
    nothing, elsewhere = capsys.readouterr().out.splitlines()
    assert nothing == f"nothing to retry in run {third}: every row of it has a prediction"
    assert elsewhere.startswith(f"without a prediction: 1 rows of run {first}, 1 rows of run {second}; `")
    _, *command = shlex.split(elsewhere.split("`")[1])
    assert command == ["retry", out, "--all"]
    shutil.copy(photos[3], tmp_path / "a.jpg")
    assert run([*command, *settings]) == ExitCode.DONE
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("report:")]
    assert [line.split(", retried as run ")[0] for line in told[:2]] == [f"run {first}", f"run {second}"]
    assert ": 1 rows: 1 predictions, 0 errors" in told[0]
    assert ": 1 rows: 0 predictions, 1 errors" in told[1]
    assert told[2:] == ["2 runs retried: 2 rows, 1 predictions, 1 errors"]
    shutil.copy(photos[3], tmp_path / "b.jpg")
    assert run([*command, *settings]) == ExitCode.DONE
    capsys.readouterr()
    assert run([*command, *settings]) == ExitCode.DONE
    captured = capsys.readouterr()
    assert captured.out == "nothing to retry in any run: every row that failed has a prediction by now\n"


def test_a_night_that_cannot_be_retried_is_named_and_the_exit_code_says_so(
    photo_config: Config, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *_ = nights(photo_config, photos, tmp_path)
    shutil.copy(tmp_path / "2.parquet", tmp_path / "0.parquet")
    command = ["retry", str(photo_config.output.path), "--all", "--engine", "local", "--set", "resources.device=cpu"]
    assert run(command) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert f"run {first} is passed over: manifest {tmp_path}/0.parquet: changed since run {first};" in captured.err
    assert captured.err.splitlines()[-1].endswith(f"not retried: {first}, for the reasons above")
    assert "1 runs retried: 1 rows, 0 predictions, 1 errors" in captured.out


def test_all_runs_and_one_are_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["retry", "out", "--all", "--run", "r1"]) == ExitCode.USAGE
    assert "give --all or --run" in capsys.readouterr().err
