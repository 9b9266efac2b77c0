from __future__ import annotations

import ast
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.notebooks.conftest import printed, shown


@pytest.mark.soak
def test_wrong_targets_are_found_corrected_and_trained_on_again(tmp_path, monkeypatch, run_notebook):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = run_notebook("03_errors_and_review", IMGBATCH_NOTEBOOK_IMAGES="240", IMGBATCH_NOTEBOOK_EPOCHS="6")
    said = printed(notebook, stream="stdout")
    ((left, wrong),) = re.findall(r"(\d+) of (\d+) wrong targets are left", said)
    assert int(left) < int(wrong)
    assert "image_id" in shown(notebook, "export")[0]["text/plain"]
    accuracies = ast.literal_eval(shown(notebook, "again")[0]["text/plain"])
    (out2,) = tmp_path.glob("*/out2")
    assert accuracies == {name: pytest.approx(accuracy_by_folder(out2.with_name(name))) for name in ("out", "out2")}


def accuracy_by_folder(out: Path) -> float:
    """Share of the test split's labels that are the names of their images' folders."""
    (path,) = (out / "predictions").rglob("*.parquet")
    rows = pq.read_table(path, columns=["uri", "label", "split"], partitioning=None).to_pylist()
    right = [Path(row["uri"]).parent.name == row["label"] for row in rows if row["split"] == "test"]
    return sum(right) / len(right)
