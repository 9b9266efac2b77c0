from __future__ import annotations

import struct

import pytest

from imgbatch.core.signatures import end_is_missing, sniff_format


def tiff(order: str, *, big: bool, directory: int, size: int) -> bytes:
    """A header that says where the first directory is, and zeros."""
    mark = b"II" if order == "<" else b"MM"
    header = struct.pack(f"{order}HHHQ", 43, 8, 0, directory) if big else struct.pack(f"{order}HI", 42, directory)
    return (mark + header).ljust(size, b"\0")[:size]


@pytest.mark.parametrize("big", [False, True], ids=["plain", "BigTIFF"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_that_ends_before_its_directory_is_cut(order: str, big: bool) -> None:
    whole = tiff(order, big=big, directory=4000, size=5000)
    assert sniff_format(whole) == "TIFF"
    assert not end_is_missing(whole, "TIFF")
    for size in (4000, 1000, 12, 6):
        assert end_is_missing(whole[:size], "TIFF")
