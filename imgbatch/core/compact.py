"""Many nights as one dataset: the current row of every image, in large files, for readers that know no views."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import spilling
from imgbatch.core.geoparquet import METADATA_KEY, FileGeometry
from imgbatch.core.parquet import open_parquet
from imgbatch.core.runs import sign_of_life
from imgbatch.core.views import view_statements
from imgbatch.errors import ImgbatchError
from imgbatch.schema import IMAGE_ID, SCHEMA_VERSION, to_plain

_MEMORY_MB = 2000
_BATCH_ROWS = 65_536
_FOLDER = "compacted"
_FILE_NAME = "part-{:05d}.parquet"
_RECORD = "current.json"
_SIGN = "heartbeat.json"


@dataclass(frozen=True)
class CompactResult:
    """A compacted dataset."""

    path: str
    """The directory of its files, absolute; nothing else lies in it."""
    runs: list[str]
    """run_ids whose labels are in it, oldest first."""
    num_rows: int
    files: list[dict[str, Any]]
    """``path`` (relative to the output), ``rows``, ``bytes``, ``sha256``."""
    already_there: bool
    """Whether no run has finished since it was made, and its files are what they were."""


def compact(out: str, *, target_file_mb: int) -> CompactResult:
    """Write ``OUT/compacted/<id>/``: the view ``predictions`` with its ``run_id``, ordered by image_id.

    The id follows from the finished runs and when they were planned, so the same command again finds it done.
    ``OUT/compacted/current.json`` names the dataset once its files are complete, and then what was compacted earlier is
    removed. The runs' own files stay: they are what ``verify`` knows.

    Args:
        target_file_mb: size that files aim at, MB.

    Raises:
        UsageError: no finished run there, or another command compacts it.
        ImgbatchError: files were removed while others were written.
    """
    view_statements(out, current.load_finished(out))  # nothing is written where there is no run
    out = storage.absolute(out)
    compacted = storage.join(out, _FOLDER)
    with sign_of_life(storage.join(compacted, _SIGN), compacted):
        return _compact(out, compacted, target_file_mb)


def _compact(out: str, compacted: str, target_file_mb: int) -> CompactResult:
    runs = current.load_finished(out)
    statements = view_statements(out, runs)
    run_ids = [run.run_id for run in runs]
    # A run that was cleaned and classified anew has the id that it had.
    parts = [*(f"{run.run_id} {run.predicted_at}" for run in runs), str(target_file_mb)]
    name = "c" + hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]
    # An output may be moved or copied: the record names nothing but what lies in it.
    relative = f"{_FOLDER}/{name}"
    directory = storage.join(out, relative)
    record = storage.join(compacted, _RECORD)
    written = storage.read_json(record) if storage.exists(record) else {}
    if written.get("path") == relative and _is_whole(directory, written["files"]):
        return CompactResult(**{**written, "path": directory, "already_there": True})
    storage.remove(directory)
    with spilling(out, memory_mb=_MEMORY_MB) as connection:
        for statement in statements:
            connection.execute(statement)
        reader = connection.sql(f"from predictions order by {IMAGE_ID}").to_arrow_reader(_BATCH_ROWS)
        files = [
            {**file, "path": f"{relative}/{file['path']}"}
            for file in _write(reader, directory, target_file_mb * 10**6, _geo_of(out, runs))
        ]
    if not _is_whole(directory, files):
        raise ImgbatchError(f"{directory}: files were removed or added meanwhile; run the same command again")
    result = CompactResult(
        directory,
        run_ids,
        sum(file["rows"] for file in files),
        files,
        already_there=False,
    )
    storage.write_json(record, {**asdict(result), "path": relative})
    prefix = storage.listing_prefix(compacted)
    for entry in {info.uri.removeprefix(prefix).split("/")[0] for info in storage.list_files(compacted)}:
        if entry not in (name, _RECORD, _SIGN):
            storage.remove(storage.join(compacted, entry))
    return result


def _is_whole(directory: str, files: Sequence[dict[str, Any]]) -> bool:
    """Whether a dataset's files are there, of the size that they were written with, and no others."""
    prefix = storage.listing_prefix(directory)
    found = {info.uri.removeprefix(prefix): info.size for info in storage.iter_files(directory)}
    return found == {file["path"].rpartition("/")[2]: file["bytes"] for file in files}


def _geo_of(out: str, runs: Sequence[CurrentRun]) -> bytes | None:
    """What the runs' files say of their geometry, but for what depends on the rows; none where they do not agree."""
    said: set[bytes | None] = set()
    for run in runs:
        for path in run.predictions[:1]:
            with open_parquet(storage.join(out, path)) as file:
                geo = (file.metadata.metadata or {}).get(METADATA_KEY)
            said.add(geo and FileGeometry(geo).metadata())
    return said.pop() if len(said) == 1 else None


def _write(
    reader: pa.RecordBatchReader, directory: str, target_bytes: int, geo: bytes | None = None
) -> Iterator[dict[str, Any]]:
    """Files of about ``target_bytes`` each, at least one, with what ``geo`` makes of their rows."""
    schema = to_plain(reader.schema.empty_table()).schema
    schema = schema.with_metadata({"imgbatch.schema_version": SCHEMA_VERSION})
    batches = iter(reader)
    batch = next(batches, None)
    index = 0
    while batch is not None or index == 0:
        name = _FILE_NAME.format(index)
        with storage.staged_file(storage.join(directory, name)) as staged:
            rows = 0
            geometry = FileGeometry(geo) if geo is not None else None
            with pq.ParquetWriter(staged, schema, compression="zstd") as writer:
                while batch is not None and staged.stat().st_size < target_bytes:
                    table = to_plain(pa.Table.from_batches([batch])).cast(schema)
                    writer.write_table(table)
                    if geometry is not None:
                        geometry.add(table)
                    rows += batch.num_rows
                    batch = next(batches, None)
                if geometry is not None:
                    writer.add_key_value_metadata({METADATA_KEY: geometry.metadata()})
            entry = {
                "path": name,
                "rows": rows,
                "bytes": staged.stat().st_size,
                "sha256": storage.sha256(str(staged)),
            }
        yield entry
        index += 1
