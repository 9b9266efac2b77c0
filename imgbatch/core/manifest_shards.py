"""Tar shards, as WebDataset has them, as a source of manifests: members stay where they are and are read in place.

A row's uri says which bytes of the shard are the image. Members of one sample stand together and share their name up to
its first dot; ``KEY.cls`` is its class. Listing reads through each shard once, several at a time.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import IO, NamedTuple

import pyarrow as pa

from imgbatch.core import storage
from imgbatch.core.byte_ranges import ByteRange, ranged_uri
from imgbatch.core.manifest_sources import IMAGE_SUFFIXES, SourceRows, check_unicode, iter_matches
from imgbatch.core.storage import FileInfo
from imgbatch.errors import UsageError, normalise_message
from imgbatch.schema import ETAG, IMAGE_ID, SIZE, TARGET, URI

_CLASS_SUFFIX = ".cls"
_CLASS_BYTES = 1024
_CHUNK_BYTES = 1 << 20
_SHARDS_AT_ONCE = 8
_MAX_LINKS = 40
"""From link to link, as Linux follows them."""

_Place = ByteRange | str
"""Bytes of the shard, or the name of the member that has them."""


@dataclass(frozen=True)
class _Member:
    name: str
    byte_range: ByteRange
    target: str | None


@dataclass(frozen=True)
class TarShards:
    """The images in a tar file, or in those below ``path`` that match ``pattern``."""

    path: str
    pattern: str | None = None
    with_classes: bool = False
    """Whether ``KEY.cls`` becomes the target; null where a sample has none."""

    @property
    def schema(self) -> pa.Schema:
        fields = [(URI, pa.string()), (IMAGE_ID, pa.string())]
        if storage.is_s3(self.path):
            fields += [(SIZE, pa.int64()), (ETAG, pa.string())]
        return pa.schema([*fields, *([(TARGET, pa.string())] if self.with_classes else [])])

    def iter_rows(self) -> Iterator[SourceRows]:
        """The rows of one shard at a time, in the shards' order and in theirs."""
        if self.pattern is None:
            shards = iter([storage.file_info(self.path)])
            folder = posixpath.dirname(self.path)
        else:
            shards = iter_matches(self.path, self.pattern)
            folder = self.path
        prefix = storage.listing_prefix(folder)
        read = partial(_read_members, with_classes=self.with_classes)
        ahead: deque[tuple[FileInfo, Future[list[_Member]]]] = deque()
        with ThreadPoolExecutor(_SHARDS_AT_ONCE if not storage.is_local(self.path) else 1) as pool:
            for shard in shards:
                ahead.append((shard, pool.submit(read, shard.uri)))
                if len(ahead) > _SHARDS_AT_ONCE:
                    yield self._rows(*ahead.popleft(), prefix)
            while ahead:
                yield self._rows(*ahead.popleft(), prefix)

    def _rows(self, shard: FileInfo, read: Future[list[_Member]], prefix: str) -> SourceRows:
        members = read.result()
        columns = {
            URI: [ranged_uri(shard.uri, member.byte_range) for member in members],
            IMAGE_ID: [f"{shard.uri}/{member.name}" for member in members],
            SIZE: [member.byte_range.size for member in members],
            ETAG: [shard.version] * len(members),
            TARGET: [member.target for member in members],
        }
        schema = self.schema
        table = pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
        names: list[str | None] = [f"{shard.uri.removeprefix(prefix)}/{member.name}" for member in members]
        return SourceRows(table, names, posixpath.basename(prefix.rstrip("/")), ids_are_paths=True)


