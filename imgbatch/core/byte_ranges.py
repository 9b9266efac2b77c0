"""URIs of a part of a file, as of a member of a tar shard: ``s3://shop/000.tar#bytes=1536-22015``."""

from __future__ import annotations

import re
from typing import NamedTuple

_RANGED = re.compile(r"(?is)(.+\.tar)#bytes=(\d{1,18})-(\d{1,18})")


class ByteRange(NamedTuple):
    """Bytes ``first`` to ``last`` of a file, both from 0 and both of them in it, as HTTP counts.

    Of a part without bytes, ``last`` is the byte before ``first``.
    """

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    @property
    def header(self) -> str:
        """The value of HTTP's ``Range``."""
        return f"bytes={self.first}-{self.last}"


def ranged_uri(uri: str, byte_range: ByteRange) -> str:
    """The URI of a part of ``uri``, a tar file."""
    return f"{uri}#{byte_range.header}"


def split_range(uri: str) -> tuple[str, ByteRange | None]:
    """The file that ``uri`` names, and which part of it; none: all of it."""
    # Two searches in every uri of every night, so the cheap one first.
    match = _RANGED.fullmatch(uri) if "#bytes=" in uri else None
    if match is None:
        return uri, None
    found = ByteRange(int(match[2]), int(match[3]))
    return (match[1], found) if found.size >= 0 else (uri, None)
