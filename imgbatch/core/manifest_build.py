"""Building a manifest: sources in, one Parquet file out, streaming.

Rows keep the order of the sources, and within a folder that of a sorted walk, so that the same collection always
gives the same manifest. Only the names of one directory and one batch of rows are ever in memory.
"""

from __future__ import annotations

import bisect
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core import storage
from imgbatch.core.geoparquet import METADATA_KEY, FileGeometry, carried_metadata
from imgbatch.core.manifest import Manifest, schema_problems
from imgbatch.core.manifest_sources import ParquetTable, Source, SourceRows, TableOptions, open_sources
from imgbatch.core.parquet import BATCH_ROWS, open_dataset, rechunk
from imgbatch.core.tally import Tally
from imgbatch.errors import UsageError, normalise_message
from imgbatch.schema import BYTES, IMAGE_ID, SPLIT, TARGET, TARGETS, TILE_ID, URI, WINDOW

SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
"""Folder names that ``split_from`` knows, and the split that each means."""

_ROW_GROUP_BYTES = 128 << 20
_FIRST_COLUMNS = (URI, BYTES, IMAGE_ID, TARGET, TARGETS, SPLIT)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How sources become a manifest."""

    table: TableOptions = field(default_factory=TableOptions)
    targets_from: Literal["folder"] | None = None
    """``folder``: the target is the name of the folder that the image lies in."""
    split_shares: dict[str, float] | None = None
    """Split to its share of the images, as :func:`parse_split_shares` reads it."""
    split_from: Literal["folder"] | None = None
    """``folder``: the split is the last folder of the image's path that :data:`SPLIT_FOLDERS` knows."""
    seed: int = 0
    """Another seed draws another split."""


def build_manifest(sources: Sequence[str], output: str, options: BuildOptions, *, overwrite: bool = False) -> Tally:
    """Write the images of ``sources`` to the Parquet file ``output``; returns its counts.

    The file appears whole or not at all.

    Raises:
        UsageError: one line: a source that cannot be read, columns that do not fit, no image, ``output`` exists.
    """
    if options.split_shares and options.split_from:
        raise UsageError("--split and --split-from both say where the split comes from; give one of them")
    if storage.exists(output) and not (overwrite and storage.is_file(output)):
        raise UsageError(
            f"output {output}: exists; choose another name or give --overwrite (which replaces a file only)"
        )
    # An earlier manifest in the folder of its images is not what they are listed by.
    opened = open_sources(sources, options.table, leave_out=output)
    schema = _manifest_schema(opened, options)
    try:
        tables = _iter_tables(opened, schema, options)
        return _write(output, schema, tables, _geometry(opened, schema), ", ".join(sources))
    except OSError as error:
        raise UsageError(
            f"output {output}: cannot be written ({normalise_message(error.strerror or error)})"
        ) from error


