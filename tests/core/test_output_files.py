from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from imgbatch.core.output_files import PREDICTIONS, OutputFile, OutputFileWriter
from imgbatch.errors import ImgbatchError

TABLE = pa.table({"row_id": [1, 2, 3]})


def writer(out: Path, rows: int) -> OutputFileWriter:
    file = OutputFile("predictions/part-00000.parquet", PREDICTIONS, "", [[0, 0]], rows)
    return OutputFileWriter(str(out), file, TABLE.schema, 1)


def files_in(out: Path) -> list[str]:
    return [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]


def test_the_file_is_there_when_all_of_its_rows_are(tmp_path: Path) -> None:
    with writer(tmp_path, rows=3) as whole:
        whole.add(TABLE)
        assert "predictions/part-00000.parquet" not in files_in(tmp_path)
    assert files_in(tmp_path) == ["predictions/part-00000.parquet"]
    assert whole.entry()["rows"] == 3


def test_of_a_file_that_is_not_whole_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(ImgbatchError, match=r"3 rows where finalize\.json has 4"), writer(tmp_path, rows=4) as short:
        short.add(TABLE)
    assert files_in(tmp_path) == []
    with pytest.raises(KeyError, match="mine"), writer(tmp_path, rows=3):
        raise KeyError("mine")
    assert files_in(tmp_path) == []
    with pytest.raises(pa.ArrowInvalid), writer(tmp_path, rows=1) as other:
        other.add(pa.table({"row_id": ["no number"]}))
    assert files_in(tmp_path) == []
