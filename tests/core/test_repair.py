"""What a rebuilt file must hold, and what the records say of it afterwards."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import finalize, storage
from imgbatch.core.runs import RunPaths
from imgbatch.core.verify import verify
from imgbatch.errors import ImgbatchError
from imgbatch.runtime.job import RunResult, classify
from imgbatch.runtime.repair import repair
from tests.conftest import changed


@pytest.fixture
def moving(tmp_path: Path) -> tuple[Path, Path]:
    """Where an image is, and where there is none."""
    return tmp_path / "here.jpg", tmp_path / "there.jpg"


@pytest.fixture
def config(photo_config: Config, photos: list[Path], moving: tuple[Path, Path], tmp_path: Path) -> Config:
    """Of a manifest with both, which becomes one prediction and one error."""
    moving[0].write_bytes(photos[1].read_bytes())
    pq.write_table(pa.table({"uri": [str(path) for path in moving]}), tmp_path / "moving.parquet")
    return changed(photo_config, input__manifest=str(tmp_path / "moving.parquet"))


def file_of(result: RunResult, kind: str) -> Path:
    (path,) = Path(result.out, kind).rglob("*.parquet")
    return path


def test_rows_that_changed_places_are_noticed(config: Config, moving: tuple[Path, Path]) -> None:
    """Each file has as many rows as it had. What was written of them stays for no reader."""
    here, there = moving
    result = classify(config)
    assert result.counts == {"NOT_FOUND": 1, "OK": 1}
    lost = file_of(result, "predictions")
    before = pq.read_table(lost, partitioning=None)
    lost.unlink()
    here.rename(there)
    with pytest.raises(ImgbatchError, match=r"1 distinct row_ids, 1 planned rows without an outcome: some images came"):
        repair(config, None)
    assert not lost.exists()
    there.rename(here)
    assert len(repair(config, None)) == 1
    assert verify(result.out).ok
    assert pq.read_table(lost, partitioning=None)["row_id"].equals(before["row_id"])


def test_rows_that_fail_otherwise_are_counted_as_they_do_now(config: Config, moving: tuple[Path, Path]) -> None:
    result = classify(config)
    file_of(result, "errors").unlink()
    moving[1].write_text("<html>not here</html>")
    assert len(repair(config, None)) == 1
    assert storage.read_json(RunPaths(result.out, result.run_id).files)["counts"] == {"NOT_AN_IMAGE": 1, "OK": 1}
    assert verify(result.out).ok


def test_row_groups_are_those_of_then_however_few_files_are_rebuilt(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all files of a pass may hold together is a few rows here, of one file alone it would be more."""
    monkeypatch.setattr(finalize, "BUFFERED_BYTES", 8_000)
    config = changed(photo_config, output__partition_by=("shop",), output__keep_units=True)
    result = classify(config)
    lost = next(Path(result.out, "predictions").rglob("shop=north/*.parquet"))
    before = lost.read_bytes()
    assert pq.read_metadata(lost).num_row_groups == 3, "one of each unit"
    lost.unlink()
    assert len(repair(config, None)) == 1
    assert lost.read_bytes() == before
