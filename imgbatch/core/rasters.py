"""Windows of rasters to the uint8 crops that a model sees: read, stretch, fill, turn north up, resize, crop.

Needs the extra ``geo``; imported by the decoding child, and only where a manifest or a model asks for rasters.

A window much larger than the crop is read at a whole fraction of its resolution, for which GDAL takes overviews
where the file has them and averages blocks where it has not, so that memory is bounded either way; what is left is
resized as a photograph is. Values become 8 bits before they are resized: the stretch clips, and half a step of 255
is what that costs.

Legend of shape suffixes: H height, W width, C channel.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TypeGuard

import numpy as np
import rasterio
import rasterio.windows
from PIL import Image, ImageFilter
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader, MemoryFile

from imgbatch.core import storage
from imgbatch.core.colour import NoPixels
from imgbatch.core.images import Decoded, resize_and_crop
from imgbatch.core.raster_bytes import RasterBytes, read_raster_bytes
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.raster_samples import (
    RasterRejected,
    Samples,
    as_rgb,
    default_bands,
    exif_orientation,
    north_up,
    read_samples,
    stretch,
    turned,
)
from imgbatch.core.raster_store import gdal_options, gdal_path, status_of_remote
from imgbatch.core.signatures import sniff_format
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, row_error

DRIVERS = ("GTiff", "JP2OpenJPEG", "PNG", "JPEG")
"""What is opened. Not VRT and its like, which name other files and addresses."""

_OPEN_SCENES = 8
_BLOCK_CACHE_MB = 256
"""Holds a row of blocks of a scene of 13 bands and 10,000 px, so that a row of tiles decompresses none twice."""
_WHOLE_BYTES = 16 * 2**20
"""An object up to this size is read whole where GDAL fails on it, which may be for each of its windows; of a larger one
the ends and the size tell."""
_READ_ERROR = "read error"
"""Of libtiff and libpng, whatever kept them from reading: a server that fails, or an object that was cut."""

_HARMLESS = ("extraneous bytes before marker", "unknown jfif revision", "unknown adobe color transform")
"""libjpeg's warnings with which a photograph is decoded all the same."""


def gdal_env() -> rasterio.Env:
    """The surroundings in which everything here runs: enter it once in a process, before anything is opened."""
    return rasterio.Env(
        **gdal_options(storage.settings()),
        GDAL_CACHEMAX=_BLOCK_CACHE_MB,
        GDAL_NUM_THREADS=1,
        # Masks and overviews beside a file are looked for by name: listing a folder of a million chips takes minutes.
        GDAL_DISABLE_READDIR_ON_OPEN="TRUE",
        # Without these, what is missing of a damaged JPEG is grey, and what is missing of a cut PNG is anything.
        GDAL_ERROR_ON_LIBJPEG_WARNING="TRUE",
        GDAL_PNG_WHOLE_IMAGE_OPTIM="NO",
    )


