"""The tiny labelled collection that training is tested on, for the engines too, and questions to a job's output."""

import shutil
from pathlib import Path

import pytest

from imgbatch.config import Config
from imgbatch.core.model import ModelBundle
from imgbatch.core.views import open_views
from tests.core.training.conftest import _one_thread, colour_config, colour_images, colour_manifest, write_manifest

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


def rows_of(config: Config, sql: str) -> list[tuple[object, ...]]:
    with open_views(str(config.output.path)) as connection:
        return connection.execute(sql).fetchall()


def files_of(config: Config) -> dict[str, bytes]:
    out = Path(str(config.output.path))
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
