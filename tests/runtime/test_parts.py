"""Statistics of bands, whose tiles are read in tasks of Ray, held to the plain loop's."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run
from imgbatch.config import load_config
from imgbatch.core.parallel import in_threads
from imgbatch.runtime.parts import map_parts_of
from imgbatch.schema import WINDOW_TYPE
from tests.rasters import noise, write_raster


def test_a_single_part_starts_no_ray():
    parts = map_parts_of(load_config(None, ["ray.address=127.0.0.1:1"]))
    assert list(parts(lambda base, part: base + part, 1, [2])) == [3]
    assert map_parts_of(load_config(None, ["classify.engine=local"])) is in_threads


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    """100 tiles of a scene and two that cannot be read."""
    scene = write_raster(tmp_path / "scene.tif", noise(4, 160, 160))
    (tmp_path / "text.tif").write_text("no raster")
    corners = [(x, y) for y in range(0, 160, 16) for x in range(0, 160, 16)]
    windows = [{"col_off": x, "row_off": y, "width": 16, "height": 16} for x, y in [*corners, (0, 0), (0, 0)]]
    uris = [str(scene)] * len(corners) + [str(tmp_path / name) for name in ("text.tif", "gone.tif")]
    pq.write_table(pa.table({"uri": uris, "window": pa.array(windows, WINDOW_TYPE)}), tmp_path / "tiles.parquet")
    return str(tmp_path / "tiles.parquet")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_ray_finds_what_the_loop_finds(manifest, capsys):
    found = []
    for engine in ("ray", "local"):
        assert run(["manifest", "stats", manifest, "--json", "--set", f"classify.engine={engine}"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert (found[0]["tiles"], len(found[0]["failed"]), len(found[0]["bands"])) == (100, 2, 4)
