from __future__ import annotations

import pyarrow as pa

from imgbatch.core.parquet import rechunk


def test_only_a_row_that_is_too_large_by_itself_makes_a_table_too_large() -> None:
    sizes = [600, 300, 900, 2000, 10]
    table = pa.table({"bytes": [bytes(size) for size in sizes]})
    for tables in ([table], [table.slice(row, 1) for row in range(5)]):
        cut = [[len(data) for data in part["bytes"].to_pylist()] for part in rechunk(tables, 100, 1000)]
        assert cut == [[600, 300], [900], [2000], [10]]
