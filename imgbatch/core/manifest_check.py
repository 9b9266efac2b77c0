"""Checking a manifest before a long run: columns, nulls, duplicates, and whether a sample of its images decodes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.database import spilling
from imgbatch.core.manifest import Manifest, as_manifest, find_problems
from imgbatch.core.parquet import open_dataset
from imgbatch.core.sample import decode_sample
from imgbatch.core.tally import Tally
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Status
from imgbatch.schema import BANDS, IMAGE_ID, ROW_ID, SPLIT, TARGET, URI, WINDOW

_MAX_EXAMPLES = 5
_DUPLICATES_MEMORY_MB = 512


@dataclass(frozen=True)
class SampledRow:
    """One row that was read and decoded; ``error`` is none where that went well. Sizes in px, 0 where it did not."""

    row_id: int
    image_id: str | None
    target: str | None
    split: str | None
    width: int
    height: int
    error: RowError | None


@dataclass
class CheckResult:
    """What a check found; ``problems`` is empty for a manifest that is fit to run."""

    path: str
    num_files: int
    num_rows: int
    columns: dict[str, str]
    """Name to type, as the run will see them."""
    problems: list[str]
    """A line each."""
    nulls: dict[str, int] = field(default_factory=dict)
    """Column to number of nulls, where there are any."""
    num_duplicates: int = 0
    """Rows whose image_id an earlier row has already."""
    duplicates: list[dict[str, Any]] = field(default_factory=list)
    """The first few: ``image_id``, ``num_rows``, ``first_row_id``, ``last_row_id``."""
    tally: Tally = field(default_factory=Tally)
    sample: list[SampledRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``targets_not_listed`` are the rows of further targets."""
        return {
            "path": self.path,
            "num_files": self.num_files,
            "num_rows": self.num_rows,
            "columns": self.columns,
            "problems": self.problems,
            "nulls": self.nulls,
            "num_duplicates": self.num_duplicates,
            "duplicates": self.duplicates,
            "splits": [{"split": split, "num_rows": self.tally.by_split[split]} for split in self.tally.splits()],
            "targets": [{"target": target, "num_rows": rows} for target, rows in self.tally.targets().items()],
            "targets_not_listed": self.tally.num_not_listed,
            "sample": [_row_dict(row) for row in self.sample],
        }


def check_manifest(path: str, *, sample_rows: int = 64, seed: int = 0, config: Config | None = None) -> CheckResult:
    """Look at every row and decode a seeded sample of the images, as a run would.

    Memory is bounded for any number of rows: duplicates are found by DuckDB, which spills to a temporary folder.
    Rasters of which the manifest wants certain bands are left out of the sample.

    Args:
        config: how images are fetched and decoded; none: the defaults.

    Raises:
        UsageError: there is no such manifest, or it is not Parquet. What else is wrong becomes ``problems``.
    """
    data = open_dataset(storage.absolute(path))
    problems = find_problems(data)
    columns = {column.name: str(column.type) for column in data.schema}
    result = CheckResult(path, len(data.files), data.num_rows, columns, problems)
    if problems:
        return result
    manifest = as_manifest(data)
    chosen = sorted(random.Random(seed).sample(range(manifest.num_rows), min(sample_rows, manifest.num_rows)))
    scan = _Scan(manifest, chosen, result)
    result.num_duplicates, result.duplicates = _find_duplicates(scan)
    _add_column_problems(manifest, result)
    result.sample = _decode_sample(manifest, scan.chosen_rows(), config or Config())
    _add_sample_problems(result)
    return result


