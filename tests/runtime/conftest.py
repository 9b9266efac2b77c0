"""The tiny labelled collection that training is tested on, for the engines too, and questions to a job's output."""

import shutil
from pathlib import Path

import pytest

from imgbatch.config import Config
from imgbatch.core.model import ModelBundle
from imgbatch.core.views import open_views
from tests.conftest import changed
from tests.core.training.conftest import (
    WriteManifest,
    _one_thread,
    colour_config,
    colour_images,
    colour_manifest,
    write_manifest,
)

__all__ = ["_one_thread", "colour_config", "colour_images", "colour_manifest", "files_of", "rows_of", "write_manifest"]

UNREADABLE = "/proc/self/mem"
"""A file that is there and whose first byte cannot be read, for which Linux gives a reason that may pass (EIO)."""


@pytest.fixture
def damaged_model(tiny_model: ModelBundle, tmp_path: Path) -> str:
    """A bundle that looks sound until its weights are loaded."""
    path = shutil.copytree(tiny_model.path, tmp_path / "damaged")
    weights = bytearray((path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (path / "model.safetensors").write_bytes(weights)
    return str(path)


@pytest.fixture
def config_of_nothing(
    colour_config: Config, write_manifest: WriteManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Config:
    """Trains on 48 images that are not there, four of them decoded at a time."""
    monkeypatch.setattr("imgbatch.core.training.crops._PART_BYTES", 4 * 16 * 16 * 3)
    manifest = write_manifest(
        "gone.parquet",
        uri=[str(tmp_path / f"gone{index}.png") for index in range(48)],
        target=["red", "blue"] * 24,
        split=["train"] * 40 + ["validation"] * 8,
    )
    flags = {"input__manifest": str(manifest), "errors__min_rows": 8, "errors__max_rate": 0.05}
    return changed(colour_config, augment__min_scale=1.0, **flags)


def rows_of(config: Config, sql: str) -> list[tuple[object, ...]]:
    with open_views(str(config.output.path)) as connection:
        return connection.execute(sql).fetchall()


def files_of(config: Config) -> dict[str, bytes]:
    out = Path(str(config.output.path))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