def _read_members(shard: str, *, with_classes: bool) -> list[_Member]:
    """The images of a shard; raises :class:`UsageError`."""
    try:
        with storage.open_input(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            contents = _Contents(shard, file)
            entries = list(_iter_entries(tar, contents, with_classes=with_classes))
            _check_end(file, tar.offset, shard)
            return [member for _, sample in groupby(entries, _sample) for member in _sample_members(sample, contents)]
    except UsageError:
        raise
    except Exception as error:  # of tarfile, and every object store's client has its own
        raise UsageError(f"{shard}: no readable tar file ({normalise_message(error)})") from error


class _Entry(NamedTuple):
    """A member that is an image or a class, or a link to one."""

    sample: int
    """Ordinal of the run of members whose names are alike up to their first dot."""
    name: str
    place: _Place

    @property
    def is_image(self) -> bool:
        return self.name.lower().endswith(IMAGE_SUFFIXES)


_sample = attrgetter("sample")


def _iter_entries(tar: tarfile.TarFile, contents: _Contents, *, with_classes: bool) -> Iterator[_Entry]:
    # By hand: a loop over the file would keep every header that it has seen.
    members = iter(partial(_next_member, tar), None)
    files = (member for member in members if member.isreg() or member.islnk() or member.issym())
    for number, (_, sample) in enumerate(groupby(files, _sample_key)):
        for member in sample:
            place = contents.add(member)
            entry = _Entry(number, member.name, place)
            if entry.is_image:
                yield entry
            elif with_classes and member.name.endswith(_CLASS_SUFFIX):
                if isinstance(place, ByteRange):
                    contents.read_class(place)  # now, where the file is being read anyhow
                yield entry


def _sample_members(sample: Iterable[_Entry], contents: _Contents) -> Iterator[_Member]:
    images, target = [], None
    for entry in sample:
        if entry.is_image:
            images.append(entry)
        else:
            target = contents.read_class(contents.find(entry))
    for image in images:
        name = image.name.removeprefix("./")
        if any(part.startswith(".") for part in name.split("/")):
            continue
        check_unicode(f"{contents.shard}/{image.name}")
        yield _Member(name, contents.find(image), target)


class _Contents:
    """Where the files of a shard lie, by the names of its members: a link lies where what it names does.

    tar writes a file of several names once, and a hard link for each of the other names.
    """

    def __init__(self, shard: str, file: IO[bytes]) -> None:
        self.shard = shard
        self._file = file
        self._places: dict[str, _Place] = {}
        self._sparse: set[ByteRange] = set()
        self._classes: dict[ByteRange, str | None] = {}

    def add(self, member: tarfile.TarInfo) -> _Place:
        """Where a member lies; the name of another one where it is a link to one that may follow."""
        place: _Place
        if member.isreg():
            place = ByteRange(member.offset_data, member.offset_data + member.size - 1)
            if member.issparse():
                self._sparse.add(place)
        else:
            folder = posixpath.dirname(member.name) if member.issym() else ""
            target = posixpath.normpath(posixpath.join(folder, member.linkname))
            # A hard link names the member of that name so far, even if another of the name follows.
            place = self._places.get(target, target) if member.islnk() else target
        self._places[posixpath.normpath(member.name)] = place
        return place

    def find(self, entry: _Entry) -> ByteRange:
        """Where an image or a class lies, once every member is known; raises :class:`UsageError`."""
        place: _Place | None = entry.place
        for _ in range(_MAX_LINKS):
            if not isinstance(place, str):
                break
            place = self._places.get(place)
        if not isinstance(place, ByteRange):
            raise UsageError(
                f"{self.shard}: {entry.name} is a link to {entry.place}, which is no file in the shard; "
                "make the shard again with tar --dereference"
            )
        if place in self._sparse:
            raise UsageError(f"{self.shard}: {entry.name} is a sparse member, which is not read in place")
        return place

    def read_class(self, place: ByteRange) -> str | None:
        """The class that the content at ``place`` names, read once; links from every sample may name the same."""
        if place not in self._classes:
            self._file.seek(place.first)
            content = self._file.read(min(place.size, _CLASS_BYTES))
            self._classes[place] = content.decode().strip() or None
        return self._classes[place]


def _check_end(file: IO[bytes], end: int, shard: str) -> None:
    """Raises :class:`UsageError` where the headers ended at byte ``end`` and something follows: tarfile stops silently.

    At a damaged header, that is, and at the end of the first of several archives in one file.
    """
    file.seek(end)
    place = end
    while chunk := file.read(_CHUNK_BYTES):
        if rest := chunk.lstrip(b"\0"):
            raise UsageError(
                f"{shard}: no readable member header at byte {end}, but data at byte {place + len(chunk) - len(rest)}; "
                "make the shard again (several archives in one file are not read)"
            )
        place += len(chunk)


def _next_member(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    member = tar.next()
    tar.members = []  # type: ignore[attr-defined]
    return member


def _sample_key(member: tarfile.TarInfo) -> str:
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])
