"""What every committed notebook holds to."""

from __future__ import annotations

import ast

import nbformat
import pytest

from tests.notebooks.conftest import NOTEBOOKS

EVERY = sorted(NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_it_holds_no_outputs_and_nothing_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_it_uses_the_package_and_defines_nothing_reusable(path):
    source = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    nodes = list(ast.walk(ast.parse(source)))
    assert any(isinstance(node, ast.ImportFrom) and (node.module or "").startswith("imgbatch") for node in nodes)
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]


def test_there_is_one_to_query_the_output():
    assert "01_query_the_output" in [path.stem for path in EVERY]
