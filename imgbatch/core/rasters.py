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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.windows
from PIL import Image, ImageFilter
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import RasterioError, RasterioIOError
from rasterio.io import DatasetReader, MemoryFile

from imgbatch.core import storage
from imgbatch.core.bands import BandSpec
from imgbatch.core.colour import NoPixels, scale_to_uint8
from imgbatch.core.images import Decoded, resize_and_crop
from imgbatch.core.raster_request import RasterRequest, Window
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
_FLOAT_RANGES = (1.0, 255.0, 65535.0)
_INTEGER_RANGES = (65535.0,)
_RGB = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)


class RasterRejected(Exception):
    """The outcome is known: ends the reading of one window."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def gdal_env() -> rasterio.Env:
    """The surroundings in which everything here runs: enter it once in a process, before anything is opened."""
    return rasterio.Env(
        **gdal_options(storage.settings()),
        GDAL_CACHEMAX=_BLOCK_CACHE_MB,
        GDAL_NUM_THREADS=1,
        # Masks and overviews beside a file are looked for by name: listing a folder of a million chips takes minutes.
        GDAL_DISABLE_READDIR_ON_OPEN="TRUE",
    )


@dataclass(frozen=True, slots=True)
class Samples:
    """Part of a raster as it is stored, perhaps at a fraction of its resolution."""

    stored_CHW: np.ndarray
    """In the raster's own type."""
    missing_CHW: np.ndarray | None
    """bool, where there is no value (nodata, mask, alpha 0, NaN); none: nowhere."""
    scales_C: tuple[float, ...]
    offsets_C: tuple[float, ...]
    """The value is ``stored * scale + offset``."""

    def values(self) -> np.ndarray:
        """float64 CHW, NaN where missing."""
        scales, offsets = (np.array(per_band)[:, None, None] for per_band in (self.scales_C, self.offsets_C))
        values_CHW = self.stored_CHW * scales + offsets
        if self.missing_CHW is not None:
            values_CHW[self.missing_CHW] = np.nan
        return values_CHW

    @property
    def missing_share(self) -> float:
        """Share of the samples that are missing, 0 to 1."""
        return 0.0 if self.missing_CHW is None else float(self.missing_CHW.mean())


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
            pixels_CHW = _as_rgb(scene, samples, bands)
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
            crops.append(resize_and_crop(image, 1, spec).pixels_HWC)
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

    Raises:
        RasterRejected: it cannot be opened; the status says why.
    """
    try:
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


def default_bands(scene: DatasetReader) -> tuple[int, ...]:
    """Red, green and blue where the raster names them, else its first three bands, or the first one for grey."""
    interpretations = list(scene.colorinterp)
    if all(colour in interpretations for colour in _RGB):
        return tuple(interpretations.index(colour) + 1 for colour in _RGB)
    plain = all_bands(scene)
    return plain[:3] if len(plain) >= 3 else plain[:1]


def all_bands(scene: DatasetReader) -> tuple[int, ...]:
    """Every band but alpha; the first where there is nothing else."""
    bands = [band for band, colour in zip(scene.indexes, scene.colorinterp, strict=True) if colour != ColorInterp.alpha]
    return tuple(bands) or (1,)


def read_samples(scene: DatasetReader, window: Window, bands: Sequence[int], *, step: int = 1) -> Samples:
    """What is stored in a window, and where nothing is.

    Args:
        step: read at ``1 / step`` of the resolution, averaged.

    Raises:
        RasterRejected: complex numbers.
        RasterioError: a block cannot be read.
    """
    if any(np.dtype(scene.dtypes[band - 1]).kind == "c" for band in bands):
        raise RasterRejected(Status.UNSUPPORTED_FORMAT, "complex numbers")
    part = rasterio.windows.Window(*window)
    options: dict[str, Any] = {"window": part}
    if step > 1:
        shape = (-(-window.height // step), -(-window.width // step))
        options |= {"out_shape": (len(bands), *shape), "resampling": Resampling.average}
    stored_CHW = scene.read(list(bands), **options)
    return Samples(
        stored_CHW,
        _missing(scene, bands, stored_CHW, options),
        tuple(scene.scales[band - 1] for band in bands),
        tuple(scene.offsets[band - 1] for band in bands),
    )


def stretch(samples: Samples, bands: BandSpec) -> np.ndarray:
    """uint8 CHW: see :class:`BandSpec`; what is missing becomes anything."""
    pixels_CHW = np.empty(samples.stored_CHW.shape, np.uint8)
    for channel, stored_HW in enumerate(samples.stored_CHW):
        factor = 255.0 / (bands.high[channel] - bands.low[channel])
        slope = samples.scales_C[channel] * factor
        shift = (samples.offsets_C[channel] - bands.low[channel]) * factor
        if stored_HW.dtype.kind in "iu" and stored_HW.dtype.itemsize <= 2:
            codes_HW = stored_HW.view(np.uint8 if stored_HW.dtype.itemsize == 1 else np.uint16)
            np.take(_lookup_table(stored_HW.dtype.str, slope, shift), codes_HW, out=pixels_CHW[channel])
        else:
            scaled_HW = np.nan_to_num(stored_HW.astype(np.float64)) * slope + shift
            pixels_CHW[channel] = np.clip(np.rint(scaled_HW), 0, 255)
    return pixels_CHW


def north_up(scene: DatasetReader, pixels_CHW: np.ndarray) -> np.ndarray:
    """Mirrored where rows run north or columns run west; a raster without a CRS stays as it is stored."""
    if scene.crs is None:
        return pixels_CHW
    turn = scene.transform
    if turn.e > 0 and abs(turn.e) > abs(turn.d):
        pixels_CHW = pixels_CHW[:, ::-1]
    if turn.a < 0 and abs(turn.a) > abs(turn.b):
        pixels_CHW = pixels_CHW[:, :, ::-1]
    return pixels_CHW


@lru_cache(maxsize=256)
def _lookup_table(dtype: str, slope: float, shift: float) -> np.ndarray:
    """Every value of an integer type stretched to uint8, in the order of its bit patterns."""
    item = np.dtype(dtype)
    values = np.arange(1 << (8 * item.itemsize), dtype=np.uint8 if item.itemsize == 1 else np.uint16).view(item)
    return np.clip(np.rint(values * slope + shift), 0, 255).astype(np.uint8)


def _as_rgb(scene: DatasetReader, samples: Samples, bands: Sequence[int]) -> np.ndarray:
    stored_CHW = samples.stored_CHW
    if len(bands) == 1 and scene.colorinterp[bands[0] - 1] == ColorInterp.palette:
        palette = scene.colormap(bands[0])
        table = np.array([palette.get(code, (0, 0, 0, 255))[:3] for code in range(256)], np.uint8)
        return np.ascontiguousarray(table[stored_CHW[0]].transpose(2, 0, 1))
    if stored_CHW.dtype != np.uint8:
        if samples.missing_CHW is not None:
            stored_CHW = np.where(samples.missing_CHW, 0, stored_CHW)
        ranges = _FLOAT_RANGES if stored_CHW.dtype.kind == "f" else _INTEGER_RANGES
        stored_CHW = scale_to_uint8(stored_CHW, ranges)
    return np.repeat(stored_CHW, 3, axis=0) if len(bands) == 1 else stored_CHW


def _missing(
    scene: DatasetReader, bands: Sequence[int], stored_CHW: np.ndarray, options: dict[str, Any]
) -> np.ndarray | None:
    missing_CHW: np.ndarray | None = None
    flags = {flag for band in bands for flag in scene.mask_flag_enums[band - 1]}
    if flags - {MaskFlags.all_valid}:
        if flags == {MaskFlags.nodata} and stored_CHW.dtype.kind in "iu" and "resampling" not in options:
            nodata = [scene.nodatavals[band - 1] for band in bands]
            missing_CHW = np.stack([band_HW == value for band_HW, value in zip(stored_CHW, nodata, strict=True)])
        else:
            missing_CHW = scene.read_masks(list(bands), **options) == 0
    if stored_CHW.dtype.kind == "f":
        unknown_CHW = ~np.isfinite(stored_CHW)
        if unknown_CHW.any():
            missing_CHW = unknown_CHW if missing_CHW is None else missing_CHW | unknown_CHW
    return missing_CHW if missing_CHW is not None and missing_CHW.any() else None


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
