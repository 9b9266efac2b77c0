from __future__ import annotations

import json

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
