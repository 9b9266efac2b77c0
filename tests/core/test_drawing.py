from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from imgbatch.core.drawing import CLASS_NAMES, draw_collection, draw_image, image_path
from imgbatch.core.drawn_objects import OBJECTS
from imgbatch.core.pen import Pen, rounded, shade
from imgbatch.errors import Status


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory):
    return draw_collection(tmp_path_factory.mktemp("collection"), num_images=130, seed=3)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_smaller_collection_is_the_beginning_of_a_larger_one(collection, tmp_path):
    smaller = draw_collection(tmp_path, num_images=20, seed=3, num_broken=5)
    larger_files = files_below(collection.folder)
    smaller_files = files_below(smaller.folder)
    assert len(smaller_files) == 25
    assert all(larger_files[name] == data for name, data in smaller_files.items())


def test_another_seed_draws_other_images():
    assert not np.array_equal(np.asarray(draw_image(0, 0)), np.asarray(draw_image(1, 0)))


def test_splits_and_classes_are_laid_out_in_folders_and_balanced(collection):
    broken = set(collection.broken)
    paths = [p for p in collection.folder.rglob("*.*") if p not in broken]
    assert len(paths) == 130
    assert Counter(p.parent.name for p in paths) == dict.fromkeys(CLASS_NAMES, 13)
    per_split = Counter(p.parent.parent.name for p in paths)
    assert per_split == {"train": 70, "test": 40, "validation": 20}
    assert all(p.name.startswith(p.parent.name + "-") for p in paths)


def test_every_intact_file_is_an_image_of_the_promised_size_in_the_format_of_its_name(collection):
    formats = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
    for index in range(130):
        path = collection.folder / image_path(3, index)
        with Image.open(path) as image:
            image.load()
            assert image.format == formats[path.suffix]
            assert all(160 <= side <= 320 for side in image.size)


def test_the_collection_holds_other_formats_and_orientations(collection):
    suffixes = {image_path(3, index).suffix for index in range(130)}
    assert suffixes == {".jpg", ".png", ".webp"}
    orientations = set()
    for path in sorted(collection.folder.rglob("*-[0-9]*[0-9].jpg")):
        if path not in collection.broken:
            with Image.open(path) as image:
                orientations.add(image.getexif().get(0x0112, 1))
    assert orientations == {1, 6}


def test_broken_files_lie_in_the_test_split_and_break_each_in_its_way(collection):
    assert set(collection.broken.values()) == {
        Status.TRUNCATED,
        Status.NOT_AN_IMAGE,
        Status.EMPTY,
        Status.TOO_LARGE,
    }
    for path, status in collection.broken.items():
        assert path.relative_to(collection.folder).parts[0] == "test"
        data = path.read_bytes()
        if status is Status.EMPTY:
            assert data == b""
        elif status is Status.TRUNCATED:
            with Image.open(io.BytesIO(data)) as image, pytest.raises(OSError, match="truncated"):
                image.load()
        elif status is Status.NOT_AN_IMAGE:
            with pytest.raises(OSError, match="cannot identify"):
                Image.open(io.BytesIO(data))
        else:
            assert int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) == 3_600_000_000


def test_no_broken_files_where_none_are_asked_for(tmp_path):
    assert draw_collection(tmp_path, num_images=3, seed=0, num_broken=0).broken == {}
    assert len(files_below(tmp_path)) == 3


@pytest.mark.parametrize("class_name", CLASS_NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_an_object_fills_its_square_and_stays_near_it(class_name, seed):
    mask = Image.new("L", (300, 300))
    matrix = np.array([[100.0, 0.0, 150.0], [0.0, 100.0, 150.0]])
    OBJECTS[class_name](Pen(ImageDraw.Draw(mask), matrix, silhouette=255), np.random.default_rng(seed))
    left, top, right, bottom = mask.getbbox()
    assert left >= 35
    assert top >= 35
    assert right <= 265
    assert bottom <= 265
    assert bottom - top > 90
    assert 0.02 < np.mean(np.asarray(mask) > 0) < 0.6


def test_shade_darkens_below_one_and_lightens_above():
    assert shade((100, 200, 0), 0.5) == (50, 100, 0)
    assert shade((155, 205, 255), 2.0) == (205, 230, 255)


def test_rounding_stays_inside_the_polygon():
    corners = np.array(rounded([(0, 0), (1, 0), (1, 1), (0, 1)]))
    assert corners.min() == 0
    assert corners.max() == 1
    assert not any((corner == (0, 0)).all() for corner in corners)
