"""One output file: which units it is made of, and the writing of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.failpoints import failpoint
from imgbatch.core.geoparquet import METADATA_KEY, FileGeometry
from imgbatch.core.runs import RunPaths
from imgbatch.errors import ImgbatchError, RowsDiffer, Status

PREDICTIONS, ERRORS, EMBEDDINGS = KINDS = ("predictions", "errors", "embeddings")


@dataclass(frozen=True)
class OutputFile:
    """One output file and the units whose rows it takes."""

    path: str
    """Relative to the output directory."""
    kind: str
    partition: str
    """Directories below the run's, ``a=1/b=x``; empty without partitions."""
    units: list[list[int]]
    """Runs of unit indices, ``[first, last]``."""
    rows: int

    def unit_indices(self) -> list[int]:
        return [index for first, last in self.units for index in range(first, last + 1)]


def find_strays(paths: RunPaths, files: Collection[str]) -> list[str]:
    """URIs of what is in a run's own directories beside ``files``, which are relative to the output directory."""
    prefix = storage.listing_prefix(paths.out)
    found = [info.uri for kind in KINDS for info in storage.list_files(paths.data(kind))]
    foreign = next((uri for uri in found if not uri.startswith(prefix)), None)
    if foreign is not None:  # then every file would look like a stray, and strays are removed
        raise ImgbatchError(f"{foreign}: the storage lists it under another name than {paths.out}; nothing was removed")
    return [uri for uri in found if uri.removeprefix(prefix) not in files]


class OutputFileWriter:
    """Buffers one output file's rows into row groups; the file takes its name when everything is in it."""

    def __init__(self, out: str, file: OutputFile, schema: pa.Schema, row_group_bytes: int) -> None:
        self._file = file
        metadata = dict(schema.metadata or {})
        # Of all the rows of the run; the file says it of its own.
        geo = metadata.pop(METADATA_KEY, None)
        self._geometry = FileGeometry(geo) if geo is not None else None
        self._schema = schema.with_metadata(metadata)
        self._row_group_bytes = row_group_bytes
        self._uri = storage.join(out, file.path)
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._counts: Counter[str] = Counter()
        self._sha256 = ""
        self._size = 0

    def __enter__(self) -> OutputFileWriter:
        self._stack = ExitStack()
        self._staged = self._stack.enter_context(storage.staged_file(self._uri))
        self._writer = pq.ParquetWriter(self._staged, self._schema, compression="zstd")
        return self

    def add(self, table: pa.Table) -> None:
        statuses = table["status"] if self._file.kind == ERRORS else pa.array([Status.OK.value] * table.num_rows)
        self._counts.update({entry["values"]: entry["counts"] for entry in pc.value_counts(statuses).to_pylist()})
        if self._geometry is not None:
            self._geometry.add(table)
        self._held.append(table)
        self._held_bytes += table.nbytes
        if self._held_bytes >= self._row_group_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held).cast(self._schema))
            self._held, self._held_bytes = [], 0

    def __exit__(self, *exception: Any) -> None:
        with self._stack:  # whatever fails here, the staged file goes
            if exception[0] is not None:
                with contextlib.suppress(Exception):  # what failed first is what counts
                    self._writer.close()
                self._stack.__exit__(*exception)
                return
            self._flush()
            if self._geometry is not None:
                self._writer.add_key_value_metadata({METADATA_KEY: self._geometry.metadata()})
            self._writer.close()
            self._check_rows()
            self._sha256, self._size = storage.sha256(str(self._staged)), self._staged.stat().st_size
            failpoint("finalize.mid_file", self._file.kind)

    def _check_rows(self) -> None:
        rows = sum(self._counts.values())
        if rows != self._file.rows:
            raise RowsDiffer(f"{self._file.path}: {rows} rows where finalize.json has {self._file.rows}")

    def entry(self) -> dict[str, Any]:
        """What files.json says of the file."""
        return {
            "path": self._file.path,
            "kind": self._file.kind,
            "partition": self._file.partition,
            "rows": self._file.rows,
            "bytes": self._size,
            "sha256": self._sha256,
            "counts": dict(sorted(self._counts.items())),
        }
