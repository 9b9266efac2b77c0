from __future__ import annotations

import tempfile

import torch

from imgbatch.core.training import checkpoint
from imgbatch.core.training.checkpoint import load_last, read_epochs, save_last
from imgbatch.core.training.job import JobPaths


def test_what_is_too_large_for_one_request_goes_to_an_object_store_as_a_file(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_REQUEST_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths = JobPaths(f"{s3_bucket}/job")
    save_last(paths, {"network": {"weight": torch.arange(1000)}}, [{"epoch": 1}])
    state, history = load_last(paths)
    assert torch.equal(state["network"]["weight"], torch.arange(1000))
    assert history == read_epochs(paths) == [{"epoch": 1}]
    assert not list(tmp_path.iterdir())