class RasterDecoder:
    """Reads windows of rasters, keeping the scenes last used open; for one thread.

    Args:
        spec: with ``bands``: which bands, and their stretch. Without: red, green and blue where the raster says which
            they are, else its first three bands, or its first one as grey; 8 bits as they are, wider samples scaled
            as in :mod:`imgbatch.core.colour`.
        max_pixels: a window that is still larger at the fraction it is read at is ``TOO_LARGE``.
        max_nodata: a window of which a larger share of the samples is missing is ``EMPTY``.
    """

    def __init__(self, spec: PreprocessSpec, *, max_pixels: int, max_nodata: float) -> None:
        self._spec = spec
        self._max_pixels = max_pixels
        self._max_nodata = max_nodata
        self._scenes: OrderedDict[str, DatasetReader] = OrderedDict()

    def decode(self, request: RasterRequest) -> Decoded | RowError:
        """The crop of one window; whatever is wrong with it is the returned error.

        Missing samples become the band's mean, or the background of the decode policy where the model states no bands.
        Where the policy applies orientation, south-up and east-left rasters are turned north up, and windows of JPEGs
        as their EXIF says; other rotations are left as they are stored. Windows count in stored pixels all the same.
        """
        outcome = self._attempt(request)
        if _is_damaged(outcome):
            # libjpeg tells of the first damage only: what an open scene gives after it is grey.
            self._close(request.uri)
            if any(words in outcome.message.lower() for words in _HARMLESS):
                with rasterio.Env(GDAL_ERROR_ON_LIBJPEG_WARNING="FALSE"):
                    outcome = self._attempt(request)
                self._close(request.uri)
                return outcome
        if request.uri is None or not storage.is_s3(request.uri):
            return outcome
        # GDAL says the same of a damaged block and of a server that failed for a moment. Opened anew, the scene can be
        # read again, or what is wrong with the server is said, or the bytes have to tell.
        if _has_status(outcome, Status.CORRUPT):
            outcome = self._attempt(request)
            if _is_damaged(outcome):
                self._close(request.uri)
        return self._judge(request) if _has_status(outcome, Status.CORRUPT, Status.FETCH_FAILED) else outcome

    def _judge(self, request: RasterRequest) -> Decoded | RowError:
        """A window of an object on which GDAL fails without saying why, by the bytes that our own client gets."""
        uri = request.uri or ""
        try:
            found = read_raster_bytes(uri, max_bytes=_WHOLE_BYTES)
        except RasterRejected as rejected:
            return row_error(rejected.status, Stage.DECODE, rejected)
        if found.data is not None:
            return self.decode(replace(request, uri=None, data=found.data))
        outcome = self._attempt(request, found)
        if _is_damaged(outcome):
            self._close(uri)
        if _has_status(outcome, Status.CORRUPT) and _READ_ERROR in outcome.message.lower():
            return replace(outcome, status=Status.FETCH_FAILED)
        return outcome

    def _attempt(self, request: RasterRequest, found: RasterBytes | None = None) -> Decoded | RowError:
        """``found``: what is known of the file, where it is in an object store."""
        try:
            with self._opened(request) as scene:
                return self._decode(scene, request, found)
        except RasterRejected as rejected:
            return row_error(rejected.status, Stage.DECODE, rejected)
        except NoPixels as error:
            return row_error(Status.CORRUPT, Stage.DECODE, error)
        except Exception as error:
            return row_error(
                _status_of(error, Status.CORRUPT), Stage.DECODE, f"{type(error).__name__}: {_deepest(error)}"
            )

    def _opened(self, request: RasterRequest) -> _Scene:
        if request.uri is None:
            memory = MemoryFile(request.data or b"")
            try:
                return _Scene(open_raster(memory.name, request.data or b""), memory)
            except BaseException:
                memory.close()
                raise
        scene = self._scenes.pop(request.uri, None) or open_raster(request.uri)
        self._scenes[request.uri] = scene
        if len(self._scenes) > _OPEN_SCENES:
            self._scenes.popitem(last=False)[1].close()
        return _Scene(scene)

    def _close(self, uri: str | None) -> None:
        scene = self._scenes.pop(uri, None) if uri is not None else None
        if scene is not None:
            with suppress(Exception):
                scene.close()

    def _decode(self, scene: DatasetReader, request: RasterRequest, found: RasterBytes | None) -> Decoded:
        window = checked_window(scene, request.window)
        bands = self._bands(scene, request)
        step = _step(self._spec, window)
        if (window.width // step) * (window.height // step) > self._max_pixels:
            raise RasterRejected(
                Status.TOO_LARGE, f"{window.width} x {window.height} px, more than {self._max_pixels} (max_pixels)"
            )
        if step > 1 and _ends_early(scene, window, bands, _size(request, found)):
            # Overviews, which stand in front, may be whole.
            raise RasterRejected(Status.TRUNCATED, "blocks lie beyond the end of the file")
        try:
            samples = read_samples(scene, window, bands, step=step)
        except RasterioIOError as error:
            with suppress(CPLE_BaseError):
                # GDAL still holds the error, and would raise it while the next window is read.
                _ = scene.colorinterp
            cut = _ends_early(scene, window, bands, _size(request, found)) or _has_no_end(scene, request, found)
            status = Status.TRUNCATED if cut else Status.CORRUPT
            raise RasterRejected(_status_of(error, status), str(_deepest(error))) from error
        if (missing := samples.missing_share) > self._max_nodata:
            raise RasterRejected(
                Status.EMPTY,
                f"{missing:.0%} of the samples are missing, more than {self._max_nodata:g} (geo.max_nodata)",
            )
        pixels_CHW = self._to_uint8(scene, samples, bands)
        width, height = window.width, window.height
        if self._spec.decode.apply_orientation:
            orientation = exif_orientation(scene)
            pixels_CHW = turned(north_up(scene, pixels_CHW), orientation)
            width, height = (height, width) if orientation >= 5 else (width, height)
        return Decoded(self._crop(pixels_CHW), width, height)

    def _bands(self, scene: DatasetReader, request: RasterRequest) -> tuple[int, ...]:
        channels = self._spec.num_channels
        bands = request.bands or (self._spec.bands.indices if self._spec.bands else default_bands(scene))
        if len(bands) != channels and not (self._spec.bands is None and len(bands) == 1):
            raise RasterRejected(
                Status.UNSUPPORTED_FORMAT, f"{len(bands)} bands are asked for, but the model takes {channels}"
            )
        if strangers := [band for band in bands if not band or not 1 <= band <= scene.count]:
            raise RasterRejected(
                Status.UNSUPPORTED_FORMAT, f"band {strangers[0]} is asked for, but there are {scene.count}"
            )
        return bands

    def _to_uint8(self, scene: DatasetReader, samples: Samples, bands: Sequence[int]) -> np.ndarray:
        spec, missing_CHW = self._spec, samples.missing_CHW
        if spec.bands is not None:
            pixels_CHW = stretch(samples, spec.bands)
            fill_C = [min(255, max(0, round(255 * mean))) for mean in spec.mean]
        else:
            pixels_CHW = as_rgb(scene, samples, bands)
            fill_C = list(spec.decode.background)
        if missing_CHW is not None:
            for channel, fill in enumerate(fill_C):
                pixels_CHW[channel][missing_CHW[min(channel, len(missing_CHW) - 1)]] = fill
        return pixels_CHW

    def _crop(self, pixels_CHW: np.ndarray) -> np.ndarray:
        spec = self._spec
        side = spec.crop_size
        if pixels_CHW.shape[1:] == (side, side) and spec.resize_size == side and not spec.median_size:
            return pixels_CHW.transpose(1, 2, 0)
        crops = []
        for pixels_HW in pixels_CHW:
            image = Image.fromarray(np.ascontiguousarray(pixels_HW))
            if spec.median_size:
                image = image.filter(ImageFilter.MedianFilter(spec.median_size))
            crops.append(resize_and_crop(image, 1, spec, source=image.size).pixels_HWC)
        return np.stack(crops, axis=-1)


class _Scene:
    """An open raster for the length of a ``with`` block; one that is embedded is closed at its end."""

    def __init__(self, scene: DatasetReader, memory: MemoryFile | None = None) -> None:
        self._scene = scene
        self._memory = memory

    def __enter__(self) -> DatasetReader:
        return self._scene

    def __exit__(self, *_: object) -> None:
        if self._memory is not None:
            self._scene.close()
            self._memory.close()


def open_raster(uri: str, data: bytes | None = None) -> DatasetReader:
    """A raster opened for reading; the caller closes it.

    Files beside it (.ovr, .msk, .aux.xml) belong to it on a disk, and are not looked for in an object store.

    Args:
        data: of an embedded raster; ``uri`` is then what GDAL calls it.

    Raises:
        RasterRejected: it cannot be opened; the status says why. ``FETCH_FAILED`` is also what an object is whose
            ends are sound.
    """
    # Looking for masks, overviews and metadata beside an object costs some twenty requests, before each first tile.
    surroundings = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR") if storage.is_s3(uri) else nullcontext()
    try:
        with surroundings:
            return DatasetReader(gdal_path(uri), driver=list(DRIVERS))
    except RasterioError as error:
        status = status_of_remote(str(_deepest(error))) if storage.is_s3(uri) else None
        if status is not None:
            raise RasterRejected(status, str(_deepest(error))) from error
        raise _rejection(uri, data, error) from error


def _rejection(uri: str, data: bytes | None, error: RasterioError) -> RasterRejected:
    """Why GDAL cannot open a raster, by the first and last bytes of its file."""
    found = RasterBytes.of(data) if data is not None else read_raster_bytes(uri)
    name = sniff_format(found.head)
    if not found.size:
        return RasterRejected(Status.EMPTY, "no bytes")
    if name is None:
        return RasterRejected(Status.NOT_AN_IMAGE, f"no raster begins like this: {found.head[:16]!r}")
    if name not in ("TIFF", "JPEG 2000", "PNG", "JPEG"):
        status = Status.UNSUPPORTED_FORMAT
    elif found.are_of_a_cut(name):
        status = Status.TRUNCATED
    else:
        # Of an object, the server may have failed GDAL in between.
        status = Status.FETCH_FAILED if storage.is_s3(uri) else Status.CORRUPT
    return RasterRejected(status, f"{name}: {_deepest(error)}")


def checked_window(scene: DatasetReader, window: Window | None) -> Window:
    """``window``, or all of the scene; raises :class:`RasterRejected` unless it lies within the scene."""
    if window is None:
        return Window(0, 0, scene.width, scene.height)
    if any(field is None for field in window):
        raise RasterRejected(Status.BAD_WINDOW, f"a field of the window is null: {', '.join(map(str, window))}")
    fits = (
        min(window.col_off, window.row_off) >= 0
        and min(window.width, window.height) > 0
        and window.col_off + window.width <= scene.width
        and window.row_off + window.height <= scene.height
    )
    if not fits:
        raise RasterRejected(
            Status.BAD_WINDOW,
            f"{window.width} x {window.height} px from column {window.col_off}, row {window.row_off} "
            f"of a raster of {scene.width} x {scene.height}",
        )
    return window


def _step(spec: PreprocessSpec, window: Window) -> int:
    """The largest whole step at which the window is read with twice the pixels that resizing it makes, each way."""
    geometry = spec.geometry(window.width, window.height)
    spare = min(window.width / geometry.resized_width, window.height / geometry.resized_height)
    return max(1, math.floor(spare / 2))


def _deepest(error: BaseException) -> BaseException:
    """What went wrong first: rasterio says "see previous exception" of what GDAL explains."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status_of(error: Exception, otherwise: Status) -> Status:
    text = f"{error} {_deepest(error)}".lower()
    no_memory = isinstance(error, MemoryError) or "out of memory" in text or "cannot allocate" in text
    return Status.OUT_OF_MEMORY if no_memory else otherwise


def _has_status(outcome: Decoded | RowError, *statuses: Status) -> TypeGuard[RowError]:
    return isinstance(outcome, RowError) and outcome.status in statuses


def _is_damaged(outcome: Decoded | RowError) -> TypeGuard[RowError]:
    return _has_status(outcome, Status.CORRUPT, Status.TRUNCATED)


def _size(request: RasterRequest, found: RasterBytes | None) -> int | None:
    """Of the raster's file, bytes; none: an object of which nothing is ``found``, or gone."""
    if found is not None:
        return found.size
    if request.uri is None:
        return len(request.data or b"")
    path = storage.local_path(request.uri)
    return path.stat().st_size if path.is_file() else None


def _ends_early(scene: DatasetReader, window: Window, bands: Sequence[int], size: int | None) -> bool:
    """Whether a GeoTIFF of ``size`` bytes says that some of the window's blocks lie beyond its end."""
    if scene.driver != "GTiff" or size is None:
        return False
    by_band = scene.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "BAND"
    block_height, block_width = scene.block_shapes[0]
    rows = range(window.row_off // block_height, -(-(window.row_off + window.height) // block_height))
    columns = range(window.col_off // block_width, -(-(window.col_off + window.width) // block_width))
    for band, row, column in itertools.product(bands if by_band else bands[:1], rows, columns):
        where = scene.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=band)
        length = scene.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=band)
        if where is not None and length is not None and int(where) + int(length) > size:
            return True
    return False


def _has_no_end(scene: DatasetReader, request: RasterRequest, found: RasterBytes | None) -> bool:
    """Whether a JPEG or PNG, unless it is an object of which nothing is ``found``, stops before its own end."""
    if scene.driver not in ("JPEG", "PNG"):
        return False
    if request.uri is None:
        found = RasterBytes.of(request.data or b"")
    elif not storage.is_s3(request.uri):
        found = read_raster_bytes(request.uri)
    return found is not None and found.are_of_a_cut(scene.driver)
