"""A training that is killed and run again gives the model of one that was not."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from imgbatch.config import Config
from imgbatch.core.failpoints import VARIABLE
from imgbatch.core.model import load_bundle, load_network
from tests.conftest import changed
from tests.core.training.conftest import colour_config, colour_images, colour_manifest, write_manifest
from tests.faults.drivers import KILLED, driver

__all__ = ["colour_config", "colour_images", "colour_manifest", "write_manifest"]


def run(config: Config, folder: Path, failpoints: str = "") -> int:
    """Exit code of ``imgbatch train``."""
    file = folder / "train.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with driver(["train", "-c", str(file)], folder / "log.txt", {VARIABLE: failpoints}) as started:
        return started.wait()


def test_killed_in_a_step(colour_config: Config, tmp_path: Path) -> None:
    config = changed(colour_config, train__epochs=3, train__storage=None)
    disturbed = changed(config, output__path=str(tmp_path / "disturbed"))
    assert run(config, tmp_path) == 0
    assert run(disturbed, tmp_path, "train.step=kill@5") == KILLED
    assert run(disturbed, tmp_path, "train.step=kill@3") == KILLED, "the first epoch was kept"
    assert run(disturbed, tmp_path) == 0
    ours, theirs = (load_network(load_bundle(str(c.output.path))).state_dict() for c in (disturbed, config))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
