"""Files that go wrong, made by code, and what each of them is to become; SECURITY.md shows the same list."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from imgbatch.errors import Status
from tests.core.encoding import GREY, encode

SIZE = (64, 48)


@dataclass(frozen=True)
class BadInput:
    """One kind of file: a name for people, its bytes, and the outcome."""

    name: str
    make: Callable[[], bytes]
    status: Status


def photograph() -> Image.Image:
    """Noise on a gradient of 64 x 48 px."""
    noise_HWC = np.random.default_rng(0).integers(0, 15, (SIZE[1], SIZE[0], 3))
    ramp_HWC = np.linspace(0, 200, SIZE[0])[None, :, None] * (1.0, 0.7, 0.4)
    return Image.fromarray((ramp_HWC + noise_HWC).astype(np.uint8))


ENCODINGS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF jpeg": {"compression": "jpeg"},
}
"""Format and variant to options of Pillow's writer."""


def encoded(name: str) -> bytes:
    """The photograph in one of :data:`ENCODINGS`."""
    return encode(photograph(), name.split()[0], **ENCODINGS[name])


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, colour_type: int, samples: bytes, *chunks: bytes) -> bytes:
    """A PNG without the help of a library; ``samples`` are its scan lines, ``chunks`` stand before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = [png_chunk(b"IHDR", header), *chunks, png_chunk(b"IDAT", zlib.compress(samples)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def deep_png(colour_type: int, *samples: int) -> bytes:
    """9 x 9 px of one colour of 16-bit ``samples``."""
    line = b"\0" + struct.pack(f">{len(samples)}H", *samples) * 9
    return png(9, 9, 16, colour_type, line * 9)


def patched(data: bytes, at: int, content: bytes) -> bytes:
    return data[:at] + content + data[at + len(content) :]


_JPEG_SIZE = b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", SIZE[1], SIZE[0])


def sized_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header states another size than its data have."""
    return encoded("JPEG").replace(_JPEG_SIZE, _JPEG_SIZE[:5] + struct.pack(">HH", height, width), 1)


