"""What a manifest is built from: folders and globs of images, single images, tar shards, CSV or TSV lists, and Parquet.

Every source knows its columns before it is read, and streams its rows in one fixed order.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import posixpath
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, NamedTuple, Protocol, cast

import pyarrow as pa
from fsspec.utils import glob_translate

from imgbatch.core import storage
from imgbatch.core.parquet import BATCH_ROWS, SUFFIX, ParquetDataset, open_dataset
from imgbatch.core.storage import FileInfo
from imgbatch.errors import UsageError, normalise_message
from imgbatch.schema import ETAG, SIZE, TARGETS, URI

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".j2k")
"""What is an image in a folder or glob, whatever the case."""

LIST_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")

SHARD_SUFFIX = ".tar"
COMPRESSED_SHARD_SUFFIXES = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")

_MAGIC = re.compile(r"[*?\[]")


class SourceRows(NamedTuple):
    """Some rows of a source: ``table``, and each row's uri as the source itself spells it, where it has one.

    ``names`` are paths below the folder that was listed, or the cells of a list: they stay the same when the
    collection moves. ``folder`` is the name of the folder that was listed. ``ids_are_paths``: the uris say nothing of
    folders, but the source's ``image_id``, which it made, is the image's path.
    """

    table: pa.Table
    names: list[str | None] | None
    folder: str = ""
    ids_are_paths: bool = False


class Source(Protocol):
    """Something that a manifest can be built from."""

    @property
    def path(self) -> str:
        """Absolute, or a URI."""

    @property
    def schema(self) -> pa.Schema:
        """The manifest's columns that the source has, plain types."""

    def iter_rows(self) -> Iterator[SourceRows]:
        """Raises :class:`UsageError` at a row that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How the columns of CSV and Parquet become a manifest's.

    Relative uris are resolved against ``root``, or else against the folder that the list lies in. With
    ``targets_separator`` the strings of ``targets`` become lists; an empty one is an image of no class.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    """The manifest's name to the source's name; columns that are not named here keep theirs."""
    root: str | None = None
    targets_separator: str | None = None
    targets_from_cls: bool = False
    """Tar shards: the class is what the member ``KEY.cls`` beside an image says."""

    def rename(self, path: str, names: Iterable[str]) -> dict[str, str]:
        """The source's names to the manifest's, in order; raises :class:`UsageError`."""
        names = list(names)
        for new, old in self.columns.items():
            if old not in names:
                raise UsageError(f"--column {new}={old}: {path} has no column {old!r} (columns: {', '.join(names)})")
        new_names = {old: new for new, old in self.columns.items()}
        renamed = {name: new_names.get(name, name) for name in names}
        for new, old in self.columns.items():
            if list(renamed.values()).count(new) > 1:
                raise UsageError(
                    f"--column {new}={old}: {path} has a column {new!r} as well; "
                    f"rename that too, like --column old_{new}={new}"
                )
        return renamed


def open_sources(paths: Iterable[str], options: TableOptions, *, leave_out: str | None = None) -> list[Source]:
    """The sources that ``paths`` name, in their order; a glob of lists or Parquet files stands for each of them.

    Raises:
        UsageError: nothing there, of no known kind, or without a column that ``options`` name.
    """
    sources: list[Source] = []
    for path in paths:
        sources.extend(_open_source(_normal(path), path, options, leave_out and _normal(leave_out)))
    return sources


def _open_source(path: str, given: str, options: TableOptions, leave_out: str | None) -> Iterator[Source]:
    # Which builds upon this module.
    from imgbatch.core.manifest_shards import TarShards

    lowered = path.lower()
    if lowered.endswith(COMPRESSED_SHARD_SUFFIXES):
        raise UsageError(f"{given}: images are read in place, which a compressed shard does not allow; make it a .tar")
    if _MAGIC.search(path) and not _exists(path):
        root, pattern = _split_glob(path)
        if lowered.endswith(SHARD_SUFFIX):
            yield TarShards(root, pattern, options.targets_from_cls)
            return
        if not lowered.endswith((*LIST_SUFFIXES, SUFFIX)):
            yield ImageFolder(root, pattern)
            return
        matches = list(iter_matches(root, pattern))
        if not matches:
            raise UsageError(f"{given}: no file matches")
        for info in matches:
            if info.uri != leave_out:
                yield from _open_source(info.uri, info.uri, options, leave_out)
    elif not _exists(path):
        raise UsageError(f"{given}: there is no such file or directory")
    elif lowered.endswith(LIST_SUFFIXES):
        yield ListFile(path, options)
    elif lowered.endswith(SUFFIX) or _holds_parquet(path, leave_out):
        yield ParquetTable(open_dataset(path), options)
    elif lowered.endswith(SHARD_SUFFIX) and storage.is_file(path):
        yield TarShards(path, None, options.targets_from_cls)
    elif lowered.endswith(IMAGE_SUFFIXES) and storage.is_file(path):
        yield ImageFile(path)
    elif storage.is_file(path):
        known = ", ".join((*LIST_SUFFIXES, SUFFIX, SHARD_SUFFIX, *IMAGE_SUFFIXES))
        raise UsageError(f"{given}: of no known kind ({known})")
    else:
        yield ImageFolder(path)


OBJECT_COLUMNS = pa.schema([(SIZE, pa.int64()), (ETAG, pa.string())])
"""What an object store's listing knows, by which a later run sees that an object changed."""
_URI_SCHEMA = pa.schema([(URI, pa.string())])
_OBJECT_SCHEMA = pa.schema([*_URI_SCHEMA, *OBJECT_COLUMNS])


