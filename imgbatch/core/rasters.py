"""Windows of rasters to the uint8 crops that a model sees: read, stretch, fill, turn north up, resize, crop.

Needs the extra ``geo``; imported by the decoding child, and only where a manifest or a model asks for rasters.

A window much larger than the crop is read at a whole fraction of its resolution, for which GDAL takes overviews
where the file has them and averages blocks where it has not, so that memory is bounded either way; what is left is
resized as a photograph is. Values become 8 bits before they are resized: the stretch clips, and half a step of 255
is what that costs.

Legend of shape suffixes: H height, W width, C channel.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

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
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.raster_samples import (
    RasterRejected,
    Samples,
    as_rgb,
    default_bands,
    north_up,
    read_samples,
    stretch,
)
from imgbatch.core.raster_store import gdal_options, gdal_path, status_of_remote
from imgbatch.core.signatures import end_is_missing, sniff_format
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, row_error

DRIVERS = ("GTiff", "JP2OpenJPEG", "PNG", "JPEG")
"""What is opened. Not VRT and its like, which name other files and addresses."""

_OPEN_SCENES = 8
_BLOCK_CACHE_MB = 256
"""Holds a row of blocks of a scene of 13 bands and 10,000 px, so that a row of tiles decompresses none twice."""
_SNIFFED_BYTES = 4096


def gdal_env() -> rasterio.Env:
    """The surroundings in which everything here runs: enter it once in a process, before anything is opened."""
    return rasterio.Env(
        **gdal_options(storage.settings()),
        GDAL_CACHEMAX=_BLOCK_CACHE_MB,
        GDAL_NUM_THREADS=1,
        # Masks and overviews beside a file are looked for by name: listing a folder of a million chips takes minutes.
        GDAL_DISABLE_READDIR_ON_OPEN="TRUE",
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
        South-up and east-left rasters are turned north up where the policy applies orientation; other rotations are
        left as they are stored.
        """
        try:
            with self._opened(request) as scene:
                return self._decode(scene, request)
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
            return _Scene(open_raster(memory.name), memory)
        scene = self._scenes.pop(request.uri, None) or open_raster(request.uri)
        self._scenes[request.uri] = scene
        if len(self._scenes) > _OPEN_SCENES:
            self._scenes.popitem(last=False)[1].close()
        return _Scene(scene)

    def _decode(self, scene: DatasetReader, request: RasterRequest) -> Decoded:
        window = checked_window(scene, request.window)
        bands = self._bands(scene, request)
        step = _step(self._spec, window)
        if (window.width // step) * (window.height // step) > self._max_pixels:
            raise RasterRejected(
                Status.TOO_LARGE, f"{window.width} x {window.height} px, more than {self._max_pixels} (max_pixels)"
            )
        if step > 1 and _ends_early(scene, window):
            # Overviews, which stand in front, may be whole.
            raise RasterRejected(Status.TRUNCATED, "blocks lie beyond the end of the file")
        try:
            samples = read_samples(scene, window, bands, step=step)
        except RasterioIOError as error:
            with suppress(CPLE_BaseError):
                # GDAL still holds the error, and would raise it while the next window is read.
                _ = scene.colorinterp
            status = Status.TRUNCATED if _ends_early(scene, window) else Status.CORRUPT
            raise RasterRejected(_status_of(error, status), str(_deepest(error))) from error
        if (missing := samples.missing_share) > self._max_nodata:
            raise RasterRejected(
                Status.EMPTY,
                f"{missing:.0%} of the samples are missing, more than {self._max_nodata:g} (geo.max_nodata)",
            )
        pixels_CHW = self._to_uint8(scene, samples, bands)
        if self._spec.decode.apply_orientation:
            pixels_CHW = north_up(scene, pixels_CHW)
        return Decoded(self._crop(pixels_CHW), window.width, window.height)

    def _bands(self, scene: DatasetReader, request: RasterRequest) -> tuple[int, ...]:
        channels = self._spec.num_channels
        bands = request.bands or (self._spec.bands.indices if self._spec.bands else default_bands(scene))
        if len(bands) != channels and not (self._spec.bands is None and len(bands) == 1):
            raise RasterRejected(
                Status.UNSUPPORTED_FORMAT, f"{len(bands)} bands are asked for, but the model takes {channels}"
            )
        if not 1 <= min(bands) <= max(bands) <= scene.count:
            raise RasterRejected(
                Status.UNSUPPORTED_FORMAT, f"band {max(bands)} is asked for, but there are {scene.count}"
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


def open_raster(uri: str) -> DatasetReader:
    """A raster opened for reading; the caller closes it.

    Files beside it (.ovr, .msk, .aux.xml) belong to it on a disk, and are not looked for in an object store.

    Raises:
        RasterRejected: it cannot be opened; the status says why.
    """
    # Looking for masks, overviews and metadata beside an object costs some twenty requests, before each first tile.
    surroundings = rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR") if storage.is_s3(uri) else nullcontext()
    try:
        with surroundings:
            return DatasetReader(gdal_path(uri), driver=list(DRIVERS))
    except RasterioError as error:
        if storage.is_s3(uri):
            message = str(_deepest(error))
            raise RasterRejected(status_of_remote(message), message) from error
        head = _head(uri)
        found = sniff_format(head)
        if not head:
            raise RasterRejected(Status.EMPTY, "no bytes") from error
        if found is None:
            raise RasterRejected(Status.NOT_AN_IMAGE, f"no raster begins like this: {head[:16]!r}") from error
        status = Status.TRUNCATED if end_is_missing(head, found) else Status.CORRUPT
        if found not in ("TIFF", "JPEG 2000", "PNG", "JPEG"):
            status = Status.UNSUPPORTED_FORMAT
        raise RasterRejected(status, f"{found}: {_deepest(error)}") from error


def checked_window(scene: DatasetReader, window: Window | None) -> Window:
    """``window``, or all of the scene; raises :class:`RasterRejected` unless it lies within the scene."""
    if window is None:
        return Window(0, 0, scene.width, scene.height)
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


def _head(uri: str) -> bytes:
    try:
        with storage.open_input(uri) as file:
            return file.read(_SNIFFED_BYTES)
    except OSError:
        return b""


def _deepest(error: BaseException) -> BaseException:
    """What went wrong first: rasterio says "see previous exception" of what GDAL explains."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status_of(error: Exception, otherwise: Status) -> Status:
    text = f"{error} {_deepest(error)}".lower()
    no_memory = isinstance(error, MemoryError) or "out of memory" in text or "cannot allocate" in text
    return Status.OUT_OF_MEMORY if no_memory else otherwise


def _ends_early(scene: DatasetReader, window: Window) -> bool:
    """Whether a local GeoTIFF says that some of the window's blocks lie beyond its end."""
    if scene.driver != "GTiff" or not Path(scene.name).is_file():
        return False
    size = Path(scene.name).stat().st_size
    block_height, block_width = scene.block_shapes[0]
    for row in range(window.row_off // block_height, -(-(window.row_off + window.height) // block_height)):
        for column in range(window.col_off // block_width, -(-(window.col_off + window.width) // block_width)):
            where = scene.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=1)
            length = scene.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=1)
            if where is not None and length is not None and int(where) + int(length) > size:
                return True
    return False