def tiff_with(tag: int, value: int) -> bytes:
    """A TIFF in whose directory ``tag`` says ``value``."""
    data = encoded("TIFF")
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    for at in range(directory + 2, directory + 2 + 12 * entries, 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            return patched(data, at + 8, struct.pack("<I", value))
    raise ValueError(f"no tag {tag}")


def looping_tiff() -> bytes:
    """A TIFF whose directory names itself as the next one."""
    data = encoded("TIFF")
    (directory,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, directory)
    return patched(data, directory + 2 + 12 * entries, struct.pack("<I", directory))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def float_tiff(*samples: float) -> bytes:
    """A column of each of the samples, 4 px high."""
    return encode(Image.fromarray(np.array([samples] * 4, np.float32)), "TIFF")


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (10, 10), colour) for colour in (GREY, (255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


_ZEROS = bytes(100_000_000)


def with_bomb(kind: bytes) -> bytes:
    """A PNG of 4 x 4 px beside 100 MB of zeros, packed, in a chunk of text or of a colour profile."""
    return png(4, 4, 8, 2, bytes(52), png_chunk(kind, b"k\0\0" + zlib.compress(_ZEROS)))


BAD_INPUTS = [
    BadInput("no bytes at all", bytes, Status.EMPTY),
    BadInput("nothing but zero bytes", lambda: bytes(1000), Status.NOT_AN_IMAGE),
    BadInput("an HTML page saved as .jpg", lambda: b"<!DOCTYPE html><html></html>", Status.NOT_AN_IMAGE),
    BadInput(
        "an object store's error (XML) saved as .jpg",
        lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        Status.NOT_AN_IMAGE,
    ),
    BadInput("a zip archive", lambda: b"PK\x03\x04" + bytes(50), Status.NOT_AN_IMAGE),
    BadInput("a pickle", lambda: b"\x80\x04\x95" + bytes(40), Status.NOT_AN_IMAGE),
    BadInput("bytes before a JPEG's first", lambda: b"xx" + encoded("JPEG"), Status.NOT_AN_IMAGE),
    BadInput("SVG", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', Status.UNSUPPORTED_FORMAT),
    BadInput("AVIF", lambda: b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(64), Status.UNSUPPORTED_FORMAT),
    BadInput("HEIC", lambda: b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64), Status.UNSUPPORTED_FORMAT),
    BadInput(
        "a 12-bit JPEG",
        lambda: encoded("JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c", 1),
        Status.UNSUPPORTED_FORMAT,
    ),
    BadInput("144 megapixels in 18 kB", lambda: encode(Image.new("1", (12000, 12000)), "PNG"), Status.TOO_LARGE),
    BadInput("a header that claims 4 gigapixels", lambda: png(65535, 65535, 8, 2, b""), Status.TOO_LARGE),
    BadInput("a TIFF that claims a width of 2 billion", lambda: tiff_with(256, 2**31), Status.TOO_LARGE),
    BadInput("a PNG's text that unpacks to 100 MB", lambda: with_bomb(b"zTXt"), Status.CORRUPT),
    BadInput("a colour profile that unpacks to 100 MB", lambda: with_bomb(b"iCCP"), Status.CORRUPT),
    BadInput("pixels that unpack to 100 MB more than the header says", lambda: png(4, 4, 8, 2, _ZEROS), Status.OK),
    BadInput("a JPEG cut after its first 20 bytes", lambda: encoded("JPEG")[:20], Status.TRUNCATED),
    BadInput("a JPEG larger than its data", lambda: sized_jpeg(1024, 768), Status.CORRUPT),
    BadInput("a JPEG of 0 x 0", lambda: sized_jpeg(0, 0), Status.CORRUPT),
    BadInput("zeros in the middle of a JPEG", lambda: patched(encoded("JPEG"), 441, bytes(200)), Status.CORRUPT),
    BadInput("a PNG of 0 x 0", lambda: png(0, 0, 8, 2, b""), Status.CORRUPT),
    BadInput("a PNG of 7 bits", lambda: png(4, 4, 7, 2, bytes(60)), Status.CORRUPT),
    BadInput("a palette PNG without a palette", lambda: png(4, 4, 8, 3, bytes(20)), Status.CORRUPT),
    BadInput("a PNG chunk whose checksum is wrong", lambda: patched(encoded("PNG"), 40, b"\xaa"), Status.CORRUPT),
    BadInput("a BMP of 0 x 0", lambda: patched(encoded("BMP"), 18, bytes(8)), Status.CORRUPT),
    BadInput("a TIFF whose strips lie past its end", lambda: tiff_with(273, 10**8), Status.TRUNCATED),
    BadInput(
        "a TIFF whose directory lies past its end", lambda: patched(encoded("TIFF"), 4, b"\0\0\0\x10"), Status.TRUNCATED
    ),
    BadInput("a TIFF whose directories form a ring", looping_tiff, Status.OK),
    BadInput("bytes after an image's last", lambda: encoded("JPEG") + b"garbage" * 100, Status.OK),
    BadInput("an image of 1 x 1", lambda: encode(Image.new("RGB", (1, 1), GREY), "PNG"), Status.OK),
    BadInput("an image of 1 x 65,535", lambda: encode(Image.new("RGB", (1, 65535), GREY), "PNG"), Status.OK),
    BadInput(
        "64 kB of EXIF",
        lambda: encode(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(65000)),
        Status.OK,
    ),
    BadInput("a colour profile of 1 MB", lambda: encode(photograph(), "JPEG", icc_profile=bytes(10**6)), Status.OK),
    BadInput("a progressive JPEG", lambda: encoded("JPEG progressive"), Status.OK),
    BadInput("a CMYK JPEG", lambda: encode(photograph().convert("CMYK"), "JPEG"), Status.OK),
    BadInput("a photograph that EXIF turns", lambda: encode(photograph(), "JPEG", exif=turned(6)), Status.OK),
    BadInput("a palette PNG", lambda: encode(photograph().quantize(16), "PNG"), Status.OK),
    BadInput("grey with alpha", lambda: encode(photograph().convert("LA"), "PNG"), Status.OK),
    BadInput("one bit a pixel", lambda: encode(photograph().convert("1"), "PNG"), Status.OK),
    BadInput("16-bit grey", lambda: deep_png(0, 40000), Status.OK),
    BadInput("16-bit RGB", lambda: deep_png(2, 40000, 20000, 65535), Status.OK),
    BadInput("a float TIFF with some NaN", lambda: float_tiff(np.nan, 0.5), Status.OK),
    BadInput("a float TIFF of nothing but NaN", lambda: float_tiff(np.nan, np.nan), Status.CORRUPT),
    BadInput("an animated GIF", lambda: animation("GIF"), Status.OK),
    BadInput("an animated WebP", lambda: animation("WEBP"), Status.OK),
    BadInput("a TIFF of several pages", lambda: animation("TIFF"), Status.OK),
]