def parse_split_shares(text: str) -> dict[str, float]:
    """``train=0.8,validation=0.2`` as a mapping; ``val`` and ``valid`` mean validation.

    Raises:
        UsageError: not of that form, a split twice, or shares that are not positive or do not add up to 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        name = SPLIT_FOLDERS.get(name, name)
        try:
            share = float(number)
        except ValueError as error:
            raise UsageError(f"--split {text}: expected like train=0.8,validation=0.1,test=0.1") from error
        if not name or name in shares or not share > 0:
            raise UsageError(
                f"--split {text}: {part.strip()!r}: every split needs a name of its own and a share above 0"
            )
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"--split {text}: the shares add up to {sum(shares.values()):g}, not to 1")
    return shares


def draw_split(key: str, shares: dict[str, float], seed: int) -> str:
    """The split of the image ``key``: it depends on nothing else, so adding images moves none.

    The key's BLAKE2 hash is a number from 0 to 1; the splits take their shares of that range in order.
    """
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    names = list(shares)
    index = bisect.bisect_right(list(accumulate(shares.values())), position)
    return names[min(index, len(names) - 1)]  # shares that add up to a little under 1


def _geometry(sources: Sequence[Source], schema: pa.Schema) -> FileGeometry | None:
    """What Parquet sources say of their geometry; none where they do not all say the same."""
    said: set[bytes | None] = set()
    for source in sources:
        data = open_dataset(source.path) if isinstance(source, ParquetTable) else None
        geo = carried_metadata(Manifest(data, schema)).get(METADATA_KEY) if data else None
        said.add(geo and FileGeometry(geo).metadata())  # without what depends on the rows
    geo = said.pop() if len(said) == 1 else None
    return FileGeometry(geo) if geo else None


def _write(
    output: str, schema: pa.Schema, tables: Iterator[pa.Table], geometry: FileGeometry | None, sources: str
) -> Tally:
    tally = Tally()
    with storage.staged_file(output) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        max_bytes = _ROW_GROUP_BYTES if BYTES in schema.names else None
        for table in rechunk(tables, BATCH_ROWS, max_bytes):
            writer.write_table(table, row_group_size=table.num_rows)
            tally.add(table)
            if geometry is not None:
                geometry.add(table)
        if tally.num_rows == 0:
            raise UsageError(f"{sources}: no image found")
        if geometry is not None:
            writer.add_key_value_metadata({METADATA_KEY: geometry.metadata()})
    return tally


def _manifest_schema(sources: Sequence[Source], options: BuildOptions) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    origin: dict[str, str] = {}
    for source in sources:
        for column in source.schema:
            known = fields.setdefault(column.name, column)
            first = origin.setdefault(column.name, source.path)
            if known.type != column.type:
                raise UsageError(
                    f"{source.path}: column {column.name!r} is {column.type}, but {known.type} in {first}; "
                    "build a manifest of each, or rename one with --column"
                )
    made = {TARGET: options.targets_from, SPLIT: options.split_shares or options.split_from}
    for name, wanted in made.items():
        if wanted and name in fields:
            raise UsageError(f"{origin[name]}: has a column {name!r} already; leave away the option that makes another")
        if wanted:
            fields[name] = pa.field(name, pa.string())
    if options.table.targets_from_cls and TARGET not in fields:
        raise UsageError(f"{sources[0].path}: --targets-from cls is for tar shards")
    _check_one_kind(sources)
    order = [name for name in _FIRST_COLUMNS if name in fields]
    schema = pa.schema([fields[name] for name in [*order, *(name for name in fields if name not in order)]])
    for problem in schema_problems(schema, sources[0].path):
        hint = "; --targets-separator makes lists of strings" if f"'{TARGETS}'" in problem else ""
        raise UsageError(f"{_origin_of(problem, origin, sources)}: {problem}{hint} (--column NEW=OLD renames one)")
    return schema


def _origin_of(problem: str, origin: dict[str, str], sources: Sequence[Source]) -> str:
    return next((path for name, path in origin.items() if f"column {name!r}" in problem), sources[0].path)


def _check_one_kind(sources: Sequence[Source]) -> None:
    embedded = [source.path for source in sources if BYTES in source.schema.names]
    named = [source.path for source in sources if BYTES not in source.schema.names]
    if embedded and named:
        raise UsageError(f"{embedded[0]} embeds its images and {named[0]} does not; build a manifest of each")


def _iter_tables(sources: Sequence[Source], schema: pa.Schema, options: BuildOptions) -> Iterator[pa.Table]:
    for source in sources:
        for rows in _iter_rows(source):
            made: dict[str, pa.Array | pa.ChunkedArray] = {}
            if options.targets_from:
                made[TARGET] = pa.array(_map_uris(rows, source, _parent_name), pa.string())
            if options.split_shares:
                shares, seed = options.split_shares, options.seed
                made[SPLIT] = pa.array([draw_split(key, shares, seed) for key in _split_keys(rows)], pa.string())
            if options.split_from:
                made[SPLIT] = pa.array(_folder_splits(rows, source), pa.string())
            if IMAGE_ID in schema.names and {URI, IMAGE_ID, WINDOW} & {*rows.table.column_names} == {URI}:
                made[IMAGE_ID] = rows.table[URI]  # its default, where only other sources have ids
            columns = [
                made[name] if name in made else _column_or_nulls(rows.table, name, schema) for name in schema.names
            ]
            yield pa.table(columns, schema=schema)


def _iter_rows(source: Source) -> Iterator[SourceRows]:
    try:
        yield from source.iter_rows()
    except (OSError, pa.ArrowException) as error:  # damaged behind what opening it reads
        raise UsageError(f"{source.path}: cannot be read ({normalise_message(error)})") from error


def _column_or_nulls(table: pa.Table, name: str, schema: pa.Schema) -> pa.ChunkedArray | pa.Array:
    return table[name] if name in table.column_names else pa.nulls(table.num_rows, schema.field(name).type)


def _split_keys(rows: SourceRows) -> list[str]:
    """What the split is drawn from: the image_id, else the uri as the source spells it, else the image itself.

    So the splits stay when the collection moves, the windows of one raster never straddle splits, and neither do
    copies of one embedded image.
    """
    names = rows.table.column_names
    if IMAGE_ID in names and not rows.ids_are_paths:
        ids = [str(value) for value in rows.table[IMAGE_ID].to_pylist()]
        if WINDOW not in names or URI not in names:
            return ids
        are_tiles, uris = rows.table[WINDOW].is_valid().to_pylist(), rows.table[URI].to_pylist()
        return [
            _scene_of(image_id, uri) if is_tile else image_id
            for image_id, is_tile, uri in zip(ids, are_tiles, uris, strict=True)
        ]
    if rows.names is not None:
        return [str(name) for name in rows.names]
    return [hashlib.sha256(image or b"").hexdigest() for image in rows.table[BYTES].to_pylist()]


def _scene_of(image_id: str, uri: str) -> str:
    """The scene of a tile as tiling called it, else the scene's uri."""
    named = TILE_ID.fullmatch(image_id)
    return named[1] if named else uri


def _map_uris(rows: SourceRows, source: Source, function: Callable[[str], str]) -> list[str | None]:
    if URI not in rows.table.column_names:
        raise UsageError(f"{source.path}: embedded images lie in no folder, so --targets-from folder cannot name any")
    paths = rows.table[IMAGE_ID if rows.ids_are_paths else URI].to_pylist()
    return [path and function(path) for path in paths]


def _parent_name(uri: str) -> str:
    return posixpath.basename(posixpath.dirname(uri))


def split_of_folders(folders: Sequence[str]) -> str | None:
    """The split that the last of the folders known to :data:`SPLIT_FOLDERS` means, or none."""
    return next((SPLIT_FOLDERS[name] for name in reversed(folders) if name in SPLIT_FOLDERS), None)


def _folder_splits(rows: SourceRows, source: Source) -> list[str]:
    if rows.names is None:
        raise UsageError(f"{source.path}: embedded images lie in no folder, so --split-from folder cannot name any")
    splits = []
    for name in rows.names:
        folders = [rows.folder, *(name or "").split("/")[:-1]]
        split = split_of_folders(folders)
        if split is None:
            raise UsageError(
                f"{source.path}: {name}: --split-from folder needs a folder named "
                f"{', '.join(SPLIT_FOLDERS)} in every path"
            )
        splits.append(split)
    return splits
