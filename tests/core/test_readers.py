"""The scripts beside a run, run as someone would in the morning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, StorageConfig
from imgbatch.core import storage
from imgbatch.core.output_files import EMBEDDINGS, KINDS
from imgbatch.core.readers import duckdb_script, s3_statements
from imgbatch.core.runs import RunPaths
from imgbatch.core.s3 import ENDPOINT_VARIABLES
from imgbatch.core.views import open_views
from imgbatch.runtime.job import classify
from imgbatch.schema import plain_type
from tests.conftest import changed


@pytest.fixture
def finished(photo_config: Config) -> RunPaths:
    result = classify(changed(photo_config, output__partition_by=("shop",)))
    return RunPaths(result.out, result.run_id)


def labels(paths: RunPaths) -> list[str]:
    with open_views(paths.out) as connection:
        return [label for (label,) in connection.sql("select distinct label from predictions").fetchall()]


def test_the_sql_gives_the_views(finished: RunPaths) -> None:
    with duckdb.connect() as connection:
        connection.execute(Path(finished.query_sql).read_text())
        assert connection.sql("select count(*), count(distinct shop) from predictions").fetchall() == [(114, 2)]


def test_the_python_program_prints_the_labels(finished: RunPaths) -> None:
    done = subprocess.run(
        [sys.executable, finished.query_py],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert [label for label in labels(finished) if label not in done.stdout] == []


@pytest.fixture
def finished_in_s3(photo_config: Config, s3_server: str, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run whose settings alone name the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    out = storage.join(s3_bucket, "out")
    config = changed(photo_config, output__path=out, storage__endpoint_url=s3_server, storage__requester_pays=True)
    return RunPaths(out, classify(config).run_id)


def test_the_sql_takes_duckdb_to_the_server_and_names_no_credentials(finished_in_s3: RunPaths, s3_server: str) -> None:
    sql = storage.read_bytes(finished_in_s3.query_sql).decode()
    assert len(duckdb.extract_statements(sql)) == 5 + 1 + 7
    server = s3_server.removeprefix("http://")
    assert (
        f"create or replace secret imgbatch (type s3, scope '{finished_in_s3.out}', provider credential_chain, "
        f"endpoint '{server}', url_style 'path', use_ssl false, requester_pays true);"
    ) in sql
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in re.findall(r"\w+", sql)


def test_the_sql_reads_from_the_server(finished_in_s3: RunPaths) -> None:
    with duckdb.connect() as connection:
        try:
            connection.execute("load httpfs; load aws")
        except duckdb.Error:
            pytest.skip("DuckDB's extensions httpfs and aws are not installed")
        connection.execute(storage.read_bytes(finished_in_s3.query_sql).decode())
        assert connection.sql("select count(*) from predictions").fetchall() == [(114,)]


@pytest.fixture
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINT_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_endpoint")
@pytest.mark.parametrize(
    ("settings", "secret"),
    [
        (StorageConfig(), "(type s3, scope 's3://b/it''s', provider credential_chain)"),
        (
            StorageConfig(profile="night", region="eu-west-1"),
            "(type s3, scope 's3://b/it''s', provider credential_chain, profile 'night', region 'eu-west-1')",
        ),
        (
            StorageConfig(anonymous=True, endpoint_url="https://host/"),
            "(type s3, scope 's3://b/it''s', endpoint 'host', url_style 'path', use_ssl true)",
        ),
    ],
)
def test_the_secret_says_what_the_settings_say(settings: StorageConfig, secret: str) -> None:
    *extensions, created = s3_statements("s3://b/it's", settings)
    assert created == f"create or replace secret imgbatch {secret}"
    assert ("load aws" in extensions) is not settings.anonymous


@pytest.mark.usefixtures("no_endpoint")
@pytest.mark.parametrize(
    ("configured", "environment", "place"),
    [
        (None, {"AWS_ENDPOINT_URL": "http://s3:5000"}, "'s3:5000'"),
        (None, {"AWS_ENDPOINT_URL": "http://any", "AWS_ENDPOINT_URL_S3": "http://s3:5000"}, "'s3:5000'"),
        ("http://configured", {"AWS_ENDPOINT_URL": "http://s3:5000"}, "'configured'"),
    ],
)
def test_the_secret_names_the_server_that_the_run_wrote_to(
    configured: str | None, environment: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    *_, created = s3_statements("s3://b", StorageConfig(endpoint_url=configured))
    assert f"endpoint {place}, url_style 'path', use_ssl false" in created


def test_the_python_program_finds_the_server(finished_in_s3: RunPaths, tmp_path: Path) -> None:
    program = tmp_path / "query.py"
    program.write_bytes(storage.read_bytes(finished_in_s3.query_py))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, timeout=60)
    assert [label for label in labels(finished_in_s3) if label not in done.stdout] == []
    program.write_text(duckdb_script([], StorageConfig(anonymous=True, profile="night", region="eu-west-1")))
    assert "(anon=True, profile='night', client_kwargs={'region_name': 'eu-west-1'})" in program.read_text()


def test_files_hold_no_type_that_spark_fails_to_read(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    """From a manifest that has them all; Spark itself is not everywhere."""
    odd = {
        "taken": pa.array([10**18 + 1_500] * 8, pa.timestamp("ns", tz="UTC")),
        "score": pa.array(np.full(8, 0.5, np.float16)),
        "nothing": pa.nulls(8),
        "opens": pa.array([1_500_000] * 8, pa.time64("ns")),
        "shop": pa.array(["north"] * 8).dictionary_encode(),
        "code": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * 8, pa.binary(16))),
    }
    manifest = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"bytes": [path.read_bytes() for path in photos[:8]], **odd}), manifest)
    result = classify(changed(photo_config, input__manifest=str(manifest), output__embeddings=True))
    assert result.counts == {"OK": 7, "TRUNCATED": 1}
    for kind in KINDS:
        (path,) = Path(result.out, kind).rglob("*.parquet")
        table = pq.read_table(path, partitioning=None)
        assert table.schema.types == [plain_type(arrow_type) for arrow_type in table.schema.types]
        assert "bytes" not in table.column_names
        if kind != EMBEDDINGS:
            taken = datetime(2001, 9, 9, 1, 46, 40, 1, tzinfo=UTC)
            row = {"taken": taken, "score": 0.5, "nothing": None, "opens": 1_500, "shop": "north", "code": bytes(16)}
            assert table.select(list(odd)).to_pylist()[0] == row


@pytest.mark.soak
def test_spark_reads_what_duckdb_reads(finished: RunPaths, tmp_path: Path) -> None:
    """The generated program itself, and then counts, nested and partition columns, and a pruned partition."""
    pytest.importorskip("pyspark", reason="PySpark is not installed (extra spark)")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17")
    program = tmp_path / "spark.py"
    checks = """