def _image_schema(path: str) -> pa.Schema:
    return _OBJECT_SCHEMA if storage.is_s3(path) else _URI_SCHEMA


@dataclass(frozen=True)
class ImageFile:
    """One image, as when a shell expands a glob."""

    path: str

    @property
    def schema(self) -> pa.Schema:
        return _image_schema(self.path)

    def iter_rows(self) -> Iterator[SourceRows]:
        folder, name = posixpath.split(self.path)
        yield _image_rows([storage.file_info(self.path)], [name], posixpath.basename(folder), self.schema)


@dataclass(frozen=True)
class ImageFolder:
    """The images below a folder, at any depth, or those that match a glob; hidden ones are left out."""

    path: str
    pattern: str = "**"

    @property
    def schema(self) -> pa.Schema:
        return _image_schema(self.path)

    def iter_rows(self) -> Iterator[SourceRows]:
        prefix = storage.listing_prefix(self.path)
        found = iter_matches(self.path, self.pattern)
        images = (info for info in found if info.uri.lower().endswith(IMAGE_SUFFIXES))
        while batch := list(islice(images, BATCH_ROWS)):
            names = [info.uri.removeprefix(prefix) for info in batch]
            yield _image_rows(batch, names, posixpath.basename(prefix.rstrip("/")), self.schema)


class ListFile:
    """CSV or TSV, UTF-8, perhaps gzipped; the first line names the columns.

    Every column is strings, so that an id like 0012 stays what it is; an empty cell is null.
    """

    def __init__(self, path: str, options: TableOptions) -> None:
        self.path = path
        self._options = options
        header = next(self._iter_lines(), None)
        if header is None:
            raise UsageError(f"{path}: empty; the first line must name the columns")
        self._renamed = options.rename(path, header)
        if len(self._renamed) < len(header) or "" in header:
            raise UsageError(f"{path} line 1: every column needs a name of its own")
        if URI not in self._renamed.values():
            raise UsageError(
                f"{path}: no column {URI!r}; say which one holds the images with --column {URI}=NAME "
                f"(columns: {', '.join(header)})"
            )
        self.schema = _table_schema(((name, pa.string()) for name in self._renamed.values()), options)

    def iter_rows(self) -> Iterator[SourceRows]:
        lines = self._iter_lines()
        next(lines)
        while batch := list(islice(lines, BATCH_ROWS)):
            columns = [[cell or None for cell in column] for column in zip(*batch, strict=True)]
            table = pa.table([pa.array(column, pa.string()) for column in columns], names=list(self._renamed.values()))
            yield _table_rows(table, self.schema, _folder_of(self.path), self._options)

    def _iter_lines(self) -> Iterator[list[str]]:
        delimiter = "\t" if self.path.lower().endswith((".tsv", ".tsv.gz")) else ","
        width = line = 0
        try:
            with _open_text(self.path) as text:
                reader = csv.reader(text, delimiter=delimiter, strict=True)
                for cells in reader:
                    line = reader.line_num
                    width = width or len(cells)
                    if cells and len(cells) != width:
                        raise UsageError(
                            f"{self.path} line {line}: {len(cells)} fields, but the first line has {width}"
                        )
                    if cells:
                        yield cells
        except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{self.path} line {line + 1}: {normalise_message(error)}") from error


class ParquetTable:
    """A Parquet file or a directory of them, with uris or embedded images."""

    def __init__(self, data: ParquetDataset, options: TableOptions) -> None:
        self.path = data.path
        self._data = data
        self._options = options
        self._renamed = options.rename(data.path, data.schema.names)
        self.schema = _table_schema(((self._renamed[column.name], column.type) for column in data.schema), options)

    def iter_rows(self) -> Iterator[SourceRows]:
        is_directory = self._data.files[0].uri != self.path
        folder = self.path if is_directory else _folder_of(self.path)
        for table in self._data.iter_batches():
            renamed = table.rename_columns([self._renamed[name] for name in table.column_names])
            yield _table_rows(renamed, self.schema, folder, self._options)


def resolve(folder: str, uri: str) -> str:
    """``uri`` made absolute: a relative one lies below ``folder``, which may be a URI itself; ``s3a://`` is ``s3://``.

    Repeated slashes are one in a path, and belong to the key in an object store.
    """
    if "://" in uri:
        return f"s3://{uri[len('s3a://') :]}" if uri.startswith("s3a://") else uri
    scheme, separator, path = folder.rpartition("://")
    if separator and not uri.startswith("/"):
        return scheme + separator + _without_dots(f"{path}/{uri}")
    return posixpath.normpath(posixpath.join(path, uri))


