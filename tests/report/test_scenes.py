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

from .conftest import Page


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


def place(*corners: tuple[int | None, int], size: int = 32) -> pa.Array:
    windows = [{"col_off": x, "row_off": y, "width": size, "height": size} for x, y in corners]
    return pa.array(windows, WINDOW_TYPE)


def test_a_tile_that_an_older_run_labelled_counts_once(store_run: Callable[..., Path]) -> None:
    probs_NK = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    columns = {"uri": ["/a.tif"] * 2, "window": place((0, 0), (32, 0))}
    out = str(store_run(("field", "water"), probs_NK, columns=columns, image_ids=["0", "1"]))
    failed = {"image_id": ["1", "2"], "uri": ["/a.tif"] * 2, "window": place((32, 0), (64, 0))}
    failed["status"] = ["FETCH_FAILED"] * 2
    later = {"run_id": "r000000000002", "predicted_at": "2026-01-03T00:00:00.000000+00:00"}
    store_run(("field", "water"), probs_NK[:0], failed=failed, columns={"window": place()}, **later)
    with open_views(out) as connection:
        scenes = summarise_scenes(connection)
    assert scenes is not None
    (scene,) = scenes.listed
    assert (scene.num_tiles, scene.num_errors) == (3, 1)
    middle = [tuple(pixels_of(scene.picture)[50, column]) for column in (50, 160, 270)]
    assert middle == [class_colour(0), class_colour(1), ImageColor.getrgb(FAILED_COLOUR)]


def test_a_scene_without_a_sound_window_is_listed_and_not_drawn(
    store_run: Callable[..., Path], read_page: Callable[[str], Page]
) -> None:
    columns = {"uri": ["/sound.tif"], "window": place((0, 0))}
    windows = pa.chunked_array([place((-32, 0), (None, 0), (0, -1), (0, 0)), place((0, 0), size=0)])
    uris = [*["/odd.tif"] * 3, "/sound.tif", "/empty.tif"]
    failed = {"image_id": list("abcde"), "uri": uris, "window": windows, "status": ["BAD_WINDOW"] * 5}
    out = str(store_run(("field", "water"), np.array([[0.9, 0.1]], np.float32), columns=columns, failed=failed))
    with open_views(out) as connection:
        scenes = summarise_scenes(connection)
    assert scenes is not None
    found = {scene.uri: (scene.num_tiles, scene.num_errors, scene.picture is None) for scene in scenes.listed}
    assert found == {"/odd.tif": (3, 3, True), "/sound.tif": (2, 1, False), "/empty.tif": (0, 1, True)}
    assert scenes.num_unopened == 1, "an empty window is what tiling gives to a scene that it cannot open"
    page = read_page(write_report(out, max_thumbnails=0))
    assert "odd.tif" in page.text
    assert len(page.pictures) == 1


def test_photographs_have_no_scenes(photo_run: Callable[..., Path]) -> None:
    out = str(photo_run())
    with open_views(out) as connection:
        assert summarise_scenes(connection) is None
    assert 'id="scenes"' not in Path(write_report(out)).read_text()
