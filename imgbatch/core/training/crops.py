"""Images decoded once, kept as uint8 crops on disk and mapped by every process that needs them.

    STORE/rows.parquet     row_id, uri and what else says where the images are, one row group per part
    STORE/part-00000.npy   the part's crops, uint8 NHWC, zeros where a row failed
    STORE/part-00000.json  which rows failed and why; written last, so a part is whole or absent

Legend of shape suffixes: N image, H height, W width, C channel.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.row_decoder import RowDecoder, image_columns
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import MAY_PASS, Status
from imgbatch.schema import ROW_ID, URI

OnPart = Callable[[dict[str, Any]], object]
"""Told of every part's report."""

_PART_BYTES = 64 * 2**20


_MAY_PASS = {status.value for status in (*MAY_PASS, Status.NOT_FOUND)}
"""A person may put a missing file in its place."""


@dataclass(frozen=True)
class FailedImage:
    """An image that training leaves out."""

    row_id: int
    uri: str | None
    status: str
    message: str


@dataclass(frozen=True)
class CropStore:
    """Where the crops of some rows are or will be; small enough to send to another process."""

    directory: str
    spec: PreprocessSpec
    num_rows: int

    @property
    def part_rows(self) -> int:
        """Images in every part but the last."""
        return max(1, _PART_BYTES // self.spec.pixel_bytes)

    @property
    def num_parts(self) -> int:
        return -(-self.num_rows // self.part_rows)

    def rows_in(self, part: int) -> int:
        """Images in one part."""
        return min(self.part_rows, self.num_rows - part * self.part_rows)

    @property
    def rows_file(self) -> str:
        return storage.join(self.directory, "rows.parquet")

    def pixels_file(self, part: int) -> str:
        return storage.join(self.directory, f"part-{part:05d}.npy")

    def report_file(self, part: int) -> str:
        return storage.join(self.directory, f"part-{part:05d}.json")

    def missing_parts(self) -> list[int]:
        """Parts that are still to decode."""
        there = {info.uri.rsplit("/", 1)[-1] for info in storage.list_files(self.directory, ".json")}
        return [part for part in range(self.num_parts) if self.report_file(part).rsplit("/", 1)[-1] not in there]

    def forget_what_may_pass(self) -> None:
        """Parts in which an image failed for its surroundings are missing again: what was wrong may be put right."""
        for part in sorted({*range(self.num_parts)} - {*self.missing_parts()}):
            failed = storage.read_json(self.report_file(part))["failed"]
            if any(image["status"] in _MAY_PASS for image in failed):
                storage.remove(self.report_file(part))

    def failed_images(self) -> list[FailedImage]:
        """Every image without a crop, in row order."""
        reports = (storage.read_json(self.report_file(part)) for part in range(self.num_parts))
        return [FailedImage(**failed) for report in reports for failed in report["failed"]]

    def open(self) -> Crops:
        """The crops, mapped; parts that are not on this machine's disks are copied to its temporary directory."""
        return Crops(lambda part: np.load(self._local_part(part), mmap_mode="r"), self.part_rows)

    def bytes_to_copy(self) -> int:
        """Disk space that :meth:`open` takes at most in the temporary directory, beyond what is there already."""
        if storage.is_local(self.directory):
            return 0
        copied = sum(path.stat().st_size for path in self._copy_directory.glob("part-*"))
        return max(0, self.num_rows * self.spec.pixel_bytes - copied)

    def remove_local_copy(self) -> None:
        """What :meth:`open` copied to this machine; the store itself stays."""
        shutil.rmtree(self._copy_directory, ignore_errors=True)

    @property
    def _copy_directory(self) -> Path:
        key = hashlib.sha256(self.directory.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir(), f"imgbatch-crops-{key}")

    def _local_part(self, part: int) -> Path:
        uri = self.pixels_file(part)
        if storage.is_local(uri):
            return storage.local_path(uri)
        # A part may have been decoded again since an earlier command copied it.
        info = storage.file_info(uri)
        version = hashlib.sha256(f"{info.size} {info.version}".encode()).hexdigest()[:12]
        path = self._copy_directory / f"part-{part:05d}-{version}.npy"
        storage.create_if_absent(str(path), b"" if path.exists() else storage.read_bytes(uri))
        return path


class Crops:
    """The crops of a store, by position; a part is opened when a crop of it is asked for."""

    def __init__(self, open_part: Callable[[int], np.ndarray], part_rows: int) -> None:
        self._open_part = open_part
        self._parts: dict[int, np.ndarray] = {}
        self._part_rows = part_rows

    def __getitem__(self, position: int) -> np.ndarray:
        """One crop, uint8 HWC, read-only."""
        part, row = divmod(position, self._part_rows)
        if part not in self._parts:
            self._parts[part] = self._open_part(part)
        crop: np.ndarray = self._parts[part][row]
        return crop

    def take(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """A copy of several crops, uint8 NHWC, in the order asked for."""
        return np.stack([self[int(position)] for position in positions])


def create_store(
    parent: str, manifest: Manifest, row_ids_N: np.ndarray, spec: PreprocessSpec, config: Config, *, identity: str
) -> CropStore:
    """The store for these rows below ``parent``: a fresh one, or the one that is there for the same images.

    Args:
        row_ids_N: int64, rising.
        spec: how images are decoded; its crop is what is kept.
        config: its limits say which images fail.
        identity: of the manifest's content.
    """
    limits = [config.decode.model_dump(), config.fetch.max_bytes, config.geo.max_nodata]
    key = json.dumps(
        [identity, spec.to_dict(), hashlib.sha256(row_ids_N.tobytes()).hexdigest(), limits], sort_keys=True
    )
    directory = storage.join(parent, f"crops-{hashlib.sha256(key.encode()).hexdigest()[:12]}")
    store = CropStore(directory, spec, len(row_ids_N))
    if not storage.exists(store.rows_file):
        table = _rows_of(manifest, row_ids_N)
        with storage.staged_file(store.rows_file) as staged:
            pq.write_table(table, staged, row_group_size=store.part_rows)
    return store


def _rows_of(manifest: Manifest, row_ids_N: np.ndarray) -> pa.Table:
    """row_id and the columns that say where the images are; ``uri`` is null for embedded ones without."""
    rows = pa.table({ROW_ID: row_ids_N})
    names = image_columns(manifest.schema.names)
    if names:
        found = pa.concat_tables(manifest.iter_batches(names)).take(pa.array(row_ids_N)).combine_chunks()
        rows = pa.table({ROW_ID: row_ids_N, **{name: found[name] for name in names}})
    return rows if URI in names else rows.append_column(URI, pa.nulls(len(row_ids_N), pa.string()))


class CropDecoder:
    """Decodes parts of a store with the decoder that classification uses. Holds a child process: close it."""

    def __init__(self, store: CropStore, config: Config) -> None:
        storage.configure(config.storage)
        self._store = store
        manifest = open_manifest(str(config.input.manifest))
        embedded = manifest if manifest.has_bytes else None
        self._decoder = RowDecoder(store.spec, config, columns=image_columns(manifest.schema.names), embedded=embedded)

    def decode_part(self, part: int) -> dict[str, Any]:
        """Decode and store one part; returns its report, which lists the images that failed."""
        with storage.open_input(self._store.rows_file) as file:
            rows = pq.ParquetFile(file).read_row_group(part)
        decoded = self._decoder.decode(rows)
        failed = [
            {"row_id": row_id, "uri": uri, "status": error.status.value, "message": error.message}
            for row_id, uri, error in zip(rows[ROW_ID].to_pylist(), rows[URI].to_pylist(), decoded.errors, strict=True)
            if error is not None
        ]
        with storage.staged_file(self._store.pixels_file(part)) as staged, staged.open("wb") as file:
            np.save(file, decoded.pixels_NHWC)
        report = {"num_rows": rows.num_rows, "failed": failed}
        storage.write_json(self._store.report_file(part), report)
        return report

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> CropDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decode_crops(store: CropStore, config: Config, on_part: OnPart = lambda _: None) -> None:
    """Decode what is missing in a plain loop; what ``on_part`` raises ends it."""
    parts = store.missing_parts()
    if parts:
        with CropDecoder(store, config) as decoder:
            for part in parts:
                on_part(decoder.decode_part(part))
