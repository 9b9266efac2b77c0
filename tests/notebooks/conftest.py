"""Notebooks are executed in a kernel of this interpreter that leaves nothing behind in the home."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CELL_TIMEOUT_S = 300


@pytest.fixture
def run_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., nbformat.NotebookNode]:
    """Executes the notebook called ``name`` with ``env`` added to its environment; a cell that raises fails the test.

    It runs in ``tmp_path``: a path that only holds beside the notebook's own folder is found out.
    """

    def execute(name: str, **env: str) -> nbformat.NotebookNode:
        jupyter = {f"JUPYTER_{kind}_DIR": str(tmp_path / "jupyter") for kind in ("CONFIG", "DATA", "RUNTIME")}
        for key, value in {**jupyter, "IPYTHONDIR": str(tmp_path / "ipython"), **env}.items():
            monkeypatch.setenv(key, value)
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        resources = {"metadata": {"path": str(tmp_path)}}
        return NotebookClient(notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources=resources).execute()

    return execute


def printed(notebook: nbformat.NotebookNode, *, stream: str) -> str:
    """What the cells of an executed notebook wrote to ``stdout`` or ``stderr``."""
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == stream
    )


def shown(notebook: nbformat.NotebookNode, cell_id: str) -> list[nbformat.NotebookNode]:
    """What the cell ``cell_id`` displayed: one bundle of MIME types for each output."""
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return [output.data for output in cell.outputs if output.output_type in ("display_data", "execute_result")]
