from __future__ import annotations

import re

import pytest

from imgbatch.core.drawing import draw_collection
from imgbatch.core.manifest_build import BuildOptions, build_manifest
from tests.notebooks.conftest import printed, shown


@pytest.mark.soak
def test_copies_are_the_nearest_neighbours_of_what_they_were_made_of(tiny_model, tmp_path, run_notebook):
    draw_collection(tmp_path / "images", num_images=60, seed=0)
    build_manifest([str(tmp_path / "images")], str(tmp_path / "manifest.parquet"), BuildOptions())
    notebook = run_notebook(
        "06_embeddings",
        IMGBATCH_MANIFEST=str(tmp_path / "manifest.parquet"),
        IMGBATCH_MODEL=tiny_model.path,
        IMGBATCH_NOTEBOOK_IMAGES="65",
        TMPDIR=str(tmp_path),
    )
    said = printed(notebook, stream="stdout")
    ((found, delivered),) = re.findall(r"nearest neighbour of (\d+) of (\d+) delivered images", said)
    assert int(delivered) == 6
    assert int(found) > int(delivered) // 2
    ((listed, copies),) = re.findall(r"(\d+) of (\d+) copies are on the list", said)
    assert 0 < int(listed) <= int(copies) == 6
    assert shown(notebook, "neighbours")[0]["text/html"].count("data:image/jpeg") == 8
    assert "image/png" in shown(notebook, "nearest")[0]
    assert "labels_around" in shown(notebook, "odd")[0]["text/plain"]
