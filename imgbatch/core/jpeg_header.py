"""What a JPEG's markers say before its pixels: whether any decoder will make the same of it.

Markers and frame header: ITU-T T.81, annex B. Adobe's segment: Adobe Technical Note 5116.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from imgbatch.core.signatures import end_is_missing

_START, _START_OF_SCAN, _APP1, _ADOBE = 0xD8, 0xDA, 0xE1, 0xEE
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_OTHER_FRAMES = frozenset({0xC1, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_YCBCR = 1
"""Adobe's code for how three components are coded; 0 is RGB."""
_XMP_TURNED = re.compile(rb'tiff:Orientation(="|>)[^1]')
"""As Pillow looks for it, where EXIF says nothing."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Of a JPEG without peculiarities: grey or YCbCr, 8 bits, baseline or progressive, upright, with an end."""

    width: int
    """px."""
    height: int
    """px."""


def read_plain_header(data: bytes) -> JpegHeader | None:
    """The header of such a JPEG; none for every other file."""
    header = None
    for marker, segment in _segments(data):
        if marker in (_BASELINE, _PROGRESSIVE):
            if len(segment) < 6 or segment[0] != 8 or segment[5] not in (1, 3):
                return None
            # Where no other marker says how colours are coded, libjpeg takes components of these names for RGB.
            if segment[6::3][:3] == b"RGB":
                return None
            header = JpegHeader(int.from_bytes(segment[3:5]), int.from_bytes(segment[1:3]))
        elif (
            marker in _OTHER_FRAMES
            or (marker == _ADOBE and segment[:5] == b"Adobe" and segment[11:12] != bytes([_YCBCR]))
            or (marker == _APP1 and segment[:6] == b"Exif\0\0" and not _is_upright(segment))
            or (marker == _APP1 and _XMP_TURNED.search(segment))
        ):
            return None
    if header is None or not header.width or not header.height or end_is_missing(data, "JPEG"):
        return None
    return header


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and contents of each segment before the first scan; ends early where they do not follow each other."""
    if data[:2] != bytes([0xFF, _START]):
        return
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == _START_OF_SCAN:
            return
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def _is_upright(segment: bytes) -> bool:
    # Only now: most decode actors get along without Pillow.
    from PIL import ExifTags, Image

    exif = Image.Exif()
    try:
        exif.load(segment)
        return exif.get(ExifTags.Base.Orientation, 1) == 1
    except Exception:
        # Damaged metadata: what it says is for one decoder to settle.
        return False
