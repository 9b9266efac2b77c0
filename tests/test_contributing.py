"""What CONTRIBUTING.md says of the fault suite is so: the tests are there, and a star means the soak."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def named_tests() -> list[tuple[str, str, bool]]:
    """File, test (empty: the whole file) and whether it is starred."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## What is attacked, and where")[1].split("\n## ")[0]
    found = []
    for file, star, names in re.findall(r"`(tests/[^`]+)`(\*?)((?:[:,] `test_\w+`\*?)*)", section):
        tests = re.findall(r"`(test_\w+)`(\*?)", names) or [("", star)]
        found += [(file, test, bool(star)) for test, star in tests]
    return found


def is_soak(node: ast.Module | ast.FunctionDef) -> bool:
    """Whether all of it is marked so, as a module or as a function."""
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(mark) == "pytest.mark.soak" for mark in node.decorator_list)
    assigned = [line for line in node.body if isinstance(line, ast.Assign) and "pytestmark" in ast.unparse(line)]
    return any("pytest.mark.soak" in ast.unparse(line.value) for line in assigned)


def test_the_table_is_read() -> None:
    assert len(named_tests()) > 25


@pytest.mark.parametrize(("file", "name", "starred"), named_tests())
def test_a_named_test_is_there(file: str, name: str, starred: bool) -> None:
    module = ast.parse((ROOT / file).read_text())
    tests = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    if name:
        assert name in tests
    soak = is_soak(module) or (is_soak(tests[name]) if name else False)
    assert soak == starred
