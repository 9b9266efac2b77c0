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
