"""Corrections as a manifest of targets, on their own or within the manifest that they correct."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.corrections import Correction, Corrections, read_corrections
from imgbatch.core.database import bounded_memory
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.scored import read_labeller
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.schema import IMAGE_ID, SPLIT, TARGET, TARGETS, URI

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
) -> ImportResult:
    """Write what ``path`` says is true as a manifest of targets to the Parquet file ``output``.

    Args:
        path: as for ``corrections.read_corrections``.
        out: the output that was reviewed: class names are checked against its model, and splits come from it.
        manifest: write all rows of this manifest with the corrections applied; images that are new to it are
            appended. None: the corrected images only.
        accept_empty: rows left empty are right as the model labelled them.

    Raises:
        UsageError: one line that names the file and the row.
    """
    if out is None:
        corrections, splits = read_corrections(path, accept_empty=accept_empty), None
    else:
        corrections, splits = _read_reviewed(path, storage.absolute(out), accept_empty)
    if manifest is None:
        tables = iter([_corrected_rows(corrections, splits)])
    else:
        tables = _corrected_manifest(open_manifest(manifest), corrections, splits or {})
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


def _read_reviewed(path: str, out: str, accept_empty: bool) -> tuple[Corrections, dict[str, str] | None]:
    """The corrections, checked against the output, and the splits of their images (none: it has no splits)."""
    with open_views(out) as connection, bounded_memory(connection):
        labeller = read_labeller(connection, out)
        corrections = read_corrections(path, class_names=labeller.class_names, accept_empty=accept_empty)
        if corrections.multilabel != labeller.is_multilabel:
            raise UsageError(f"{path}: not a list of {out}, whose task is {labeller.task}")
        ids = pa.table({IMAGE_ID: list(corrections.by_image_id)})
        connection.register("corrected", ids)
        names = {row[0] for row in connection.execute("describe predictions").fetchall()}
        split = SPLIT if SPLIT in names else "null"
        found = dict(
            connection.execute(
                f"select {IMAGE_ID}, {split} from predictions semi join corrected using ({IMAGE_ID})"
            ).fetchall()
        )
    for correction in corrections.by_image_id.values():
        if correction.image_id not in found:
            raise UsageError(
                f"{path}: {correction.where}: image_id {correction.image_id!r} is not among {out}'s labels"
            )
    return corrections, found if SPLIT in names else None


def _truths(corrections: Corrections, listed: Sequence[Correction]) -> pa.Array:
    if corrections.multilabel:
        return pa.array([list(correction.truth) for correction in listed], pa.list_(pa.string()))
    return pa.array([correction.truth[0] for correction in listed], pa.string())


def _corrected_rows(corrections: Corrections, splits: Mapping[str, str] | None) -> pa.Table:
    listed = list(corrections.by_image_id.values())
    for correction in listed:
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
    if splits is not None:
        columns[SPLIT] = pa.array([splits[correction.image_id] for correction in listed], pa.string())
    return pa.table(columns)


def _corrected_manifest(
    manifest: Manifest, corrections: Corrections, splits: Mapping[str, str | None]
) -> Iterator[pa.Table]:
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
        yield _new_rows(manifest, corrections, [listed[index] for index in np.flatnonzero(new)], splits, schema)


def _new_rows(
    manifest: Manifest,
    corrections: Corrections,
    listed: Sequence[Correction],
    splits: Mapping[str, str | None],
    schema: pa.Schema,
) -> pa.Table:
    if manifest.has_bytes or any(correction.uri is None for correction in listed):
        first = listed[0]
        raise UsageError(
            f"{corrections.path}: {first.where}: image_id {first.image_id!r} is not in manifest {manifest.path}, "
            "and without its bytes or uri it cannot be added"
        )
    known = {
        URI: pa.array([correction.uri for correction in listed], pa.string()),
        IMAGE_ID: pa.array([correction.image_id for correction in listed], pa.string()),
        corrections.column: _truths(corrections, listed),
        SPLIT: pa.array([splits.get(correction.image_id) or NEW_SPLIT for correction in listed], pa.string()),
    }
    return pa.table([known.get(f.name, pa.nulls(len(listed), f.type)) for f in schema], schema=schema)
