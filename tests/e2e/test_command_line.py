"""The installed command, as a person uses it: in processes of its own, on real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgbatch.core.model import ModelBundle

COMMAND = str(Path(sys.executable).with_name("imgbatch"))


def imgbatch(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False, env=environment()
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def environment() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONWARNINGS": "default"}


LOCAL = ("--engine", "local", "--set", "errors.max_rate=1", "--set", "resources.device=cpu")


def test_from_a_folder_to_a_query(photos: list[Path], tiny_model: ModelBundle, tmp_path: Path) -> None:
    manifest, out = tmp_path / "m.parquet", tmp_path / "labels"
    imgbatch("manifest", "build", photos[0].parent, "-o", manifest)
    first = imgbatch("classify", "-m", tiny_model.path, "--manifest", manifest, "-o", out, *LOCAL)
    assert "120 rows: 114 predictions, 6 errors" in first.stdout
    again = imgbatch("classify", "-m", tiny_model.path, "--manifest", manifest, "-o", out, *LOCAL)
    assert "finished already, nothing to do" in again.stdout
    assert "120 of 120 rows" in imgbatch("verify", out).stdout
    assert json.loads(imgbatch("verify", out, "--json").stdout)["ok"] is True
    (state,) = json.loads(imgbatch("status", out, "--json").stdout)
    assert (state["state"], state["counts"]["OK"]) == ("finished", 114)
    assert state["run_id"] in imgbatch("status", out).stdout
    sql = "select count(*) n, any_value(predicted_at) t from predictions"
    assert "114" in imgbatch("query", out, sql).stdout
    assert imgbatch("query", out, sql, "--format", "csv").stdout.splitlines()[0] == "n,t"
    assert json.loads(imgbatch("query", out, sql, "--format", "json").stdout)[0]["n"] == 114
    assert json.loads(imgbatch("query", out, "from predictions where false", "--format", "json").stdout) == []
    imgbatch("query", out, sql, "--format", "parquet", "-o", tmp_path / "q.parquet")
    assert (tmp_path / "q.parquet").stat().st_size > 0
    assert "6 rows: 0 predictions, 6 errors" in imgbatch("retry", out, "--engine", "local").stdout
    imgbatch("clean", out, "--run", state["run_id"], "--yes", code=2)  # its retry stands on it
    states = json.loads(imgbatch("status", out, "--json").stdout)
    for run in reversed(states):
        imgbatch("clean", out, "--run", run["run_id"], "--yes")
    assert [path.name for path in out.rglob("*") if path.is_file()] == ["current.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify", "-m", "MODEL", "--manifest", "nonsense.parquet", "-o", "x"], 2, "nonsense.parquet"),
        (["classify", "--manifest", "m", "-o", "x"], 2, "model.path"),
        (["classify", "-m", "MODEL", "-o", "x"], 2, "input.manifest"),
        (["classify", "-m", "nowhere", "--manifest", "MANIFEST", "-o", "x"], 2, "nowhere"),
        (["classify", "-m", "MODEL", "--manifest", "MANIFEST"], 2, "output.path"),
        (["classify", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "/proc/nowhere"], 2, "/proc/nowhere"),
        (["classify", "--set", "classify.unit_rows=many"], 2, "classify.unit_rows"),
        (["classify", "--set", "clasify.unit_rows=1"], 2, "clasify"),
        (["classify", "-c", "none.yaml"], 2, "none.yaml"),
        (["classify", "--engine", "spark"], 2, "classify.engine"),
        (["classify", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "x", "--set", "output.partition_by=[shape]"], 2,
         "shape"),
        (["verify", "nowhere"], 2, "nowhere"),
        (["status", "nowhere"], 2, "nowhere"),
        (["query", "nowhere", "select 1"], 2, "nowhere"),
        (["classfy"], 2, "classfy"),
        ([], 2, "Usage"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line(
    arguments: list[str], code: int, words: str, tiny_model: ModelBundle, photo_manifest: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from imgbatch.cli import run

    monkeypatch.chdir(tmp_path)
    real = {"MODEL": tiny_model.path, "MANIFEST": str(photo_manifest)}
    assert run([real.get(argument, argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    if arguments:
        assert message.count("\n") == 1


def test_a_traceback_only_for_who_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from imgbatch.cli import run

    assert run(["verify", str(tmp_path / "nowhere"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