def _without_dots(path: str) -> str:
    """A bucket and a key without the segments ``.`` and ``..``, which do not lead out of the bucket."""
    bucket, *segments = path.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/".join([bucket, *kept])


def _folder_of(path: str) -> str:
    return posixpath.dirname(path) if storage.is_local(path) else path.rpartition("/")[0]


@contextlib.contextmanager
def _open_text(path: str) -> Iterator[IO[str]]:
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(storage.open_input(path))
        if path.lower().endswith(".gz"):
            stream = stack.enter_context(cast(IO[bytes], gzip.GzipFile(fileobj=stream)))
        yield stack.enter_context(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""))


def _table_schema(fields: Iterable[tuple[str, pa.DataType]], options: TableOptions) -> pa.Schema:
    schema = pa.schema(list(fields))
    if options.targets_separator and TARGETS in schema.names:
        index = schema.get_field_index(TARGETS)
        schema = schema.set(index, pa.field(TARGETS, pa.list_(pa.string())))
    return schema


def _table_rows(table: pa.Table, schema: pa.Schema, folder: str, options: TableOptions) -> SourceRows:
    names = None
    if URI in table.column_names and pa.types.is_string(table.schema.field(URI).type):
        names = table[URI].to_pylist()
        root = _normal(options.root) if options.root else folder
        uris = [name and resolve(root, name) for name in names]
        table = table.set_column(table.schema.get_field_index(URI), URI, pa.array(uris, pa.string()))
    if options.targets_separator and TARGETS in table.column_names:
        lists = [_split(text, options.targets_separator) for text in table[TARGETS].to_pylist()]
        index = table.schema.get_field_index(TARGETS)
        table = table.set_column(index, TARGETS, pa.array(lists, pa.list_(pa.string())))
    return SourceRows(table.cast(schema), names)


def _split(text: str | list[str] | None, separator: str) -> list[str]:
    parts = text if isinstance(text, list) else (text or "").split(separator)
    return [part.strip() for part in parts if part.strip()]


def _image_rows(images: Sequence[FileInfo], names: list[str], folder: str, schema: pa.Schema) -> SourceRows:
    columns = {
        URI: [info.uri for info in images],
        SIZE: [info.size for info in images],
        ETAG: [info.version for info in images],
    }
    table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
    return SourceRows(table, [*names], folder)


def iter_matches(root: str, pattern: str) -> Iterator[FileInfo]:
    """The files below ``root`` that match a glob, hidden ones left out; raises :class:`UsageError`."""
    prefix = storage.listing_prefix(root)
    matches = re.compile(glob_translate(pattern)).match
    try:
        for info in storage.iter_files(root, follow_links=True):
            name = info.uri.removeprefix(prefix)
            if not matches(name) or any(part.startswith(".") for part in name.split("/")):
                continue
            if not name.isascii():
                check_unicode(info.uri)
            yield info
    except UsageError:
        raise
    except Exception as error:  # every object store's client has exceptions of its own
        raise UsageError(f"{root}: cannot be listed ({normalise_message(error)})") from error


def check_unicode(uri: str) -> None:
    """Raises :class:`UsageError` for a file whose name is not UTF-8, which no column of strings holds."""
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{uri!a}: the file's name is not UTF-8; rename it") from error


def _split_glob(path: str) -> tuple[str, str]:
    first = _MAGIC.search(path)
    slash = path.rfind("/", 0, first.start() if first else len(path))
    return path[:slash] or "/", path[slash + 1 :]


def _normal(path: str) -> str:
    absolute = storage.absolute(path)
    return posixpath.normpath(absolute) if storage.is_local(path) else absolute


def _exists(path: str) -> bool:
    try:
        return storage.exists(path)
    except UsageError:
        raise
    except Exception as error:  # as in iter_matches
        raise UsageError(f"{path}: cannot be read ({normalise_message(error)})") from error


def _holds_parquet(path: str, leave_out: str | None) -> bool:
    """Raises :class:`UsageError` for a folder that holds images too: one or the other would be missing."""
    ignored = storage.filesystem(leave_out)[1] if leave_out else None
    names = [name for name in _names_in(path) if name != ignored]
    tables = [name for name in names if name.endswith(SUFFIX)]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if tables and images:
        raise UsageError(
            f"{path}: holds images and Parquet files ({posixpath.basename(tables[0])}); name those that are meant with "
            f"a glob, like '{path.rstrip('/')}/*{posixpath.splitext(images[0])[1]}'"
        )
    return bool(tables)


def _names_in(path: str) -> list[str]:
    """What lies directly in a folder; in a bucket the first page of it, for it may be millions of objects."""
    fs, inner = storage.filesystem(path)
    if not storage.is_s3(path):
        return fs.ls(inner, detail=False) if fs.isdir(inner) else []
    bucket, key, _ = fs.split_path(inner)
    page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{key}/" if key else "", Delimiter="/")
    found = [entry["Key"] for entry in page.get("Contents", ())]
    found += [entry["Prefix"].rstrip("/") for entry in page.get("CommonPrefixes", ())]
    return [f"{bucket}/{name}" for name in found]
