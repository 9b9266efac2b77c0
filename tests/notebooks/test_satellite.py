from __future__ import annotations

import re

import pytest

from tests.notebooks.conftest import printed, shown


@pytest.mark.soak
def test_scenes_are_tiled_learnt_labelled_and_mapped(tmp_path, run_notebook):
    notebook = run_notebook(
        "05_satellite",
        IMGBATCH_NOTEBOOK_SCENES="3",
        IMGBATCH_NOTEBOOK_SCENE_PX="176",
        IMGBATCH_NOTEBOOK_EPOCHS="2",
        TMPDIR=str(tmp_path),
    )
    said = printed(notebook, stream="stdout")
    assert "tiles of 4 scenes, 1 cannot be opened" in said
    assert "1 tile without a label: test/broken.tif TRUNCATED" in said
    assert re.search(r"\d+% of the pixels of test/scene-1 have the right label", said)
    assert "image/png" in shown(notebook, "map")[0]
    assert "POLYGON" in shown(notebook, "tiles")[0]["text/plain"]
    assert "km2" in shown(notebook, "geo")[0]["text/plain"]
