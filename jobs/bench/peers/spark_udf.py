"""Spark with a pandas UDF over iterators, so that the model is loaded once a partition, of which each core gets two."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql.functions import col, pandas_udf

from jobs.bench.peers.task import BATCH_SIZE, NUM_EMPTY_TASKS, Stopwatch, open_all_rgb, parse_task, published_transform


def main() -> None:
    task = parse_task()
    watch = Stopwatch(task)
    spark = (
        SparkSession.builder.master(f"local[{task.cores}]")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", str(BATCH_SIZE))
        .config("spark.ui.enabled", "false")
        .getOrCreate()
    )
    spark.sparkContext.parallelize(range(NUM_EMPTY_TASKS), NUM_EMPTY_TASKS).map(lambda number: number).count()

    @pandas_udf("string")
    def label(batches: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import torch

        names, network = task.class_names(), task.network(num_threads=1)
        transform = published_transform(task.sizes())
        for uris in batches:
            with torch.inference_mode():
                logits = network(torch.stack([transform(image) for image in open_all_rgb(list(uris))]))
            yield pd.Series([names[index] for index in logits.argmax(dim=1).tolist()])

    watch.start()
    rows = spark.read.parquet(task.manifest).select("uri").limit(task.limit).repartition(2 * task.cores)
    rows.withColumn("label", label(col("uri"))).write.parquet(task.out)
    watch.stop()
    spark.stop()


if __name__ == "__main__":
    main()
