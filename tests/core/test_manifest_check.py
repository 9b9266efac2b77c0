from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgbatch.core.manifest_check import check_manifest
from imgbatch.errors import UsageError


def write(tmp_path: Path, columns: dict, **options: object) -> str:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{n}.jpg" for n in range(6)]
    for n, path in enumerate(paths):
        Image.new("RGB", (20 + n, 10), (n, 20, 30)).save(path)
    return [str(path) for path in paths]


def test_a_good_manifest_has_no_problem(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, {"uri": images, "target": ["a", "b"] * 3, "split": ["train"] * 5 + [None]})
    result = check_manifest(path, sample_rows=4)
    assert result.problems == []
    assert result.nulls == {"split": 1}
    assert result.tally.targets() == {"a": 3, "b": 3}
    assert [row.error for row in result.sample] == [None] * 4
    row = result.sample[0]
    assert (row.image_id, row.width, row.height) == (images[row.row_id], 20 + row.row_id, 10)
    assert json.loads(json.dumps(result.to_dict()))["splits"] == [
        {"split": "train", "num_rows": 5}, {"split": None, "num_rows": 1}
    ]  # fmt: skip


def test_the_sample_is_seeded(tmp_path: Path, images: list[str]) -> None:
    path = write(tmp_path, {"uri": images * 20, "image_id": [str(n) for n in range(120)]})
    samples = [[row.row_id for row in check_manifest(path, sample_rows=5, seed=seed).sample] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert check_manifest(path, sample_rows=0).sample == []


def test_images_that_cannot_be_read_are_a_problem(tmp_path: Path, images: list[str]) -> None:
    Path(images[1]).unlink()
    Path(images[2]).write_bytes(Path(images[2]).read_bytes()[:200])
    result = check_manifest(write(tmp_path, {"uri": images}))
    (problem,) = result.problems
    assert problem.startswith("2 of 6 sampled images cannot be read (")
    assert "NOT_FOUND 1" in problem
    assert f"like row 1: {images[1]}" in problem
    assert [row.row_id for row in result.sample if row.error] == [1, 2]


def test_embedded_images_are_decoded(tmp_path: Path, images: list[str]) -> None:
    data = [Path(image).read_bytes() for image in images]
    result = check_manifest(write(tmp_path, {"bytes": [*data, None]}, row_group_size=3))
    (problem,) = result.problems
    assert problem == "1 of 7 sampled images cannot be read (EMPTY 1), like row 6: 6"
    assert [row.width for row in result.sample] == [20, 21, 22, 23, 24, 25, 0]


def test_duplicates_and_nulls_are_counted_and_shown(tmp_path: Path, images: list[str]) -> None:
    result = check_manifest(write(tmp_path, {"uri": [*images, images[4], images[2], images[2], None]}), sample_rows=0)
    assert result.problems == [
        "column 'uri': 1 of 10 rows are null",
        f"column 'image_id': 3 duplicates, like '{images[2]}' in rows 2 and 8 (input.duplicates: keep allows them)",
    ]
    assert result.num_duplicates == 3
    assert [(entry["image_id"], entry["num_rows"]) for entry in result.duplicates] == [(images[2], 3), (images[4], 2)]


def test_every_problem_of_the_schema_is_listed(tmp_path: Path) -> None:
    result = check_manifest(write(tmp_path, {"file": ["a"], "label": ["b"], "target": [1]}))
    assert len(result.problems) == 3
    assert result.problems[0].startswith("neither a 'uri' nor a 'bytes' column")
    assert result.columns == {"file": "string", "label": "string", "target": "int64"}


def test_many_rows_in_many_batches(tmp_path: Path) -> None:
    uris = [f"/i/{n}.jpg" for n in range(200_000)]
    result = check_manifest(write(tmp_path, {"uri": [*uris, uris[7]]}), sample_rows=0)
    assert result.num_duplicates == 1
    assert result.duplicates == [{"image_id": uris[7], "num_rows": 2, "first_row_id": 7, "last_row_id": 200_000}]
    assert result.tally.num_rows == 200_001


def test_what_is_no_manifest_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        check_manifest(str(tmp_path / "missing.parquet"))
