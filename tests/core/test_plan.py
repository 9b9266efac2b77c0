from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.plan import RunPlan, plan_run
from imgbatch.core.rows import RowsReader
from imgbatch.errors import UsageError
from tests.conftest import changed

NUM_ROWS = 5_000_000
PEAK_BYTES = 10**9

PLAN_AND_REPORT = """
import re, sys
from pathlib import Path
from imgbatch.config import parse_config
from imgbatch.core.plan import plan_run
import json
run = plan_run(parse_config(json.loads(sys.argv[1])), "cpu")
assert "torch" not in sys.modules
# Not ru_maxrss, which a new process inherits from the one that started it.
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(run.plan.layout.num_units, peak_kb * 1024)
"""


def test_the_drivers_memory_does_not_grow_with_the_manifest(photo_config: Config, tmp_path: Path) -> None:
    """Five million rows are planned by a fresh process in less than a gigabyte."""
    manifest = tmp_path / "huge.parquet"
    step = 100_000
    with pq.ParquetWriter(manifest, pa.schema([("uri", pa.string())])) as writer:
        for first in range(0, NUM_ROWS, step):
            writer.write_table(pa.table({"uri": [f"s3://bucket/{row}.jpg" for row in range(first, first + step)]}))
    config = changed(photo_config, input__manifest=str(manifest), classify__unit_rows=512)
    result = subprocess.run(
        [sys.executable, "-c", PLAN_AND_REPORT, config.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
        timeout=500,
    )
    num_units, peak = map(int, result.stdout.split())
    assert num_units == -(-NUM_ROWS // 512)
    assert peak < PEAK_BYTES


def test_a_plan_reads_back_as_it_was(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    assert RunPlan.from_json(storage.read_json(run.paths.plan)) == run.plan
    assert run.run_id == "r" + run.plan.fingerprint[:12]
    assert run.pending_units() == list(range(8))


def test_rows_are_one_row_group_per_unit(photo_config: Config, photo_manifest: Path) -> None:
    run = plan_run(photo_config, "cpu")
    (path,) = Path(run.paths.rows).iterdir()
    assert pq.ParquetFile(path).num_row_groups == 8
    reader = RowsReader(run.paths)
    rows = pa.concat_tables([reader.read(unit) for unit in run.plan.layout])
    reader.close()
    manifest = pq.read_table(photo_manifest)
    assert rows.column_names == ["row_id", "image_id", "uri", "target", "shop", "price"]
    assert rows["row_id"].to_pylist() == list(range(120))
    assert rows["image_id"].to_pylist() == rows["uri"].to_pylist() == manifest["uri"].to_pylist()


@pytest.mark.parametrize(
    "flags",
    [
        {"fetch__retries": 1},
        {"errors__max_rate": 0.5},
        {"resources__decode_actors": 3},
        {"classify__unit_rows": 4},
        {"classify__batch_size": 2},
        {"output__keep_units": True},
        {"run__no_progress_s": 5.0},
    ],
)
def test_how_the_work_is_done_does_not_change_the_run(photo_config: Config, flags: dict[str, object]) -> None:
    assert plan_run(changed(photo_config, **flags), "cpu").run_id == plan_run(photo_config, "cpu").run_id


@pytest.mark.parametrize(
    "flags",
    [
        {"input__limit": 7},
        {"preprocess__crop_size": 24},
        {"decode__max_pixels": 10_000},
        {"output__top_k": 2},
        {"output__probabilities": "none"},
        {"output__partition_by": ("shop",)},
    ],
)
def test_what_changes_a_result_changes_the_run(photo_config: Config, flags: dict[str, object], tmp_path: Path) -> None:
    other = changed(photo_config, output__path=str(tmp_path / "other"), **flags)
    assert plan_run(other, "cpu").plan.fingerprint != plan_run(photo_config, "cpu").plan.fingerprint


def test_the_manifests_content_is_part_of_the_run(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "m.parquet"
    config = changed(photo_config, input__manifest=str(manifest))
    pq.write_table(pa.table({"uri": [str(photos[0])]}), manifest)
    first = plan_run(config, "cpu")
    pq.write_table(pa.table({"uri": [str(photos[1])]}), manifest)
    with pytest.raises(UsageError, match="manifest:"):
        plan_run(config, "cpu")
    storage.create_if_absent(first.paths.success, b"")
    assert plan_run(config, "cpu").run_id != first.run_id


def test_rasters_need_the_extra_that_reads_them(
    photo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = pa.array([{"col_off": 0, "row_off": 0, "width": 1, "height": 1}])
    manifest = tmp_path / "window.parquet"
    pq.write_table(pa.table({"uri": ["a.tif"], "window": window}), manifest)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UsageError, match=r"imgbatch\[geo\]"):
        plan_run(changed(photo_config, input__manifest=str(manifest)), "cpu")


def test_what_cannot_be_done_is_refused(photo_config: Config) -> None:
    for partition_by, words in [(("colour",), "no column 'colour'"), (("price",), "'price' is float")]:
        with pytest.raises(UsageError, match=words):
            plan_run(changed(photo_config, output__partition_by=partition_by), "cpu")
