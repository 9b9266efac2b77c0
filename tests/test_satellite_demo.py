from __future__ import annotations

from pathlib import Path

import geopandas
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from imgbatch import satellite_demo
from imgbatch.cli import run
from imgbatch.config import load_config
from imgbatch.core.drawn_scenes import COVERS
from imgbatch.core.model import load_bundle
from imgbatch.errors import UsageError
from imgbatch.satellite_demo import SatelliteDemoResult, run_satellite_demo

pytestmark = pytest.mark.filterwarnings("ignore:Geometry column does not contain geometry")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("satellite")


@pytest.fixture(scope="module")
def result(out: Path) -> SatelliteDemoResult:
    return demo(out)


def demo(out: Path, *, seed: int = 0) -> SatelliteDemoResult:
    config = load_config(None, ["classify.engine=local"], {"output.path": str(out)})
    return run_satellite_demo(config, num_scenes=3, seed=seed, console=Console(quiet=True), scene_px=176)


def test_every_tile_has_an_outcome_and_is_scored_by_tile_and_by_pixel(result):
    tiles = pq.read_table(result.paths.tiles)
    assert result.run.num_rows == tiles.num_rows
    assert [(image_id, status) for image_id, status, _ in result.errors] == [("test/broken.tif", "TRUNCATED")]
    test_tiles = [tile for tile in tiles.to_pylist() if tile["split"] == "test" and tile["target"] is not None]
    (file,) = (result.paths.labels / "predictions").rglob("*.parquet")
    labels = pq.read_table(file, columns=["image_id", "label"], partitioning=None)
    label_of = dict(zip(*labels.to_pydict().values(), strict=True))
    right = [label_of[tile["image_id"]] == tile["target"] for tile in test_tiles if tile["image_id"] in label_of]
    assert result.accuracy == pytest.approx(sum(right) / len(right))
    assert 0 < result.pixel_accuracy <= 1
    assert result.columns == ["label", "tiles", "probability", "accuracy"]


def test_the_model_knows_its_bands(result):
    bundle = load_bundle(str(result.paths.model))
    assert bundle.class_names == COVERS
    assert bundle.preprocess.bands is not None
    assert bundle.preprocess.bands.indices == (1, 2, 3, 4)
    assert max(bundle.preprocess.bands.high) < 1.2  # reflectance: the scenes state a scale


def test_geopandas_reads_the_labels_where_the_tiles_are(result):
    (file,) = (result.paths.labels / "predictions").rglob("*.parquet")
    labels = geopandas.read_parquet(file)
    assert labels.crs == "OGC:CRS84"
    tiles = geopandas.read_parquet(result.paths.tiles).set_index("image_id").geometry
    assert labels.set_index("image_id").geometry.sort_index().equals(tiles[labels["image_id"]].sort_index())


def test_every_scene_has_a_map(result):
    names = sorted(path.relative_to(result.paths.mosaic).as_posix() for path in result.paths.mosaic.rglob("*.tif"))
    assert names == ["test/scene-1.labels.tif", "train/scene-0.labels.tif", "validation/scene-2.labels.tif"]


def test_a_second_time_nothing_is_left_to_do_and_other_scenes_are_refused(out, result):
    again = demo(out)
    assert again.run.already_finished
    assert (again.rows, again.pixel_accuracy) == (result.rows, result.pixel_accuracy)
    with pytest.raises(UsageError, match="holds a demo of other images"):
        demo(out, seed=1)


def test_the_command_prints_both_accuracies_and_the_places(out, result, capsys, monkeypatch):
    monkeypatch.setattr(satellite_demo, "run_satellite_demo", lambda *_, **__: result)
    assert run(["demo", "--satellite", "-o", str(out), "--scenes", "3", "--set", "classify.engine=local"]) == 0
    printed = capsys.readouterr().out
    assert f"accuracy on the tiles of the test scenes: {result.accuracy:.3f}" in printed
    assert f"accuracy on the pixels of the test scenes' maps: {result.pixel_accuracy:.3f}" in printed
    assert "TRUNCATED      test/broken.tif: " in printed
    assert str(result.paths.mosaic) in printed
