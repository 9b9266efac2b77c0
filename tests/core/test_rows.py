from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.rows import EmbeddedImages, RowsReader, read_selected, write_rows
from imgbatch.core.runs import RunPaths
from imgbatch.core.units import Unit, UnitLayout


def test_units_side_by_side_read_a_row_group_once(tmp_path: Path, monkeypatch: Any) -> None:
    """One that kept a single row group would read one for almost every image."""
    images = [str(index).encode() for index in range(300)]
    pq.write_table(pa.table({"bytes": images}), tmp_path / "images.parquet", row_group_size=100)
    reads: Counter[int] = Counter()
    read_images = Manifest.read_images

    def counted(self: Manifest, group: Any) -> pa.ChunkedArray:
        reads[group.row_group] += 1
        return read_images(self, group)

    monkeypatch.setattr(Manifest, "read_images", counted)
    embedded = EmbeddedImages(open_manifest(str(tmp_path / "images.parquet")))
    units = [range(first, first + 100) for first in (0, 100, 200)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda rows: list(embedded.read(rows)), units))
    assert [data for unit in found for data in unit] == images
    in_turn = zip(*(embedded.read(rows) for rows in units), strict=True)
    assert [data for row in in_turn for data in row] == [
        images[row] for turn in zip(*units, strict=True) for row in turn
    ]
    assert set(reads.values()) == {1}


def test_more_units_at_once_than_groups_are_kept_read_a_row_group_once(tmp_path: Path, monkeypatch: Any) -> None:
    images = [str(index).encode() for index in range(500)]
    pq.write_table(pa.table({"bytes": images}), tmp_path / "images.parquet", row_group_size=100)
    reads: Counter[int] = Counter()
    read_images = Manifest.read_images

    def counted(self: Manifest, group: Any) -> pa.ChunkedArray:
        reads[group.row_group] += 1
        return read_images(self, group)

    monkeypatch.setattr(Manifest, "read_images", counted)
    embedded = EmbeddedImages(open_manifest(str(tmp_path / "images.parquet")))
    units = [range(first, first + 100) for first in range(0, 500, 100)]
    in_turn = [data for turn in zip(*map(embedded.read, units), strict=True) for data in turn]
    assert in_turn == [images[row] for turn in zip(*units, strict=True) for row in turn]
    assert set(reads.values()) == {1}


def test_of_selected_rows_only_their_units_are_read(tmp_path: Path) -> None:
    paths, layout = RunPaths(str(tmp_path), "r1"), UnitLayout(10, (100,))
    every_third = pa.table({"row_id": range(0, 300, 3), "uri": ["x"] * 100})
    write_rows(paths, layout, [every_third])
    read: list[int] = []

    class Watched(RowsReader):
        def read(self, unit: Unit, *arguments: Any) -> pa.Table:
            read.append(unit.index)
            return super().read(unit, *arguments)

    reader = Watched(paths)
    wanted = pa.array([0, 3, 27, 150, 151, 240, 299], pa.int64())
    found = [table["row_id"].to_pylist() for table in read_selected(reader, layout, wanted)]
    reader.close()
    assert found == [[0, 3, 27], [150], [240]]
    assert read == [0, 5, 8]
