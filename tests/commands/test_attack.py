from __future__ import annotations

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run


def test_the_table_is_printed_and_written(photo_manifest, tiny_model, tmp_path, capsys):
    command = ["attack", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(tmp_path), "--limit", "4"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    for text in ("4 images", "fgsm", "pgd", "gaussian_noise", "contrast", "robustness.parquet"):
        assert text in printed
    assert (tmp_path / "robustness.png").stat().st_size > 1000
    assert run([*command, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 36


def test_without_matplotlib_the_table_is_printed_all_the_same(
    photo_manifest, tiny_model, tmp_path, monkeypatch, capsys
):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    command = ["attack", "-m", tiny_model.path, "--manifest", str(photo_manifest), "-o", str(tmp_path), "--limit", "2"]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"written to {tmp_path}/robustness.parquet"
    assert printed.err.startswith("no curves: pictures are not drawn: matplotlib is not installed")


@pytest.mark.parametrize(("splits", "measured"), [(["train", "test", "training", None], 2), (["train"] * 4, 4)])
def test_images_that_training_has_seen_are_left_out_or_pointed_out(
    photo_manifest, tiny_model, tmp_path, splits, measured, capsys
):
    rows = pq.read_table(photo_manifest).slice(0, 4).append_column("split", pa.array(splits))
    pq.write_table(rows, tmp_path / "m.parquet")
    command = ["attack", "-m", tiny_model.path, "--manifest", str(tmp_path / "m.parquet"), "-o", str(tmp_path / "out")]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{measured} images, ")
    assert ("4 rows are of split train, which a model may know by heart" in printed) == (measured == 4)
