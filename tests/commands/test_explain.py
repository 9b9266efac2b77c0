from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgbatch.cli import run
from imgbatch.core.architectures import build_network
from imgbatch.core.runs import RunPaths
from imgbatch.runtime.job import classify
from tests.conftest import changed

pytest.importorskip("captum", reason="the explain extra is not installed")

RUN_ID = "r000000000001"


@pytest.fixture
def of_manifest(photo_manifest, tiny_model, tmp_path) -> list[str]:
    """A command that explains images of the manifest into ``tmp_path / "x"``."""
    return ["explain", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(tmp_path / "x")]


@pytest.fixture
def mistaken(store_run, photos, tiny_model) -> Callable[..., str]:
    """An output by ``tiny_model`` with two mistakes, the first of them the worse, over photos 2, 1 and 8."""

    def make(**parts) -> str:
        probs = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.1, 0.1, 0.8]], np.float32)
        ids = [str(photos[index]) for index in (2, 1, 8)]
        columns = {"target": ["blue", "green", "blue"], "uri": ids}
        parts = {"model_id": tiny_model.model_id, "columns": columns, **parts}
        return str(store_run(tiny_model.class_names, probs, image_ids=ids, **parts))

    return make


def listed_in(directory: Path) -> list[dict]:
    return json.loads((directory / "explanations.json").read_text())["images"]


def test_a_sample_is_drawn(of_manifest, tmp_path, capsys):
    assert run([*of_manifest, "--limit", "6"]) == 0
    assert capsys.readouterr().out == f"6 images in {tmp_path / 'x' / 'index.html'}\n"
    page = (tmp_path / "x" / "index.html").read_text()
    for number, image in enumerate(listed_in(tmp_path / "x")):
        assert f'src="{number:03d}.png"' in page
        with Image.open(tmp_path / "x" / image["file"]) as picture:
            assert picture.size == (224 * (1 + len(image["claims"])), 224)


def test_fewer_images_leave_none_of_the_former_behind(of_manifest, tmp_path):
    assert run([*of_manifest, "--limit", "4"]) == 0
    beside = tmp_path / "x" / "notes.png"
    beside.write_bytes(b"of a person")
    assert run([*of_manifest, "--limit", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "x").glob("*.png")) == ["000.png", "001.png", "notes.png"]


