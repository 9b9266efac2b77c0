"""The bytes of a raster's file, read without GDAL, which tell why GDAL cannot read it.

Of an object store GDAL says the same whether a file is damaged or the server failed for a moment. The project's own
client gets the bytes that it asks for or raises, so what GDAL cannot make of them is the file's fault.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

from imgbatch.config import StorageConfig
from imgbatch.core import s3, storage
from imgbatch.core.raster_samples import RasterRejected
from imgbatch.core.signatures import end_is_missing, tiff_directory_is_missing
from imgbatch.errors import Status

_END_BYTES = 4096


class RasterBytes(NamedTuple):
    """The first and last bytes of a file, its size in bytes, and all of it, or none."""

    head: bytes
    tail: bytes
    size: int
    data: bytes | None = None

    @classmethod
    def of(cls, data: bytes) -> RasterBytes:
        """Of a file that is in memory."""
        return cls(data[:_END_BYTES], data[-_END_BYTES:], len(data), data)

    def are_of_a_cut(self, name: str) -> bool:
        """Whether a file of the format ``name`` stops before its own end."""
        if name != "TIFF":
            return end_is_missing(self.tail, name)
        return tiff_directory_is_missing(self.head, self.size)


def read_raster_bytes(uri: str, *, max_bytes: int = 0) -> RasterBytes:
    """The ends of a local file; of an object of up to ``max_bytes`` all of it, of a larger one its ends.

    Raises:
        RasterRejected: ``NOT_FOUND``, ``FORBIDDEN`` or ``FETCH_FAILED``, after one attempt.
    """
    try:
        return _of_object(uri, max_bytes) if storage.is_s3(uri) else _of_file(uri)
    except PermissionError as error:
        raise RasterRejected(Status.FORBIDDEN, f"{type(error).__name__}: {error}") from error
    except FileNotFoundError as error:
        raise RasterRejected(Status.NOT_FOUND, f"{type(error).__name__}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # every object store's client has exceptions of its own
        raise RasterRejected(Status.FETCH_FAILED, f"{type(error).__name__}: {error}") from error


def _of_file(uri: str) -> RasterBytes:
    with storage.open_input(uri) as file:
        head = file.read(_END_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        return RasterBytes(head, file.read(_END_BYTES), size)


def _of_object(uri: str, max_bytes: int) -> RasterBytes:
    fs = _filesystem(storage.settings())
    size = int(fs.info(uri)["size"])
    if size <= max_bytes:
        # s3fs asks for the size once more unless it may not split the request.
        return RasterBytes.of(_whole(fs.cat_file(uri, max_concurrency=1), size))
    length = min(size, _END_BYTES)
    head, tail = (_whole(fs.cat_file(uri, start=start, end=start + length), length) for start in (0, size - length))
    return RasterBytes(head, tail, size)


@lru_cache(maxsize=1)
def _filesystem(settings: StorageConfig) -> Any:
    """Of one attempt for each request: GDAL has made several by then."""
    return s3.open_filesystem(settings, attempts=1)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"{len(data)} bytes came of {size}")
    return data
