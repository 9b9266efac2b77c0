from __future__ import annotations

import numpy as np
from PIL import Image

from imgbatch.cli import run


def test_a_sample_is_drawn(photo_manifest, tiny_model, tmp_path, capsys):
    directory = tmp_path / "explain"
    command = ["explain", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(directory)]
    assert run([*command, "--limit", "6"]) == 0
    assert "6 images in" in capsys.readouterr().out
    page = (directory / "index.html").read_text()
    for number in range(6):
        assert f'src="{number:03d}.png"' in page
        with Image.open(directory / f"{number:03d}.png") as picture:
            assert picture.size in {(64, 32), (96, 32)}


def test_chosen_images_and_those_that_cannot_be_shown(photo_manifest, photos, tiny_model, tmp_path, capsys):
    command = ["explain", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(tmp_path / "x")]
    assert run([*command, "--image-id", str(photos[4]), "--image-id", str(photos[5])]) == 0
    printed = capsys.readouterr().out
    assert "TRUNCATED" in printed
    assert "1 images in" in printed
    assert run([*command, "--image-id", str(photos[5])]) == 2
    assert "none of the images could be decoded (TRUNCATED)" in capsys.readouterr().err
    assert run([*command, "--image-id", "a", "--out", "b"]) == 2


def test_the_worst_mistakes_of_an_output(photo_manifest, photos, store_run, tiny_model, tmp_path, capsys):
    probs = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.1, 0.1, 0.8]], np.float32)
    ids = [str(photos[index]) for index in (2, 1, 8)]
    classes = tiny_model.class_names
    out = str(store_run(classes, probs, image_ids=ids, model_id=tiny_model.model_id))
    command = ["explain", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(tmp_path / "x")]
    assert run([*command, "--out", out]) == 0
    page = (tmp_path / "x" / "index.html").read_text()
    assert 0 < page.index(ids[0]) < page.index(ids[1])
    assert ids[2] not in page
    other = str(store_run(classes, probs, image_ids=ids, out="other"))
    assert run([*command, "--out", other]) == 2
    assert "its predictions come from m000000000001" in capsys.readouterr().err
