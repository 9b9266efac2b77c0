from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageColor

from imgbatch.config import load_config
from imgbatch.core.model import ModelBundle
from imgbatch.core.palette import class_colour
from imgbatch.core.views import open_views
from imgbatch.report.page import write_report
from imgbatch.report.scenes import FAILED_COLOUR, Scene, summarise_scenes
from imgbatch.runtime.job import classify
from imgbatch.schema import WINDOW_TYPE
from tests.rasters import noise, write_raster


@pytest.fixture
def out(tmp_path: Path, tiny_model: ModelBundle, photos: list[Path]) -> str:
    """Eight tiles of a wide scene, two of a small one, one of which lies outside, a photograph, and two lost files."""
    wide = str(write_raster(tmp_path / "wide <b>.tif", noise(3, 64, 128, dtype="uint8", high=255)))
    small = str(write_raster(tmp_path / "small.tif", noise(3, 32, 32, dtype="uint8", high=255)))
    corners = [(wide, x, y) for y in (0, 32) for x in (0, 32, 64, 96)] + [(small, 0, 0), (small, 0, 32)]
    windows = [{"col_off": x, "row_off": y, "width": 32, "height": 32} for _, x, y in corners]
    table = pa.table(
        {
            "uri": [*(uri for uri, _, _ in corners), str(photos[0]), "/lost/photo.jpg", "/lost/scene.TIF"],
            "window": pa.array([*windows, None, None, None], WINDOW_TYPE),
            "image_id": [str(index) for index in range(len(corners) + 3)],
        }
    )
    pq.write_table(table, tmp_path / "tiles.parquet")
    flags = {"classify.engine": "local", "errors.max_rate": "1", "resources.device": "cpu"}
    paths = {
        "input.manifest": tmp_path / "tiles.parquet",
        "model.path": tiny_model.path,
        "output.path": tmp_path / "out",
    }
    return classify(load_config(flags=flags | {name: str(path) for name, path in paths.items()})).out


def pixels_of(picture: str | None) -> np.ndarray:
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGBA"))[..., :3]


def test_each_scene_is_counted_and_drawn_in_the_colours_of_its_labels(out: str) -> None:
    with open_views(out) as connection:
        scenes = summarise_scenes(connection)
        labels = dict(connection.sql("select image_id, label from predictions").fetchall())
    assert scenes is not None
    assert (scenes.count, scenes.num_unopened) == (3, 1)
    wide, small, lost = scenes.listed
    assert lost == Scene("/lost/scene.TIF", 0, 1, (), None, "NOT_FOUND")
    assert (wide.num_tiles, wide.num_errors, small.num_tiles, small.num_errors) == (8, 0, 2, 1)
    assert sum(tiles for _, tiles in wide.labels) == 8
    colours = dict(scenes.legend)
    assert colours["failed"] == FAILED_COLOUR
    with open_views(out) as connection:
        indices = dict(connection.sql("select label, label_index from predictions").fetchall())
    assert {label: ImageColor.getrgb(colour) for label, colour in colours.items() if label != "failed"} == {
        label: class_colour(index) for label, index in indices.items()
    }
    map_HW3 = pixels_of(wide.picture)
    assert map_HW3.shape == (160, 320, 3)
    for index in range(8):
        row, column = divmod(index, 4)
        middle = tuple(map_HW3[row * 80 + 40, column * 80 + 40])
        assert middle == ImageColor.getrgb(colours[labels[str(index)]])
    assert tuple(pixels_of(small.picture)[300, 80]) == ImageColor.getrgb(FAILED_COLOUR)


def test_the_page_shows_them_with_their_names_as_text(out: str) -> None:
    page = Path(write_report(out)).read_text()
    assert '<section id="scenes">' in page
    assert "wide &lt;b&gt;.tif" in page
    assert "wide <b>.tif" not in page
    assert page.count("Labels of the tiles of") == 2
    assert "3 scenes, 1 could not be opened" in page
    assert "could not be opened: NOT_FOUND" in page


def test_photographs_have_no_scenes(photo_run: Callable[..., Path]) -> None:
    out = str(photo_run())
    with open_views(out) as connection:
        assert summarise_scenes(connection) is None
    assert 'id="scenes"' not in Path(write_report(out)).read_text()
