from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from imgbatch.cli import run
from imgbatch.commands.classify import classify
from imgbatch.commands.plan import plan
from imgbatch.config import Config
from imgbatch.core.runs import find_run


def test_a_plan_for_people_tells_what_would_run_and_writes_nothing(
    photo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    inputs = ["-m", str(photo_config.model.path), "--manifest", str(photo_config.input.manifest), "-o", str(out)]
    settings = ["classify.engine=local", "classify.unit_rows=16", "resources.device=cpu", "report.price_per_hour=2"]
    assert run(["plan", *inputs, *(part for setting in settings for part in ("--set", setting))]) == 0
    printed = capsys.readouterr()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in printed.out.splitlines() if line.split()}
    assert rows["run"].endswith(": a new run")
    assert rows["rows"] == "120 in 8 units of 16"
    assert rows["decode"].endswith(" ms an image in one process (32 sampled)")
    assert rows["time"].endswith(" (h:mm:ss)")
    assert rows["cost"].startswith("2.00 an hour, ")
    assert rows["cost"].endswith(" in all: nodes only, without requests")
    assert {"pools", "model", "images", "fetch", "images/s", "output", "memory"} <= rows.keys()
    assert "sampled images have no pixels, like TRUNCATED" in printed.err
    assert list(tmp_path.iterdir()) == []


def options(command: Callable[..., None]) -> dict[str, tuple[object, object]]:
    """Each parameter of a command with its type, name and help on the command line, and its default."""
    signature = inspect.signature(command, eval_str=True)
    return {name: (parameter.annotation, parameter.default) for name, parameter in signature.parameters.items()}


def test_the_options_of_a_plan_are_those_of_the_command_that_it_is_of() -> None:
    planned = options(plan)
    assert planned.pop("as_json")
    assert planned == options(classify)


def test_classify_with_the_same_options_runs_what_was_planned(
    photo_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = ["-m", str(photo_config.model.path), "--manifest", str(photo_config.input.manifest)]
    given = [*inputs, "-o", str(tmp_path / "out"), "--engine", "local", "--set", "resources.device=cpu"]

    def planned(*more: str) -> list[str]:
        assert run(["plan", *given, *more, "--set", "plan.sample_rows=0"]) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        return [" ".join(row[1:]) for row in rows if row and row[0] in ("run", "rows")]

    limited = ["--limit", "20", "--embeddings", "--set", "errors.max_rate=1"]
    new, rows = planned(*limited)
    assert rows.startswith("20 in ")
    assert run(["classify", *given, *limited]) == 0
    capsys.readouterr()
    run_id = find_run(str(tmp_path / "out")).run_id
    assert new == f"{run_id}: a new run"
    assert planned(*limited)[0].startswith(f"{run_id}: finished already")
    assert planned(*limited, "--new-run")[0] == f"{run_id}-2: a new run"
    # 20 photos are labelled but for one that was cut short.
    assert [planned(*more)[1].split()[0] for more in (["--skip-existing"], ["--since-run", run_id])] == ["101", "101"]
