"""The installed command, as a person uses it: in processes of its own, on real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


@pytest.mark.soak
@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_run_again(
    engine: str, stop: signal.Signals, photo_manifest: Path, tiny_model: ModelBundle, tmp_path: Path
) -> None:
    """Exit code 4, one line, and nothing that was committed is lost."""
    if (engine, stop) == ("ray", signal.SIGINT):
        pytest.skip("SIGINT takes the same way as SIGTERM; starting Ray once is enough")
    out = tmp_path / "out"
    arguments = [
        COMMAND, "classify", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(out),
        "--set", "classify.unit_rows=1", *LOCAL, "--engine", engine,
        "--set", "resources.decode_actors=1", "--set", "resources.classify_actors=1",
    ]  # fmt: skip
    driver = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)
    wait_for_first_unit(driver, out)
    driver.send_signal(stop)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 4, errors
    how = "stopped after the units in flight" if stop == signal.SIGINT else "interrupted"
    assert errors.splitlines()[-1] == f"imgbatch: {how}; the same command continues"
    (state,) = json.loads(imgbatch("status", out, "--json").stdout)
    assert state["state"] == "interrupted"
    assert 0 < state["units_done"] < 120
    imgbatch("classify", "-m", tiny_model.path, "--manifest", photo_manifest, "-o", out, *LOCAL)
    assert "120 of 120 rows" in imgbatch("verify", out).stdout


def wait_for_first_unit(driver: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(out.glob("runs/*/units/unit-*")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)


@pytest.mark.soak
def test_killed_on_ray_and_run_again(photo_manifest: Path, tiny_model: ModelBundle, tmp_path: Path) -> None:
    """SIGKILL of the driver while Ray works; its processes end by themselves, and the same command finishes."""
    out = tmp_path / "out"
    arguments = [
        COMMAND, "classify", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(out),
        "--set", "classify.unit_rows=1", "--set", "errors.max_rate=1", "--set", "resources.decode_actors=1",
        "--set", "resources.classify_actors=1", "--set", "ray.object_store_mb=200", "--set", "resources.device=cpu",
    ]  # fmt: skip
    driver = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)
    wait_for_first_unit(driver, out)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    finished = list(out.glob("runs/*/_SUCCESS"))
    assert not finished
    again = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing:" in again.stderr
    assert "120 of 120 rows" in imgbatch("verify", out).stdout
