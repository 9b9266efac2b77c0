"""Ready-made scripts beside every run, for those who read the labels: query.sql, query.py (DuckDB), spark.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from imgbatch.config import StorageConfig
from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.output_files import PREDICTIONS
from imgbatch.core.runs import RunPaths
from imgbatch.core.s3 import configured_endpoint
from imgbatch.core.views import quote, view_statements

_EXAMPLE = "select label, count(*) images, avg(probability) probability from predictions group by label order by 2 desc"


def write_readers(paths: RunPaths) -> None:
    """Write the three scripts into the run's directory; they show every run that has finished.

    They reach an object store as this process does, with the credentials of whoever runs them.
    """
    runs = current.load(paths.out)
    statements = view_statements(paths.out, runs)
    in_s3 = storage.is_s3(paths.out)
    scripts = {
        paths.query_sql: sql_script(statements, s3_statements(paths.out, storage.settings()) if in_s3 else ()),
        paths.query_py: duckdb_script(statements, storage.settings() if in_s3 else None),
        paths.spark_py: spark_script(paths.out, runs),
    }
    for uri, script in scripts.items():
        storage.replace(uri, script.encode())


def s3_statements(out: str, settings: StorageConfig) -> list[str]:
    """What lets DuckDB read below ``out`` in S3 by itself: its extensions, and a secret that names no credentials."""
    parts = ["type s3", f"scope {quote(out)}"]
    if settings.anonymous:
        extensions = ["httpfs"]
    else:
        extensions = ["httpfs", "aws"]  # of which the second knows the usual chain
        parts += ["provider credential_chain", *([f"profile {quote(settings.profile)}"] if settings.profile else [])]
    if settings.region:
        parts.append(f"region {quote(settings.region)}")
    if endpoint := configured_endpoint(settings):  # DuckDB does not take it from the environment
        url = urlsplit(endpoint)
        place = quote(url.netloc + url.path.rstrip("/"))
        parts += [f"endpoint {place}", "url_style 'path'", f"use_ssl {str(url.scheme == 'https').lower()}"]
    if settings.requester_pays:
        parts.append("requester_pays true")
    loaded = [statement for name in extensions for statement in (f"install {name}", f"load {name}")]
    return [*loaded, f"create or replace secret imgbatch ({', '.join(parts)})"]


def sql_script(statements: Sequence[str], before: Sequence[str] = ()) -> str:
    """The views as a script for ``duckdb -init``, with a first query to try; ``before``: statements that go first."""
    views = [f"{statement.replace('create view', 'create or replace view', 1)};" for statement in statements]
    return "\n".join(
        [
            "-- The output as views; made by imgbatch.",
            *(f"{statement};" for statement in before),
            "set timezone='UTC';",
            *views,
            f"-- {_EXAMPLE};",
            "",
        ]
    )


def duckdb_script(statements: Sequence[str], s3: StorageConfig | None) -> str:
    """A Python program that prints a first query over the views; ``s3``: how s3fs reaches an output on S3."""
    imports = ["import duckdb", *(["import s3fs"] if s3 else [])]
    register = [f"database.register_filesystem(s3fs.S3FileSystem({_s3fs_arguments(s3)}))"] if s3 else []
    return "\n".join(
        [
            '"""The output as DuckDB views; made by imgbatch. Change the last query."""',
            "",
            *imports,
            "",
            "database = duckdb.connect()",
            *register,
            "database.execute(\"set timezone = 'UTC'\")",
            "for view in (",
            *(f"    {statement!r}," for statement in statements),
            "):",
            "    database.execute(view)",
            f"database.sql({_EXAMPLE!r}).show()",
            "",
        ]
    )


def _s3fs_arguments(settings: StorageConfig) -> str:
    """As ``core.s3`` opens it, what is the default left out."""
    given: dict[str, Any] = {
        "anon": settings.anonymous,
        "endpoint_url": settings.endpoint_url,
        "profile": settings.profile,
        "requester_pays": settings.requester_pays,
        "client_kwargs": {"region_name": settings.region} if settings.region else None,
    }
    return ", ".join(f"{name}={value!r}" for name, value in given.items() if value)


def spark_script(out: str, runs: Sequence[CurrentRun]) -> str:
    """A PySpark program with the view ``predictions``: one current row per image_id, the newest run's."""
    base = _for_spark(storage.join(storage.absolute(out), PREDICTIONS))
    directories = [f"{base}/run_id={run.run_id}" for run in runs if run.predictions]
    return "\n".join(
        [
            '"""The output in Spark; made by imgbatch. Run it with spark-submit, change the last query."""',
            "",
            "from pyspark.sql import SparkSession, Window",
            "from pyspark.sql import functions as f",
            "",
            "spark = (",
            '    SparkSession.builder.config("spark.sql.session.timeZone", "UTC")',
            "    # Partition values stay strings, whatever they look like.",
            '    .config("spark.sql.sources.partitionColumnTypeInference.enabled", "false")',
            "    .getOrCreate()",
            ")",
            f"base = {base!r}",
            f"runs = {directories!r}",
            'written = spark.read.option("basePath", base).option("mergeSchema", "true").parquet(*runs)',
            'newest_first = [f.desc("predicted_at"), f.desc("run_id"), f.desc("row_id")]',
            'newest = f.row_number().over(Window.partitionBy("image_id").orderBy(*newest_first))',
            'predictions = written.withColumn("place", newest).where("place = 1").drop("place")',
            'predictions.createOrReplaceTempView("predictions")',
            f"spark.sql({_EXAMPLE!r}).show(50, truncate=False)",
            "",
        ]
    )


def _for_spark(uri: str) -> str:
    """Hadoop's S3 client goes by another scheme."""
    return "s3a://" + uri.removeprefix("s3://") if uri.startswith("s3://") else uri
