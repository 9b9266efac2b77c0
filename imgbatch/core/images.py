"""Bytes to the uint8 crop that a model sees, in one call: identify, decode, convert, resize, crop, orient.

The reference is torchvision's PIL transform (``Resize`` then ``CenterCrop``, antialiased). Here the crop is fused
into Pillow's resize box, with the reference's integer sizes and offsets and in its order of passes (across, then
down). Only about 1 sample in 4,000 differs from the reference then, by 1 of 255. One fused call is 5% faster, but
Pillow 13 picks the order of its passes by the shape of the box: 2% of the samples differed, and 1 label in 186.

Measured with ``jobs/bench/decode.py`` (figures in ``jobs/results/``): decoding by simplejpeg and by Pillow costs the
same with these builds; handing simplejpeg's RGBX pixels to Pillow through Arrow saves the copy that ``fromarray``
makes, and its strict mode reports damaged JPEG data that Pillow decodes to grey stripes without a word. Decoding at
a reduced DCT scale is up to three times faster on large photographs, but not what a model was trained with unless that
was told so too (``PreprocessSpec.reducing_gap``).

Legend of shape suffixes: H height, W width, C channel.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import ExifTags, Image, ImageFilter, UnidentifiedImageError

from imgbatch.core.colour import fit_transparency, to_rgb
from imgbatch.core.signatures import end_is_missing, sniff_format
from imgbatch.core.transforms import Interpolation, PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, row_error

_RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_SUPPORT: dict[Interpolation, int] = {"bilinear": 1, "bicubic": 2}
"""Reach of the filter to each side, in pixels of the coarser grid (Pillow, ``Resample.c``)."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings stored pixels upright, by EXIF orientation."""
# libjpeg's words for entropy-coded data that cannot be right; its other warnings (stray bytes between markers) are
# common in files that look fine, and are left to Pillow.
_DAMAGED_JPEG = ("Corrupt JPEG data: premature end of data segment", "Corrupt JPEG data: bad Huffman code")
# Pillow's words, in lower case, where a status depends on more than the type of the exception.
_RAN_OUT = ("image file is truncated", "truncated file read")
_UNSUPPORTED_VARIANT = (
    "unsupported bmp bitfields",
    "unsupported bmp compression",
    "unsupported bmp pixel depth (2)",
    "unknown pixel mode",
    "cannot handle",
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image, ready for the model."""

    pixels_HWC: np.ndarray
    """uint8 RGB, ``crop_size`` x ``crop_size`` x 3."""
    width: int
    """Of the source after orientation, px."""
    height: int
    """Of the source after orientation, px."""


class _Rejected(Exception):
    """The outcome is known: ends the decoding of one image."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def decode_image(data: bytes, spec: PreprocessSpec, *, max_pixels: int) -> Decoded | RowError:
    """Decode, orient, resize and crop one encoded image; whatever is wrong with it is the returned error.

    Args:
        data: an encoded image, whole.
        max_pixels: an image whose header states more is ``TOO_LARGE``, before anything is decoded.

    The policy is ``spec.decode``: orientation applied, palette and CMYK converted, alpha composited, 16-bit scaled,
    first frame of an animation, ICC profiles ignored. TIFF is always oriented, as Pillow does it while loading.
    Warnings are silenced through ``warnings.catch_warnings``, so call it from one thread at a time.

    Raises:
        ValueError: ``spec`` asks for other than three channels.
    """
    if spec.num_channels != 3:
        raise ValueError(f"preprocessing for {spec.num_channels} channels: only RGB images are decoded here")
    if not data:
        return row_error(Status.EMPTY, Stage.DECODE, "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data, spec, max_pixels)
    except _Rejected as rejected:
        return row_error(rejected.status, Stage.DECODE, rejected)
    except Exception as error:
        return row_error(_status_of(error, data), Stage.DECODE, f"{type(error).__name__}: {error}")


def _decode(data: bytes, spec: PreprocessSpec, max_pixels: int) -> Decoded:
    # Opening a WebP makes its canvas already, or fails for want of memory.
    _check_size(*_webp_canvas(data), max_pixels)
    image = _open(data, spec.decode.formats)
    _check_size(image.width, image.height, max_pixels)
    is_jpeg, scale = image.format in ("JPEG", "MPO"), 1
    if is_jpeg and spec.reducing_gap:
        scale = _jpeg_scale(image, spec)
    pixels = _decode_plain_jpeg(data, image, scale) if is_jpeg else None
    if pixels is None:
        scale = 1
        fit_transparency(image)
        image.load()
        pixels = to_rgb(image, spec.decode.background)
    if spec.median_size:
        pixels = pixels.filter(ImageFilter.MedianFilter(spec.median_size))
    # After loading: the EXIF of a PNG may follow its pixels, and Pillow turns a TIFF upright while loading.
    orientation = _orientation(image) if spec.decode.apply_orientation else 1
    source = pixels.size if scale == 1 else image.size
    return resize_and_crop(pixels, orientation, spec, source=source, scale=scale)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise _Rejected(Status.TOO_LARGE, f"{width} x {height} px, more than {max_pixels} (max_pixels)")


def _open(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        found = sniff_format(data)
        if found is None:
            raise _Rejected(Status.NOT_AN_IMAGE, f"no image format begins like this: {data[:16]!r}") from None
        if found not in formats:
            raise _Rejected(Status.UNSUPPORTED_FORMAT, f"{found} is not among {', '.join(formats)}") from None
        reason = _why_not_opened(data, found)
        raise _Rejected(_status_of(reason, data), f"{found} header: {reason}") from None


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP's header states, px; zeros for anything else (RFC 9649)."""
    kind, header = data[12:16] if data[8:12] == b"WEBP" else b"", data[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L":
        packed = int.from_bytes(header[1:5], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF
    return 0, 0


def _why_not_opened(data: bytes, name: str) -> Exception:
    """What the one plugin says, which ``Image.open`` keeps to itself."""
    try:
        Image.OPEN[name][0](io.BytesIO(data), "")
    except Exception as error:
        return error
    return SyntaxError("not recognised")


def _jpeg_scale(image: Image.Image, spec: PreprocessSpec) -> int:
    width, height = image.size
    turned = spec.decode.apply_orientation and _orientation(image) >= 5
    return spec.jpeg_scale(height, width) if turned else spec.jpeg_scale(width, height)


def _decode_plain_jpeg(data: bytes, image: Image.Image, scale: int) -> Image.Image | None:
    """Pixels by simplejpeg, their sides divided by ``scale`` and rounded up.

    None where Pillow has to decide: CMYK, rare sampling, stray bytes, cut files.
    """
    if image.mode not in ("RGB", "L"):
        return None
    size = (math.ceil(image.width / scale), math.ceil(image.height / scale))
    try:
        pixels_HWC = simplejpeg.decode_jpeg(data, "RGBX", min_width=size[0], min_height=size[1], min_factor=scale)
    except ValueError as error:
        if "Insufficient memory" in str(error):
            raise MemoryError(str(error)) from None
        if str(error).startswith(_DAMAGED_JPEG) and not end_is_missing(data, "JPEG"):
            raise _Rejected(Status.CORRUPT, str(error)) from None
        return None
    height, width, channels = pixels_HWC.shape
    if (width, height) != size:
        return None
    samples = pa.Array.from_buffers(pa.uint8(), pixels_HWC.size, [None, pa.py_buffer(pixels_HWC)])
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(samples, channels), "RGB", size)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        # Says nothing about the metadata: the pixels would be taken for upright.
        raise
    except Exception:
        # Damaged metadata raises anything, and says nothing about the pixels.
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def resize_and_crop(
    pixels: Image.Image, orientation: int, spec: PreprocessSpec, *, source: tuple[int, int], scale: int = 1
) -> Decoded:
    """The upright crop of an image of any mode; ``orientation`` is EXIF's, from 1.

    Across, turn, down: the order of the reference's two passes in the upright image, each rounding to integers. The
    first pass runs on the stored pixels, so that only a strip ``crop_size`` wide has to be turned.

    Args:
        source: width and height as stored, px.
        scale: what they were divided by to give ``pixels``, whose last column and row may be partly empty then.
    """
    swapped = orientation >= 5
    source_width, source_height = source[::-1] if swapped else source
    width, height = source_width / scale, source_height / scale
    num_rows = pixels.width if swapped else pixels.height
    side, resampling = spec.crop_size, _RESAMPLING[spec.interpolation]
    geometry = spec.geometry(source_width, source_height)
    left, right = (x * width / geometry.resized_width for x in (geometry.left, geometry.left + side))
    top, bottom = (y * height / geometry.resized_height for y in (geometry.top, geometry.top + side))
    # The rows that the second pass will read, as stored, and where in the upright image they begin.
    margin = math.ceil(_SUPPORT[spec.interpolation] * max(1.0, height / geometry.resized_height)) + 1
    upside_down = orientation in (3, 4, 7, 8)
    upper, lower = (height - bottom, height - top) if upside_down else (top, bottom)
    rows = (max(0, math.floor(upper) - margin), min(num_rows, math.ceil(lower) + margin))
    first = height - rows[1] if upside_down else rows[0]

    across = (width - right, width - left) if orientation in (2, 3, 6, 7) else (left, right)
    if swapped:
        strip = pixels.crop((rows[0], 0, rows[1], pixels.height))
        strip = strip.resize((strip.width, side), resampling, box=(0, across[0], strip.width, across[1]))
    else:
        strip = pixels.crop((0, rows[0], pixels.width, rows[1]))
        strip = strip.resize((side, strip.height), resampling, box=(across[0], 0, across[1], strip.height))
    if orientation in _TRANSPOSE:
        strip = strip.transpose(_TRANSPOSE[orientation])
    crop = strip.resize((side, side), resampling, box=(0, top - first, side, bottom - first))
    return Decoded(np.asarray(crop), source_width, source_height)


def _status_of(error: Exception, data: bytes) -> Status:
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text:
        return Status.OUT_OF_MEMORY
    if isinstance(error, Image.DecompressionBombError):
        return Status.TOO_LARGE
    if any(phrase in text for phrase in _UNSUPPORTED_VARIANT):
        return Status.UNSUPPORTED_FORMAT
    found = sniff_format(data)
    ran_out = isinstance(error, EOFError | struct.error) or any(phrase in text for phrase in _RAN_OUT)
    return Status.TRUNCATED if ran_out or (found and end_is_missing(data, found)) else Status.CORRUPT