class _Scan:
    """One pass over the rows, on which everything that needs every row rides along."""

    def __init__(self, manifest: Manifest, chosen: Sequence[int], result: CheckResult) -> None:
        self._manifest = manifest
        self._chosen = np.array(chosen, np.int64)
        self._result = result
        self._rows: list[dict[str, Any]] = []

    def reader(self) -> pa.RecordBatchReader:
        """Every row's ``row_id`` and ``image_id``."""
        schema = pa.schema([(ROW_ID, pa.int64()), (IMAGE_ID, pa.string())])
        return pa.RecordBatchReader.from_batches(schema, self._iter_ids(schema))

    def chosen_rows(self) -> list[dict[str, Any]]:
        """The rows of the sample, after the pass."""
        return self._rows

    def _iter_ids(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        first_row = 0
        for table in self._manifest.iter_batches():
            row_ids = pa.array(np.arange(first_row, first_row + table.num_rows))
            ids = self._manifest.image_ids(table, first_row)
            self._result.tally.add(table)
            for name, column in zip(table.column_names, table.columns, strict=True):
                if column.null_count:
                    self._result.nulls[name] = self._result.nulls.get(name, 0) + column.null_count
            self._choose(table, ids, first_row)
            yield from pa.table([row_ids, ids], schema=schema).to_batches()
            first_row += table.num_rows

    def _choose(self, table: pa.Table, ids: pa.ChunkedArray, first_row: int) -> None:
        inside = self._chosen[(self._chosen >= first_row) & (self._chosen < first_row + table.num_rows)]
        wanted = [name for name in (URI, TARGET, SPLIT, WINDOW, BANDS) if name in table.column_names]
        rows = table.select(wanted).take(pa.array(inside - first_row)).to_pylist() if wanted else [{} for _ in inside]
        for row, row_id, image_id in zip(rows, inside, ids.take(pa.array(inside - first_row)), strict=True):
            self._rows.append({**row, ROW_ID: int(row_id), IMAGE_ID: image_id.as_py()})


def _find_duplicates(scan: _Scan) -> tuple[int, list[dict[str, Any]]]:
    with spilling(memory_mb=_DUPLICATES_MEMORY_MB) as connection:
        connection.register("ids", scan.reader())
        connection.execute(
            """create temp table repeated as
            select image_id, count(*) as num_rows, min(row_id) as first_row_id, max(row_id) as last_row_id
            from ids where image_id is not null group by image_id having count(*) > 1"""
        )
        total = connection.execute("select coalesce(sum(num_rows - 1), 0)::bigint from repeated").fetchall()[0][0]
        first = connection.sql(f"from repeated order by first_row_id limit {_MAX_EXAMPLES}").to_arrow_table()
    return total, first.to_pylist()


def _add_column_problems(manifest: Manifest, result: CheckResult) -> None:
    required = [IMAGE_ID] if manifest.has_bytes else [URI, IMAGE_ID]
    for name in required:
        if count := result.nulls.get(name, 0):
            result.problems.append(f"column {name!r}: {count:,} of {result.num_rows:,} rows are null")
    if result.duplicates:
        first = result.duplicates[0]
        result.problems.append(
            f"column {IMAGE_ID!r}: {result.num_duplicates:,} duplicates, like {first['image_id']!r} in rows "
            f"{first['first_row_id']} and {first['last_row_id']} (input.duplicates: keep allows them)"
        )


def _add_sample_problems(result: CheckResult) -> None:
    failed = [row for row in result.sample if row.error]
    if failed:
        counts = Counter(row.error.status for row in failed if row.error)
        reasons = ", ".join(f"{status} {count}" for status, count in counts.most_common())
        result.problems.append(
            f"{len(failed)} of {len(result.sample)} sampled images cannot be read ({reasons}), "
            f"like row {failed[0].row_id}: {failed[0].image_id}"
        )


def _decode_sample(manifest: Manifest, rows: list[dict[str, Any]], config: Config) -> list[SampledRow]:
    rows = [row for row in rows if row.get(BANDS) is None]
    if not rows:
        return []
    decoded = decode_sample(manifest, rows, PreprocessSpec(), config).decoded
    return [
        SampledRow(row[ROW_ID], row[IMAGE_ID], row.get(TARGET), row.get(SPLIT), int(width), int(height), error)
        for row, width, height, error in zip(rows, decoded.widths, decoded.heights, decoded.errors, strict=True)
    ]


def _row_dict(row: SampledRow) -> dict[str, Any]:
    error = row.error
    return {
        "row_id": row.row_id,
        "image_id": row.image_id,
        "target": row.target,
        "split": row.split,
        "width": row.width,
        "height": row.height,
        "status": str(error.status if error else Status.OK),
        "message": error.message if error else None,
    }
