from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from imgbatch.core.compare import compare
from imgbatch.errors import UsageError
from imgbatch.report.comparison import write_comparison

from .conftest import softmax

pytest.importorskip("jinja2", reason="the report extra is not installed")
pytest.importorskip("matplotlib", reason="the report extra is not installed")

CLASSES = ("red", "green", "<u>blue</u>")
NUM_IMAGES = 60


@pytest.fixture
def compared(store_run, photos, tmp_path):
    """Compares a labelling of photos that is mostly right with one that always says red."""

    def make(columns: dict | None = None, **parts):
        paths = [str(path) for index, path in enumerate(photos) if index % 20 != 5][:NUM_IMAGES]
        targets_N = np.arange(NUM_IMAGES) % 3
        if columns is None:
            columns = {"target": [CLASSES[k] for k in targets_N]}
        logits_NK = np.random.default_rng(0).normal(size=(NUM_IMAGES, 3)) + 4 * (targets_N[:, None] == np.arange(3))
        red_NK = np.tile(np.array([2.0, 0.0, 0.0]), (NUM_IMAGES, 1))
        outs = [
            store_run(CLASSES, softmax(logits), columns={"uri": paths, **columns}, out=out, image_ids=paths, **parts)
            for out, logits in (("a", logits_NK), ("b", red_NK))
        ]
        return compare(*map(str, outs), directory=str(tmp_path / "diff"))

    return make


def test_the_page_says_who_is_better_and_shows_where_they_differ(compared, read_page, tmp_path):
    written = write_comparison(compared())
    assert written == str(tmp_path / "diff" / "compare.html")
    page = read_page(written)
    text = " ".join(page.text.split())
    for expected in ("A is right more often", "(McNemar)", "B less A", "Only A is right", "A: green", "B: red"):
        assert expected in text
    assert "<u>blue</u>" in page.text
    assert "u" not in page.tags
    assert page.pictures
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in page.pictures)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_images_are_bounded(compared, read_page):
    comparison = compared()
    assert len(read_page(write_comparison(comparison, max_thumbnails=4)).pictures) <= 4
    page = read_page(write_comparison(comparison, max_thumbnails=0))
    assert page.pictures == []
    assert "Only A is right" in page.text


def test_images_that_a_model_was_trained_on_are_pointed_out(compared, read_page):
    columns = {"target": [CLASSES[k % 3] for k in range(NUM_IMAGES)], "split": ["train", "test"] * (NUM_IMAGES // 2)}
    failed = {"image_id": ["x"], "status": ["EMPTY"], "target": ["red"], "split": ["test"]}
    page = read_page(write_comparison(compared(columns, failed=failed), max_thumbnails=0))
    assert "30 of the images are of the split “train”" in page.text


def test_without_targets_it_tells_agreement_only(compared, read_page):
    text = read_page(write_comparison(compared(columns={"site": ["x"] * NUM_IMAGES}), max_thumbnails=3)).text
    assert "nobody is right" in text
    assert "No target says who is right" in text
    assert "B less A" not in text


def test_several_labels_are_told_as_lists(compared, read_page):
    targets = [[] if k % 3 == 1 else [CLASSES[k % 3], CLASSES[0]] for k in range(NUM_IMAGES)]
    page = read_page(write_comparison(compared(columns={"targets": targets}, task="multilabel"), max_thumbnails=30))
    for expected in ("All labels right in A", "A: green", "B: red", "; is none"):
        assert expected in page.text


def test_two_that_are_alike_differ_no_more_than_by_chance(store_run, read_page, tmp_path):
    probs = softmax(np.random.default_rng(0).normal(size=(30, 3)))
    columns = {"target": [CLASSES[k % 3] for k in range(30)]}
    outs = [str(store_run(CLASSES, probs, columns=columns, out=out)) for out in "ab"]
    page = read_page(write_comparison(compare(*outs, directory=str(tmp_path / "diff"))))
    assert "No difference beyond chance" in page.text
    assert ("section", "id", "disagreements") not in page.attributes


def test_a_missing_extra_is_one_line(compared, monkeypatch):
    comparison = compared()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'imgbatch\[report\]' brings"):
        write_comparison(comparison)
    assert not Path(comparison.directory, "compare.html").exists()
