from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgbatch.core import storage
from imgbatch.core.manifest import open_manifest
from imgbatch.core.runs import RunPaths
from imgbatch.errors import RowError, Status
from imgbatch.report.picks import Pick
from imgbatch.report.thumbnails import SIZE, make_thumbnails
from tests.core.encoding import encode

RUN = "r1"


def pick(row_id: int, uri: str | None = None) -> Pick:
    return Pick(f"image-{row_id}", uri, RUN, row_id, "red")


def decoded(thumbnail: str | RowError) -> np.ndarray:
    assert isinstance(thumbnail, str)
    with Image.open(io.BytesIO(base64.b64decode(thumbnail.removeprefix("data:image/jpeg;base64,")))) as image:
        return np.asarray(image)


def solid(colour: str, size: tuple[int, int] = (300, 200)) -> bytes:
    return encode(Image.new("RGB", size, colour), "PNG")


@pytest.fixture
def out(tmp_path) -> str:
    storage.write_json(RunPaths(str(tmp_path / "out"), RUN).plan, {"fields": {}})
    return str(tmp_path / "out")


def test_a_thumbnail_is_a_square_of_the_image(out, tmp_path):
    (tmp_path / "red.png").write_bytes(solid("#c00000"))
    pixels_HWC = decoded(make_thumbnails(out, [pick(0, str(tmp_path / "red.png"))])[RUN, 0])
    assert pixels_HWC.shape == (SIZE, SIZE, 3)
    assert np.abs(pixels_HWC.astype(int) - [192, 0, 0]).max() < 12


def test_what_cannot_be_shown_is_its_reason(out, tmp_path):
    (tmp_path / "text.png").write_bytes(b"no picture at all")
    (tmp_path / "cut.png").write_bytes(solid("red")[:60])
    (tmp_path / "blue.png").write_bytes(solid("#0000c0"))
    uris = ["text.png", "cut.png", "gone.png", "blue.png"]
    made = make_thumbnails(out, [pick(row, str(tmp_path / name)) for row, name in enumerate(uris)])
    reasons = [each.status if isinstance(each, RowError) else None for each in made.values()]
    assert reasons == [Status.NOT_AN_IMAGE, Status.TRUNCATED, Status.NOT_FOUND, None]


def test_an_image_in_two_galleries_is_made_once(out, tmp_path):
    (tmp_path / "red.png").write_bytes(solid("red"))
    assert len(make_thumbnails(out, [pick(0, str(tmp_path / "red.png"))] * 3)) == 1


def plan_embedded(tmp_path: Path, manifest: Path) -> None:
    """A run over the manifest as it is now."""
    fields = {"manifest": open_manifest(str(manifest)).content_identity()}
    plan = {"fields": fields, "has_bytes": True, "config": {"input": {"manifest": str(manifest)}}}
    storage.write_json(RunPaths(str(tmp_path / "out"), RUN).plan, plan)


def test_embedded_images_come_from_the_manifest(tmp_path):
    manifest = tmp_path / "manifest.parquet"
    cells = [solid("#c00000"), None, solid("#0000c0"), b"junk"]
    pq.write_table(pa.table({"bytes": pa.array(cells, pa.binary())}), manifest, row_group_size=2)
    plan_embedded(tmp_path, manifest)
    made = make_thumbnails(str(tmp_path / "out"), [pick(row) for row in (2, 0, 1, 3)])
    assert decoded(made[RUN, 2])[0, 0, 2] > 180
    assert decoded(made[RUN, 0])[0, 0, 0] > 180
    assert isinstance(made[RUN, 1], RowError)
    assert made[RUN, 1].status == Status.EMPTY
    assert isinstance(made[RUN, 3], RowError)
    Path(manifest).unlink()
    gone = make_thumbnails(str(tmp_path / "out"), [pick(0)])[RUN, 0]
    assert isinstance(gone, RowError)
    assert gone.status == Status.NOT_FOUND


def test_images_of_a_manifest_that_was_replaced_are_not_shown(tmp_path):
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"bytes": [solid("#c00000"), solid("#00c000")]}), manifest)
    plan_embedded(tmp_path, manifest)
    pq.write_table(pa.table({"bytes": [solid("#0000c0")]}), manifest)
    made = make_thumbnails(str(tmp_path / "out"), [pick(row) for row in range(2)])
    assert [each.status for each in made.values() if isinstance(each, RowError)] == [Status.CHANGED] * 2
