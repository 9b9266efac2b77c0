from __future__ import annotations

import ast
import re

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
    assert set(accuracies) == {"out", "out2"}
    assert all(0 <= accuracy <= 1 for accuracy in accuracies.values())
