from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import finalize as finalize_module
from imgbatch.core.verify import verify
from imgbatch.runtime.job import classify
from tests.conftest import changed


def test_files_of_partitions_are_written_a_few_at_a_time(
    photo_config: Config, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two open at once, so that there are as many passes over the units as there are pairs of files."""
    monkeypatch.setattr(finalize_module, "OPEN_FILES", 2)
    write_files, groups = finalize_module.write_files, list[int]()

    def counted(run: finalize_module.Run, files: list[finalize_module.OutputFile]) -> list[dict[str, object]]:
        groups.append(len(files))
        return write_files(run, files)

    monkeypatch.setattr(finalize_module, "write_files", counted)
    result = classify(changed(photo_config, output__partition_by=("shop", "bucket:3")))
    assert verify(result.out).ok
    files = list(Path(result.out, "predictions").rglob("*.parquet"))
    assert len(files) > 6
    assert sum(groups) == len(files) + 1
    assert max(groups) == 2
    row_ids = [row_id for path in files for row_id in pq.read_table(path, partitioning=None)["row_id"].to_pylist()]
    assert sorted(row_ids) == [row_id for row_id in range(len(photos)) if row_id % 20 != 5]
