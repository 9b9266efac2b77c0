from __future__ import annotations

import re

from tests.notebooks.conftest import printed, shown


def test_copies_are_the_nearest_neighbours_of_what_they_were_made_of(
    photo_manifest, tiny_model, tmp_path, run_notebook
):
    notebook = run_notebook(
        "06_embeddings",
        IMGBATCH_MANIFEST=str(photo_manifest),
        IMGBATCH_MODEL=tiny_model.path,
        IMGBATCH_NOTEBOOK_IMAGES="80",
        TMPDIR=str(tmp_path),
    )
    said = printed(notebook, stream="stdout")
    ((found, delivered),) = re.findall(r"nearest neighbour of (\d+) of (\d+) delivered images", said)
    assert int(delivered) >= 7
    assert int(found) > int(delivered) // 2
    assert shown(notebook, "neighbours")[0]["text/html"].count("data:image/jpeg") == 8
    assert "image/png" in shown(notebook, "nearest")[0]
    assert "delivered-00000.jpg" in shown(notebook, "duplicates")[0]["text/plain"]
