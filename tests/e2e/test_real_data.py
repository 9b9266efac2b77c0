"""The main job on real files, where they are there."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import Config
from imgbatch.core.verify import verify
from imgbatch.errors import Status
from imgbatch.runtime.job import classify
from tests.conftest import changed

NOT_OF_THE_FILE = {Status.FETCH_FAILED, Status.FORBIDDEN, Status.NOT_FOUND, Status.DECODER_CRASH, Status.TIMEOUT}


def test_odd_and_malformed_images_stop_nothing(test_data: Path, photo_config: Config, tmp_path: Path) -> None:
    """Each ends as a prediction or as an error row that says what is wrong with the file."""
    files = sorted(str(path) for path in (test_data / "odd-images").rglob("*") if path.is_file())
    manifest = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"uri": files}), manifest)
    result = classify(changed(photo_config, input__manifest=str(manifest), classify__unit_rows=64))
    assert result.num_rows == len(files)
    assert verify(result.out).ok
    assert not {status for status in NOT_OF_THE_FILE if status.value in result.counts}
    assert result.counts["OK"] > len(files) / 2


def test_catalogue_photographs_all_get_a_label(test_data: Path, photo_config: Config, tmp_path: Path) -> None:
    files = sorted(str(path) for path in (test_data / "catalog" / "validation").rglob("*.jpg"))
    manifest = tmp_path / "catalog.parquet"
    pq.write_table(pa.table({"uri": files, "target": [Path(file).parent.name for file in files]}), manifest)
    result = classify(changed(photo_config, input__manifest=str(manifest), errors__max_rate=0.0))
    assert result.counts == {"OK": len(files)}
