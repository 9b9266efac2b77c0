"""What a file is by its first bytes, and whether its end is there: tells why Pillow could not open it."""

from __future__ import annotations

from typing import Literal

_PREFIXES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\x01\0", "ICO"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"8BPS", "PSD"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"qoif", "QOI"),
    (b"farbfeld", "farbfeld"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\x1f\xa0", "SGI"),
    (b"\x01\xda", "SGI"),
    (b"\x59\xa6\x6a\x95", "Sun raster"),
)
_ISO_MEDIA_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF"}
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"


def sniff_format(data: bytes) -> str | None:
    """The image format that ``data`` claims to be, by Pillow's name where it has one; none: not an image.

    TGA of version 1 has no signature; a header in which every field is plausible passes for one.
    """
    for prefix, name in _PREFIXES:
        if data.startswith(prefix):
            return name
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return _ISO_MEDIA_BRANDS.get(data[8:12])
    if data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        return "PPM"
    if data.endswith(_TGA_FOOTER) or _looks_like_tga(data):
        return "TGA"
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<svg", b"<?xml")) and b"<svg" in data[:1024]:
        return "SVG"
    return None


def _looks_like_tga(data: bytes) -> bool:
    if len(data) < 18:
        return False
    width, height = int.from_bytes(data[12:14], "little"), int.from_bytes(data[14:16], "little")
    known = data[1] in (0, 1) and data[2] in (1, 2, 3, 9, 10, 11) and data[16] in (8, 15, 16, 24, 32)
    return known and width > 0 and height > 0


def end_is_missing(data: bytes, name: str) -> bool:
    """Whether a file of format ``name`` stops before its own end, as an interrupted copy does.

    False where the format states neither a length nor an end (TIFF keeps its directory anywhere).
    """
    match name:
        case "JPEG":
            return b"\xff\xd9" not in data.rstrip(b"\0")[-64:]
        case "PNG":
            return b"IEND" not in data[-64:]
        case "GIF":
            return not data.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return len(data) < 12 or int.from_bytes(data[4:8], "little") + 8 > len(data)
        case "BMP":
            return len(data) < 26 or int.from_bytes(data[2:6], "little") > len(data)
        case "TIFF":
            return tiff_directory_is_missing(data, len(data))
    return False


def tiff_directory_is_missing(head: bytes, size: int) -> bool:
    """Whether a TIFF or BigTIFF of ``size`` bytes, which begins with ``head``, ends before its first directory does."""
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    start, end = (8, 16) if head[2:4] in (b"+\0", b"\0+") else (4, 8)
    return size < end or int.from_bytes(head[start:end], order) >= size
