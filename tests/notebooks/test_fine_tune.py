from __future__ import annotations

import ast

from tests.notebooks.conftest import shown


def test_a_model_is_fine_tuned_and_labels_as_it_was_measured(tmp_path, run_notebook):
    notebook = run_notebook(
        "02_fine_tune", IMGBATCH_NOTEBOOK_IMAGES="60", IMGBATCH_NOTEBOOK_EPOCHS="1", TMPDIR=str(tmp_path)
    )
    for cell in ("cell-07", "cell-09"):
        assert "image/png" in shown(notebook, cell)[0]
    measured, left_out = ast.literal_eval(shown(notebook, "cell-10")[0]["text/plain"])
    assert set(measured) == {"validation", "test"}
    assert measured["test"] == ast.literal_eval(shown(notebook, "cell-14")[0]["text/plain"])
    assert left_out
