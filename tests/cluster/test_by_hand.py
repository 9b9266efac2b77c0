"""How ``cluster/README.md`` reads labels by hand, on a night beside one that is not finished."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import s3fs

from imgbatch.core import storage

from .conftest import CLUSTER


def test_only_files_of_finished_runs_are_read(store_run: Callable[..., Path], s3_bucket: str) -> None:
    out = store_run(("hat", "mug"), np.eye(2, dtype=np.float32))
    (written,) = (out / "predictions").rglob("*.parquet")
    for run_id, date in (("r000000000001", "2026-11-25"), ("r000000000002", "2026-11-25")):
        place = out / "predictions" / f"run_id={run_id}" / f"date={date}" / written.name
        place.parent.mkdir(parents=True)
        shutil.copy(written, place)
    (run,) = json.loads((out / "current.json").read_text())["runs"]
    run["predictions"] = ["predictions/run_id=r000000000001/date=2026-11-25/part-00000.parquet"]
    (out / "current.json").write_text(json.dumps({"runs": [run]}))
    for file in out.rglob("*.*"):
        if file.is_file():
            uri = storage.join(s3_bucket, "labels", str(file.relative_to(out)))
            storage.replace(uri, file.read_bytes())

    (example,) = re.findall(r"^By hand.*?```python\n(.*?)```", (CLUSTER / "README.md").read_text(), re.S | re.M)
    in_duckdb, in_spark = example.split("\n\nbase = spark")
    *setup, query = in_duckdb.replace("BUCKET", s3_bucket.removeprefix("s3://")).rsplit("\n", 1)
    with duckdb.connect() as connection:
        names = {"duckdb": connection, "json": json, "s3fs": s3fs}
        exec("\n".join(setup), names)
        found = eval(query, names).fetchall()
    assert len(found) == 2
    assert "for file in files" in in_spark
