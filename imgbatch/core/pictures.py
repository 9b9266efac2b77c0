"""Some images of a manifest, decoded as a model sees them: for looking at and for trying things on.

Legend of the shape suffixes: ``N`` images, ``H`` height, ``W`` width, ``C`` channel.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.config import Config
from imgbatch.core.manifest import Manifest
from imgbatch.core.row_decoder import RowDecoder, image_columns
from imgbatch.core.rows import take_rows
from imgbatch.core.training.labelled import TRAIN, names_of_split
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, UsageError
from imgbatch.schema import BANDS, IMAGE_ID, ROW_ID, SPLIT, TARGET, TARGETS, URI, WINDOW


@dataclass(frozen=True, slots=True)
class Pictures:
    """The images that could be decoded, in the order asked for."""

    image_ids: list[str]
    targets: list[list[str] | None]
    """The classes that are true of each, none where nobody said."""
    images_NHWC: np.ndarray
    """uint8."""
    failed: dict[str, RowError]
    """By image_id, why the others could not."""
    of_train_N: np.ndarray
    """bool: whether it is of the split that training takes."""

    @property
    def reasons(self) -> str:
        """The statuses of those that could not, for a message."""
        return ", ".join(sorted({error.status.value for error in self.failed.values()}))


def load_pictures(
    manifest: Manifest,
    spec: PreprocessSpec,
    config: Config,
    *,
    limit: int | None = None,
    image_ids: Sequence[str] | None = None,
    known_targets: Collection[str] | None = None,
    min_unseen: int | None = None,
) -> Pictures:
    """Fetch and decode some rows of a manifest.

    Args:
        config: its sections ``fetch``, ``decode`` and ``geo``.
        limit: at most so many, spread evenly over the rows, because manifests are often sorted by class.
        image_ids: these and no others, in this order.
        known_targets: only rows that have a target, all of these classes.
        min_unseen: no rows of the split that training takes, if there are so many others; none: of all splits.

    Raises:
        UsageError: an image_id that the manifest does not have, or no row with a known target.
    """
    rows = _choose(manifest, limit, image_ids, known_targets, min_unseen)
    images = rows.select(image_columns(rows.column_names))
    embedded = manifest if manifest.has_bytes else None
    with RowDecoder(spec, config, columns=images.column_names, embedded=embedded) as decoder:
        decoded = decoder.decode(images)
    ids, targets = rows[IMAGE_ID].to_pylist(), rows[TARGETS].to_pylist()
    ok = [index for index, error in enumerate(decoded.errors) if error is None]
    failed = {ids[index]: error for index, error in enumerate(decoded.errors) if error is not None}
    return Pictures(
        [ids[index] for index in ok],
        [targets[index] for index in ok],
        decoded.pixels_NHWC[ok],
        failed,
        _is_of_train(rows)[ok],
    )


def _choose(
    manifest: Manifest,
    limit: int | None,
    image_ids: Sequence[str] | None,
    known_targets: Collection[str] | None,
    min_unseen: int | None = None,
) -> pa.Table:
    """row_id, image_id, uri, split and targets (a list of names, or null) of the rows wanted, not of the manifest."""
    known = None if known_targets is None else frozenset(known_targets)
    if image_ids is not None:
        return _find(manifest, pa.array(image_ids, pa.string()), known).slice(0, limit)
    wanted_N = None if known is None else _known_row_ids(manifest, known)
    if min_unseen is not None and SPLIT in manifest.schema.names:
        unseen_N = _unseen_row_ids(manifest)
        unseen_N = unseen_N if wanted_N is None else np.intersect1d(wanted_N, unseen_N, assume_unique=True)
        wanted_N = unseen_N if len(unseen_N) >= min_unseen else wanted_N
    num_rows = manifest.num_rows if wanted_N is None else len(wanted_N)
    if num_rows == 0:
        raise UsageError(f"manifest {manifest.path}: no row has a target that the model knows ({TARGET} or {TARGETS})")
    count = min(limit or num_rows, num_rows)
    chosen = np.linspace(0, num_rows - 1, count).round().astype(np.int64)
    return take_rows(_iter_slim(manifest), chosen if wanted_N is None else wanted_N[chosen])


def _find(manifest: Manifest, wanted: pa.Array, known: frozenset[str] | None) -> pa.Table:
    """The rows of these image_ids, in this order; of those with a known target where ``known`` is given."""
    candidates = []
    for table in _iter_slim(manifest):
        table = table.filter(pc.is_in(table[IMAGE_ID], value_set=wanted))
        if known is not None:
            table = table.filter(pa.array(_is_known(table[TARGETS], known), pa.bool_()))
        candidates.append(table)
    rows = pa.concat_tables(candidates)
    found = pc.index_in(wanted, value_set=rows[IMAGE_ID].combine_chunks())
    if found.null_count and known is None:
        missing = wanted[pc.index(found.is_null(), True).as_py()]
        raise UsageError(f"manifest {manifest.path}: no image_id {missing.as_py()!r} there")
    return rows.take(found.drop_null())


def _known_row_ids(manifest: Manifest, known: frozenset[str]) -> np.ndarray:
    """int64, ascending: the rows that have a target, all of these classes."""
    names = [name for name in (TARGETS, TARGET) if name in manifest.schema.names][:1]
    flags = [_is_known(batch[name], known) for name in names for batch in manifest.iter_batches([name])]
    return np.flatnonzero(np.concatenate(flags)) if flags else np.zeros(0, np.int64)


def _unseen_row_ids(manifest: Manifest) -> np.ndarray:
    """int64, ascending: the rows that are not of the split that training takes."""
    return np.flatnonzero(~np.concatenate([_is_of_train(batch) for batch in manifest.iter_batches([SPLIT])]))


def _is_of_train(rows: pa.Table) -> np.ndarray:
    """bool per row."""
    if SPLIT not in rows.column_names:
        return np.zeros(rows.num_rows, bool)
    return pc.is_in(rows[SPLIT], value_set=pa.array(names_of_split(TRAIN))).to_numpy()


def _is_known(targets: pa.ChunkedArray, known: frozenset[str]) -> np.ndarray:
    """bool per row, of a column of names or of lists of them."""
    lists = ([names] if isinstance(names, str) else names for names in targets.to_pylist())
    return np.fromiter((names is not None and known.issuperset(names) for names in lists), bool, len(targets))


def _iter_slim(manifest: Manifest) -> Iterator[pa.Table]:
    first_row = 0
    for batch in manifest.iter_batches([name for name in _COLUMNS if name in manifest.schema.names]):
        yield _slim(manifest.with_image_id(batch, first_row), first_row)
        first_row += batch.num_rows


_COLUMNS = (URI, IMAGE_ID, WINDOW, BANDS, TARGET, TARGETS, SPLIT)


def _slim(table: pa.Table, first_row: int) -> pa.Table:
    num_rows = table.num_rows
    if TARGETS in table.column_names:
        targets = table[TARGETS]
    elif TARGET in table.column_names:
        targets = pa.array([None if name is None else [name] for name in table[TARGET].to_pylist()], _TARGETS_TYPE)
    else:
        targets = pa.nulls(num_rows, _TARGETS_TYPE)
    return pa.table(
        {
            ROW_ID: np.arange(first_row, first_row + num_rows, dtype=np.int64),
            IMAGE_ID: table[IMAGE_ID],
            URI: table[URI] if URI in table.column_names else pa.nulls(num_rows, pa.string()),
            TARGETS: targets,
            **{name: table[name] for name in (WINDOW, BANDS, SPLIT) if name in table.column_names},
        }
    )


_TARGETS_TYPE = pa.list_(pa.string())
