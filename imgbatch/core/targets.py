"""Corrections as a manifest of targets, on their own or within the manifest that they correct."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.corrections import Correction, Corrections, read_corrections
from imgbatch.core.database import bounded_memory
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.review import refuse_existing
from imgbatch.core.scored import read_labeller
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.schema import BANDS, IMAGE_ID, SPLIT, TARGET, TARGETS, TILE_ID, URI, WINDOW

_KEPT = (SPLIT, WINDOW, BANDS)
"""Of an output's columns, what a manifest of its images needs too."""

NEW_SPLIT = "train"
"""The split of corrected images whose own is unknown, where the manifest that they join has splits."""


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What :func:`import_corrections` wrote."""

    path: str
    num_rows: int
    """Of the manifest written."""
    num_corrections: int
    """Images that a person has looked at."""
    num_changed: int
    """Those of them that the model had labelled otherwise."""
    num_empty: int
    """Images of the list that nothing was said about."""


def import_corrections(
    path: str,
    output: str,
    *,
    out: str | None = None,
    manifest: str | None = None,
    accept_empty: bool = False,
    overwrite: bool = False,
) -> ImportResult:
    """Write what ``path`` says is true as a manifest of targets to the Parquet file ``output``.

    Args:
        path: as for ``corrections.read_corrections``.
        out: the output that was reviewed: class names are checked against its model, and splits and windows come from
            it.
        manifest: write all rows of this manifest with the corrections applied; images that are new to it are
            appended. None: the corrected images only.
        accept_empty: rows left empty are right as the model labelled them.

    Raises:
        UsageError: one line that names the file and the row.
    """
    refuse_existing(output, overwrite=overwrite)
    if out is None:
        corrections, known = read_corrections(path, accept_empty=accept_empty), None
    else:
        corrections, known = _read_reviewed(path, storage.absolute(out), accept_empty)
    if manifest is None:
        tables = iter([_corrected_rows(corrections, known)])
    else:
        tables = _corrected_manifest(open_manifest(manifest), corrections, known or pa.table({IMAGE_ID: []}))
    num_rows = 0
    with storage.staged_file(output) as staged:
        first = next(tables)
        with pq.ParquetWriter(staged, first.schema, compression="zstd") as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
                num_rows += table.num_rows
    found = corrections.by_image_id.values()
    num_changed = sum(correction.changed for correction in found)
    return ImportResult(output, num_rows, len(found), num_changed, corrections.num_empty)


def _read_reviewed(path: str, out: str, accept_empty: bool) -> tuple[Corrections, pa.Table]:
    """The corrections, checked against the output, and what it says of their images beside the labels.

    Columns: image_id, and those of split, window and bands that it has; rows in the corrections' order.
    """
    with open_views(out) as connection, bounded_memory(connection):
        labeller = read_labeller(connection, out)
        corrections = read_corrections(path, class_names=labeller.class_names, accept_empty=accept_empty)
        if corrections.multilabel != labeller.is_multilabel:
            raise UsageError(f"{path}: not a list of {out}, whose task is {labeller.task}")
        ids = pa.table({IMAGE_ID: list(corrections.by_image_id)})
        connection.register("corrected", ids)
        names = {row[0] for row in connection.execute("describe predictions").fetchall()}
        columns = ", ".join(f'"{name}"' for name in (IMAGE_ID, *(name for name in _KEPT if name in names)))
        found = connection.sql(
            f"select {columns} from predictions semi join corrected using ({IMAGE_ID})"
        ).to_arrow_table()
    at = pc.index_in(ids[IMAGE_ID], value_set=found[IMAGE_ID].combine_chunks())
    for correction, position in zip(corrections.by_image_id.values(), at.to_pylist(), strict=True):
        if position is None:
            raise UsageError(
                f"{path}: {correction.where}: image_id {correction.image_id!r} is not among {out}'s labels"
            )
    return corrections, found.take(at)


def _truths(corrections: Corrections, listed: Sequence[Correction]) -> pa.Array:
    if corrections.multilabel:
        return pa.array([list(correction.truth) for correction in listed], pa.list_(pa.string()))
    return pa.array([correction.truth[0] for correction in listed], pa.string())


def _corrected_rows(corrections: Corrections, known: pa.Table | None) -> pa.Table:
    listed = list(corrections.by_image_id.values())
    for correction in listed:
        if known is None and TILE_ID.fullmatch(correction.image_id):
            raise UsageError(
                f"{corrections.path}: {correction.where}: {correction.image_id!r} is a tile; name the output that was "
                "reviewed with --out, or the manifest that holds its window with --manifest"
            )
        if correction.uri is None:
            raise UsageError(
                f"{corrections.path}: {correction.where}: {URI} is empty; "
                "name the manifest that holds the image with --manifest"
            )
    columns = {
        URI: pa.array([correction.uri for correction in listed], pa.string()),
        IMAGE_ID: pa.array([correction.image_id for correction in listed], pa.string()),
        corrections.column: _truths(corrections, listed),
    }
    kept = known.drop_columns([IMAGE_ID]) if known is not None else pa.table({})
    return pa.table(columns | dict(zip(kept.column_names, kept.columns, strict=True)))


def _corrected_manifest(manifest: Manifest, corrections: Corrections, known: pa.Table) -> Iterator[pa.Table]:
    """The manifest's rows in order with the corrections in their place, then the images that are new to it."""
    other = TARGET if corrections.multilabel else TARGETS
    if other in manifest.schema.names:
        raise UsageError(f"manifest {manifest.path}: has {other!r}, but {corrections.path} says {corrections.column!r}")
    listed = list(corrections.by_image_id.values())
    ids, truths = pa.array([correction.image_id for correction in listed]), _truths(corrections, listed)
    new = np.ones(len(listed), bool)
    first_row = 0
    schema: pa.Schema | None = None
    for batch in manifest.data.iter_batches():
        table = manifest.with_image_id(batch, first_row)
        first_row += table.num_rows
        position = pc.index_in(table[IMAGE_ID], value_set=ids).combine_chunks()
        new[position.drop_null().to_numpy()] = False
        corrected = truths.take(position)
        if corrections.column in table.column_names:
            was = table[corrections.column].combine_chunks()
            corrected = pc.if_else(position.is_valid(), corrected, was)
            table = table.set_column(table.column_names.index(corrections.column), corrections.column, corrected)
        else:
            table = table.append_column(corrections.column, corrected)
        schema = table.schema
        yield table
    if schema is not None and new.any():
        yield _new_rows(manifest, corrections, [listed[index] for index in np.flatnonzero(new)], known, schema)


def _new_rows(
    manifest: Manifest,
    corrections: Corrections,
    listed: Sequence[Correction],
    known: pa.Table,
    schema: pa.Schema,
) -> pa.Table:
    if manifest.has_bytes or any(correction.uri is None for correction in listed):
        first = listed[0]
        raise UsageError(
            f"{corrections.path}: {first.where}: image_id {first.image_id!r} is not in manifest {manifest.path}, "
            "and without its bytes or uri it cannot be added"
        )
    ids = pa.array([correction.image_id for correction in listed], pa.string())
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        URI: pa.array([correction.uri for correction in listed], pa.string()),
        IMAGE_ID: ids,
        corrections.column: _truths(corrections, listed),
        SPLIT: pa.repeat(pa.scalar(NEW_SPLIT), len(listed)),
    }
    at = pc.index_in(ids, value_set=known[IMAGE_ID].combine_chunks().cast(pa.string()))
    for name in known.drop_columns([IMAGE_ID]).column_names:
        found = known[name].take(at)
        columns[name] = pc.coalesce(found, columns[name]) if name == SPLIT else found
    arrays = [columns.get(f.name, pa.nulls(len(listed), f.type)).cast(f.type) for f in schema]
    return pa.table(arrays, schema=schema)
