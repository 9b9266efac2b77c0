"""Ready-made scripts beside every run, for those who read the labels: query.sql, query.py (DuckDB), spark.py."""

from __future__ import annotations

from collections.abc import Sequence

from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.output_files import PREDICTIONS
from imgbatch.core.runs import RunPaths
from imgbatch.core.views import view_statements

_EXAMPLE = "select label, count(*) images, avg(probability) probability from predictions group by label order by 2 desc"


def write_readers(paths: RunPaths) -> None:
    """Write the three scripts into the run's directory; they show every run that has finished."""
    runs = current.load(paths.out)
    statements = view_statements(paths.out, runs)
    scripts = {
        paths.query_sql: sql_script(statements),
        paths.query_py: duckdb_script(statements, remote=not storage.is_local(paths.out)),
        paths.spark_py: spark_script(paths.out, runs),
    }
    for uri, script in scripts.items():
        storage.replace(uri, script.encode())


def sql_script(statements: Sequence[str]) -> str:
    """The views as a script for ``duckdb -init``, with a first query to try."""
    views = [f"{statement.replace('create view', 'create or replace view', 1)};" for statement in statements]
    return "\n".join(
        [
            "-- The output as views; made by imgbatch.",
            "set timezone='UTC';",
            *views,
            f"-- {_EXAMPLE};",
            "",
        ]
    )


def duckdb_script(statements: Sequence[str], *, remote: bool) -> str:
    """A Python program that prints a first query over the views; through s3fs where the output is on S3."""
    imports = ["import duckdb", *(["import s3fs"] if remote else [])]
    register = ["database.register_filesystem(s3fs.S3FileSystem())"] if remote else []
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