import json
row = spark.sql('''
    select count(*) as n, count(distinct row_id) as ids, sum(case when shop is null then 1 else 0 end) as nulls,
           max(size(probabilities)) as classes, max(top_k[0].probability) as top, min(predicted_at) as at,
           max(run_id) as run_id
    from predictions''').first()
print("ROW", json.dumps(row.asDict(), default=str))
pruned = written.where("shop = 'north'")
filters = pruned._jdf.queryExecution().executedPlan().toString().split("PartitionFilters: ")[1].split("]")[0]
print("PRUNED", "shop" in filters, pruned.count())
"""
    program.write_text(Path(finished.spark_py).read_text() + checks)
    environment = {
        **os.environ,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [label for label in labels(finished) if label not in done.stdout] == []
    with open_views(finished.out) as connection:
        expected = connection.sql(
            "select count(*), count(distinct row_id), count(*) filter (shop is null), max(len(probabilities)) "
            "from predictions"
        ).fetchall()[0]
        north = connection.sql("select count(*) from predictions where shop = 'north'").fetchall()[0][0]
    line = next(text for text in done.stdout.splitlines() if text.startswith("ROW "))
    assert all(
        f'"{name}": {value}' in line for name, value in zip(("n", "ids", "nulls", "classes"), expected, strict=True)
    )
    assert f'"run_id": "{finished.run_id}"' in line
    assert f"PRUNED True {north}" in done.stdout


def test_what_was_lost_beside_a_finished_run_comes_back(photo_config: Config) -> None:
    result = classify(photo_config)
    lost = [Path(result.out, "current.json"), Path(RunPaths(result.out, result.run_id).spark_py)]
    for path in lost:
        before = path.read_bytes()
        path.unlink()
        assert classify(photo_config).already_finished
        assert path.read_bytes() == before
