"""Tar shards, as WebDataset has them, as a source of manifests: members stay where they are and are read in place.

A row's uri says which bytes of the shard are the image. Members of one sample stand together and share their name up to
its first dot; ``KEY.cls`` is its class. Listing reads through each shard once, several at a time.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import IO

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
    found: list[_Member] = []
    try:
        with storage.open_input(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            # By hand: a loop over the file would keep every header that it has seen.
            members = iter(partial(_next_member, tar), None)
            for _, sample in groupby((member for member in members if member.isreg()), key=_sample_key):
                images, target = [], None
                for member in sample:
                    if member.name.lower().endswith(IMAGE_SUFFIXES) and member.size > 0:
                        images.append(member)
                    elif with_classes and member.name.endswith(_CLASS_SUFFIX):
                        target = _read_class(tar, member)
                for image in images:
                    if image.issparse():
                        raise UsageError(f"{shard}: {image.name} is a sparse member, which is not read in place")
                    if not any(part.startswith(".") for part in image.name.removeprefix("./").split("/")):
                        check_unicode(f"{shard}/{image.name}")
                        place = ByteRange(image.offset_data, image.offset_data + image.size - 1)
                        found.append(_Member(image.name.removeprefix("./"), place, target))
            _check_end(file, tar.offset, shard)
    except UsageError:
        raise
    except Exception as error:  # of tarfile, and every object store's client has its own
        raise UsageError(f"{shard}: no readable tar file ({normalise_message(error)})") from error
    return found


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


def _read_class(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str | None:
    content = tar.extractfile(member)
    return content.read(_CLASS_BYTES).decode().strip() or None if content else None
