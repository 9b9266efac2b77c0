"""How a run's rows become units: how many rows a unit takes, and where one has to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from imgbatch.config import Config
from imgbatch.core.fingerprint import probability_mode
from imgbatch.core.manifest import Manifest
from imgbatch.core.model import ModelBundle, count_features
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.units import UnitLayout, choose_unit_rows
from imgbatch.schema import URI, WINDOW

_BASE_ROW_BYTES = 200
_PROBABILITY_BYTES = 4
_TOP_K_ENTRY_BYTES = 24
_FEATURE_BYTES = 4


def choose_layout(
    config: Config,
    manifest: Manifest,
    wanted: np.ndarray,
    bundle: ModelBundle,
    spec: PreprocessSpec,
    *,
    on_cpus: bool,
) -> UnitLayout:
    """The units of a manifest's rows: cut at row groups where images are embedded, at scenes where windows are read.

    Args:
        wanted: which rows, from the first on, are classified: bool.
        on_cpus: whether CPUs run the model.
    """
    if manifest.has_bytes:
        ends = np.cumsum([group.num_rows for group in manifest.row_groups])
        counts = [int(part.sum()) for part in np.split(wanted, ends[:-1])]
        return cut_rows(config, [count for count in counts if count], bundle, spec, on_cpus=on_cpus)
    if {WINDOW, URI} <= set(manifest.schema.names):
        unit_rows = _unit_rows(config, int(wanted.sum()), bundle, spec, on_cpus=on_cpus)
        return UnitLayout(unit_rows, tuple(join_scenes(_rows_of_scenes(manifest, wanted), unit_rows)))
    return cut_rows(config, [int(wanted.sum())], bundle, spec, on_cpus=on_cpus)


def cut_rows(
    config: Config, segments: Sequence[int], bundle: ModelBundle, spec: PreprocessSpec, *, on_cpus: bool
) -> UnitLayout:
    """``segments`` (numbers of rows that no unit straddles) cut into units of ``classify.unit_rows``."""
    return UnitLayout(_unit_rows(config, sum(segments), bundle, spec, on_cpus=on_cpus), tuple(segments))


def join_scenes(rows_of_scenes: Iterator[int], unit_rows: int) -> Iterator[int]:
    """Segments of whole scenes: small ones share one that fits into a unit, a larger one has its own.

    So a scene is opened for as few units as can be, and no unit ends shortly after it has opened one.
    """
    joined = 0
    for rows in rows_of_scenes:
        if joined and joined + rows > unit_rows:
            yield joined
            joined = 0
        joined += rows
    if joined:
        yield joined


def _rows_of_scenes(manifest: Manifest, wanted: np.ndarray) -> Iterator[int]:
    """How many wanted rows follow each other with the same uri, again and again."""
    first_row, current, rows = 0, None, 0
    for table in manifest.iter_batches([URI], limit=len(wanted)):
        end = first_row + table.num_rows
        uris = table[URI].to_numpy()[wanted[first_row:end]]
        first_row = end
        starts = np.flatnonzero(np.r_[True, uris[1:] != uris[:-1]]) if len(uris) else np.empty(0, int)
        for start, stop in zip(starts, [*starts[1:], len(uris)], strict=True):
            if rows and uris[start] != current:
                yield rows
                rows = 0
            current = uris[start]
            rows += int(stop - start)
    if rows:
        yield rows


def _unit_rows(config: Config, num_rows: int, bundle: ModelBundle, spec: PreprocessSpec, *, on_cpus: bool) -> int:
    if config.classify.unit_rows != "auto":
        return config.classify.unit_rows
    row_bytes = estimate_row_bytes(config, bundle)
    return choose_unit_rows(spec.pixel_bytes, row_bytes, num_rows, on_cpus=on_cpus)


def estimate_row_bytes(config: Config, bundle: ModelBundle) -> int:
    """Bytes of one result row before compression, about."""
    probabilities, num_classes = probability_mode(config, bundle), len(bundle.class_names)
    row_bytes = _BASE_ROW_BYTES + (_PROBABILITY_BYTES * num_classes if probabilities == "all" else 0)
    if probabilities != "none":
        row_bytes += _TOP_K_ENTRY_BYTES * min(config.output.top_k, num_classes)
    if config.output.embeddings:
        row_bytes += _FEATURE_BYTES * count_features(bundle)
    return row_bytes