def test_chosen_images_and_those_that_cannot_be_shown(of_manifest, photos, tmp_path, capsys):
    chosen = [part for index in (4, 5, 7) for part in ("--image-id", str(photos[index]))]
    assert run([*of_manifest, "--limit", "1", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "TRUNCATED" in printed
    assert "2 images in" in printed
    assert [image["image_id"] for image in listed_in(tmp_path / "x")] == [str(photos[4]), str(photos[7])]
    assert run([*of_manifest, "--image-id", str(photos[5])]) == 2
    assert "none of the images could be decoded (TRUNCATED)" in capsys.readouterr().err
    assert run(of_manifest[:-2]) == 2
    assert "name an output directory, or --model, --manifest and --output" in capsys.readouterr().err


def test_the_worst_mistakes_of_an_output(mistaken, of_manifest, photos, tmp_path):
    assert run([*of_manifest, mistaken()]) == 0
    images = listed_in(tmp_path / "x")
    assert [image["image_id"] for image in images] == [str(photos[2]), str(photos[1])]
    assert all(image["claims"][-1]["is_true"] for image in images)


def test_an_output_of_another_model_is_refused(mistaken, of_manifest, tiny_model, capsys):
    assert run([*of_manifest, mistaken(model_id="m000000000001")]) == 2
    error = capsys.readouterr().err
    assert f"is {tiny_model.model_id}" in error
    assert "was labelled by m000000000001" in error


def test_an_output_that_does_not_know_its_model_or_manifest_asks_for_them(mistaken, tiny_model, capsys):
    out = mistaken()
    assert run(["explain", out]) == 2
    assert "does not say where the model was; name it with --model" in capsys.readouterr().err
    assert run(["explain", out, "-m", tiny_model.path]) == 2
    assert "which manifest was classified; name it with --manifest" in capsys.readouterr().err


def test_an_output_without_mistakes_says_so(store_run, of_manifest, tiny_model, photos, capsys):
    probs = np.array([[0.9, 0.1, 0.0]], np.float32)
    columns = {"target": ["red"]}
    ids = [str(photos[0])]
    out = store_run(tiny_model.class_names, probs, image_ids=ids, columns=columns, model_id=tiny_model.model_id)
    assert run([*of_manifest, str(out)]) == 2
    assert "no mistakes there; --image-id names images to explain" in capsys.readouterr().err


def test_mistakes_are_those_among_the_images_of_the_newest_manifest(photo_config, photo_manifest, photos, tmp_path):
    """Nights of several manifests share an output, and images are looked up in one."""
    rows = pq.read_table(photo_manifest)
    for night in range(2):
        manifest = tmp_path / f"{night}.parquet"
        pq.write_table(rows.slice(12 * night, 12), manifest)
        out = classify(changed(photo_config, input__manifest=str(manifest))).out
    assert run(["explain", out, "--limit", "24", "-o", str(tmp_path / "x")]) == 0
    explained = {image["image_id"] for image in listed_in(tmp_path / "x")}
    assert explained
    assert explained <= {str(photo) for photo in photos[12:24]}


def test_both_sides_of_a_multi_label_mistake(make_bundle, photos, store_run, tmp_path):
    """An image is asked about the label said wrongly and the target missed, and each image once."""
    import torch

    weights = build_network("simple_cnn", 3).state_dict() | {"head.bias": torch.tensor([4.0, 2.0, -4.0])}
    bundle = make_bundle(task="multilabel", state_dict=weights)
    ids = [str(photos[index]) for index in (0, 1, 2)]
    targets = [["owl"], ["cat", "dog", "owl"], []]
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"uri": ids, "targets": pa.array(targets, pa.list_(pa.string()))}), manifest)
    probs = np.array([[0.9, 0.8, 0.3], [0.6, 0.9, 0.9], [0.1, 0.2, 0.4]], np.float32)
    columns = {"targets": targets}
    out = store_run(
        bundle.class_names, probs, task="multilabel", image_ids=ids, columns=columns, model_id=bundle.model_id
    )
    command = ["explain", str(out), "-m", bundle.path, "--manifest", str(manifest), "-o", str(tmp_path / "x")]
    assert run(command) == 0
    [image] = listed_in(tmp_path / "x")
    assert image["image_id"] == ids[0]
    assert [(claim["class_name"], claim["is_true"]) for claim in image["claims"]] == [("cat", False), ("owl", True)]


def test_the_report_shows_what_was_explained(photo_config, photos, capsys):
    pytest.importorskip("jinja2", reason="the report extra is not installed")
    out = classify(photo_config).out
    assert run(["report", out]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert "imgbatch explain" in page.read_text()
    assert 'id="explanations"' not in page.read_text()

    assert run(["explain", out, "--limit", "3"]) == 0
    directory = Path(RunPaths(out, page.parent.name).explanations)
    assert capsys.readouterr().out.splitlines() == [
        f"3 images in {directory / 'index.html'}",
        f"next: imgbatch report {out} shows them",
    ]
    images = listed_in(directory)
    assert all(image["claims"][0]["is_true"] is False for image in images)
    assert run(["report", out]) == 0
    html = page.read_text()
    section = html[html.index('id="explanations"') : html.index('id="speed"')]
    assert section.count('src="data:image/jpeg;base64,') == 3
    for image in images:
        assert f"✗ {image['claims'][0]['class_name']}" in section
    (directory / images[0]["file"]).unlink()
    assert run(["report", out, "--thumbnails", "0"]) == 0
    assert 'id="explanations"' not in page.read_text()
    assert run(["report", out]) == 0
    html = page.read_text()
    assert html[html.index('id="explanations"') : html.index('id="speed"')].count("data:image/jpeg") == 2
    assert run(["explain", out, "--image-id", str(photos[3])]) == 0
    assert [image["image_id"] for image in listed_in(directory)] == [str(photos[3])]
