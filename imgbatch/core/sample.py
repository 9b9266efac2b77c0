"""A few rows of a manifest, fetched, decoded and classified outside any run, and the seconds that each stage took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from imgbatch.config import Config
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.decoder import DecodedUnit
from imgbatch.core.manifest import Manifest
from imgbatch.core.model import ModelBundle
from imgbatch.core.row_decoder import RowDecoder
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.schema import BANDS, IMAGE_ID, ROW_ID, TARGET, TARGETS, URI, WINDOW

_MAX_ROW_GROUPS = 8


@dataclass(frozen=True)
class DecodedSample:
    """Rows and what became of them."""

    rows: list[dict[str, Any]]
    decoded: DecodedUnit
    fetch_s: float
    """Seconds that fetching them took beyond the decoding that went on meanwhile."""


def sample_rows(manifest: Manifest, num_rows: int) -> list[dict[str, Any]]:
    """About ``num_rows`` rows, spread over a few row groups: row_id, image_id, uri, target, targets where there.

    Reads those row groups only, so that a manifest of any size costs the same.
    """
    groups = manifest.row_groups
    first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(_MAX_ROW_GROUPS, len(groups))).astype(int))
    names = [name for name in (URI, IMAGE_ID, WINDOW, BANDS, TARGET, TARGETS) if name in manifest.schema.names]
    rows: list[dict[str, Any]] = []
    for index in chosen:
        size = groups[index].num_rows
        positions = np.unique(np.linspace(0, size - 1, min(size, -(-num_rows // len(chosen)))).astype(int))
        read = manifest.data.read_row_group(groups[index], names).take(positions).to_pylist() if names else []
        for position, row in zip(positions, read or [{}] * len(positions), strict=True):
            rows.append({**row, ROW_ID: int(first_rows[index] + position)})
    return rows[:num_rows]


def decode_sample(
    manifest: Manifest, rows: Sequence[dict[str, Any]], spec: PreprocessSpec, config: Config
) -> DecodedSample:
    """``rows`` (with ``row_id`` and ``uri``) fetched and decoded as a run would; the first is tried before the clock
    starts, because it starts the decoder."""
    table = _image_table(manifest, rows)
    embedded = manifest if manifest.has_bytes else None
    with RowDecoder(spec, config, columns=table.column_names, embedded=embedded) as decoder:
        decoder.decode(table.slice(0, 1))
        started, fetch_before = time.perf_counter(), decoder.fetch_s
        decoded = decoder.decode(table)
        elapsed = time.perf_counter() - started
        waited = decoder.fetch_s - fetch_before
    return DecodedSample(list(rows), decoded, max(0.0, min(waited, elapsed - decoded.decode_s)))


def classify_sample(
    sample: DecodedSample, bundle: ModelBundle, backend: Backend, *, device: str, batch_size: int, threads: int
) -> float:
    """Seconds per image that the model takes on the decoded images; they are repeated to fill two batches a thread."""
    ok = np.array([error is None for error in sample.decoded.errors], dtype=bool)
    images_NHWC = sample.decoded.pixels_NHWC[ok]
    of_all_threads = batch_size * threads
    wanted = max(2 * of_all_threads, len(images_NHWC))
    images_NHWC = np.tile(images_NHWC, (-(-wanted // len(images_NHWC)), 1, 1, 1))[:wanted]
    predictor = build_predictor(bundle, backend, device=device, batch_size=batch_size, num_threads=threads)
    predictor.predict(images_NHWC[:of_all_threads])
    started = time.perf_counter()
    predictor.predict(images_NHWC)
    return (time.perf_counter() - started) / len(images_NHWC)


def _image_table(manifest: Manifest, rows: Sequence[dict[str, Any]]) -> pa.Table:
    fields = [(ROW_ID, pa.int64())]
    fields += [(name, manifest.schema.field(name).type) for name in (URI, WINDOW, BANDS) if name in rows[0]]
    schema = pa.schema(fields)
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
