from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imgbatch.core import failpoints
from imgbatch.core.failpoints import ONCE_VARIABLE, POINTS, VARIABLE, FailpointHit, parse_failpoints
from imgbatch.errors import UsageError


def passages(specification: str, point: str = "commit.before", keys: tuple[object, ...] = (None,) * 4) -> list[bool]:
    """Which passages through ``point`` raise."""
    failpoint = parse_failpoints(specification)
    found = []
    for key in keys:
        try:
            failpoint(point, key)
        except FailpointHit:
            found.append(True)
        else:
            found.append(False)
    return found


def test_without_a_specification_a_passage_is_an_empty_function() -> None:
    assert failpoints.failpoint is failpoints._ignore
    assert parse_failpoints(" ; ") is failpoints._ignore


def test_which_passages_act() -> None:
    assert passages("commit.before=raise") == [True] * 4
    assert passages("commit.before=raise@2") == [False, True, False, False]
    assert passages("commit.before=raise@3+") == [False, False, True, True]
    assert passages("commit.before=raise@1; commit.before=raise@3") == [True, False, True, False]
    assert passages("commit.after=raise") == [False] * 4
    assert passages("commit.before[7]=raise@2", keys=(7, 8, 7, 7)) == [False, False, True, False]
    assert passages("commit.after=raise; commit.before[a b.parquet]=raise", keys=("a b.parquet", "c")) == [True, False]


@pytest.mark.parametrize(
    "specification", ["commit.befor=kill", "commit.before", "commit.before=explode", "commit.before=kill@x", "=kill"]
)
def test_what_is_not_understood_is_refused(specification: str) -> None:
    with pytest.raises(UsageError, match=VARIABLE):
        parse_failpoints(specification)


def test_once_means_once_over_all_processes(tmp_path: Path) -> None:
    script = "from imgbatch.core.failpoints import failpoint; failpoint('commit.before'); print('passed')"
    environment = os.environ | {VARIABLE: "commit.before=kill", ONCE_VARIABLE: str(tmp_path)}
    codes = [subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode for _ in range(3)]
    assert codes == [-signal.SIGKILL, 0, 0]


def test_every_point_is_somewhere_in_the_code_and_no_other() -> None:
    named: list[str] = []
    for path in Path(failpoints.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "failpoint":
                named.append(ast.literal_eval(node.args[0]))
    assert set(named) == set(POINTS)
