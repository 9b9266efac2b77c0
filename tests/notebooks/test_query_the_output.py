from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.runtime.job import classify
from tests.conftest import changed
from tests.notebooks.conftest import printed, shown

NAME = "01_query_the_output"
PLOTS = ("label-plot", "confidence-plot", "accuracy-plot")


def test_it_shows_labels_confidence_accuracy_errors_and_images(photo_config, photo_manifest, tmp_path, run_notebook):
    splits = np.where(np.arange(120) % 4 == 0, "test", "train")
    with_splits = tmp_path / "with_splits.parquet"
    pq.write_table(pq.read_table(photo_manifest).append_column("split", [splits]), with_splits)
    classify(changed(photo_config, input__manifest=str(with_splits)))

    notebook = run_notebook(NAME, IMGBATCH_OUTPUT=photo_config.output.path)
    assert printed(notebook, stream="stderr") == ""
    assert printed(notebook, stream="stdout") == "30 images, where split = 'test' and target is not null\n"
    for cell in PLOTS:
        assert "image/png" in shown(notebook, cell)[0]
    assert "red" in shown(notebook, "accuracy-table")[0]["text/html"]
    assert "photo005.jpg" in shown(notebook, "error-rows")[0]["text/html"]
    assert shown(notebook, "uncertain-images")[0]["text/html"].count("data:image/jpeg") == 24
    assert "label" in shown(notebook, "script-run")[0]["text/html"]


def test_without_targets_images_or_margins_it_says_so(photo_config, photos, make_bundle, tmp_path, run_notebook):
    """A multi-label output without a target whose images are gone."""
    gone = [Path(shutil.copy(photo, tmp_path)) for photo in photos[:3]]
    manifest = tmp_path / "gone.parquet"
    pq.write_table(pa.table({"uri": [str(photo) for photo in gone]}), manifest)
    model = make_bundle(task="multilabel")
    classify(changed(photo_config, input__manifest=str(manifest), model__path=model.path))
    for photo in gone:
        photo.unlink()

    notebook = run_notebook(NAME, IMGBATCH_OUTPUT=photo_config.output.path)
    assert printed(notebook, stream="stderr") == ""
    assert printed(notebook, stream="stdout") == "3 images, where true\nno image here has a target\n"
    assert shown(notebook, "accuracy-plot") == []
    pictures = shown(notebook, "uncertain-images")[0]["text/html"]
    assert pictures.count("No such file") == 3
    assert "<img" not in pictures
