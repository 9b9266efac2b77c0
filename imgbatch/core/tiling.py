"""Scenes cut into tiles: a manifest row per tile, from the headers of the scenes alone.

Pixels are read only where a scene says that some are missing and has overviews (or is small), from which the share of
a tile that is there follows; otherwise that is found out when the tile is decoded (``geo.max_nodata``).

Tiles lie on a grid from the scene's upper left corner; the last of a row or column is moved inwards to end with the
scene, so that all have the same size unless the scene itself is smaller. Needs the extra ``geo``.

Legend of shape suffixes: N tiles, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rasterio.enums import MaskFlags
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader, MemoryFile
from rasterio.warp import transform as to_crs

from imgbatch.config import Config, FetchConfig
from imgbatch.core import geoparquet, storage
from imgbatch.core.bands import RASTER_SUFFIXES
from imgbatch.core.geoparquet import BBOX, BBOX_TYPE, CRS, GEOMETRY, TRANSFORM
from imgbatch.core.manifest_build import SPLIT_FOLDERS, draw_split, split_of_folders
from imgbatch.core.manifest_sources import OBJECT_COLUMNS, Source, TableOptions, open_sources
from imgbatch.core.parquet import BATCH_ROWS, rechunk
from imgbatch.core.raster_bytes import read_raster_bytes
from imgbatch.core.raster_samples import RasterRejected
from imgbatch.core.rasters import gdal_env, open_raster
from imgbatch.core.row_decoder import find_raster
from imgbatch.core.vector_labels import VectorLabels
from imgbatch.errors import MAY_PASS, ImgbatchError, RowError, Status, UsageError, normalise_message
from imgbatch.schema import BANDS, ETAG, IMAGE_ID, SIZE, SPLIT, TARGET, URI, WINDOW, WINDOW_TYPE

LONGITUDE_LATITUDE = "OGC:CRS84"
_MASK_SIDE = 1024
"""Longest side of the mask from which a scene's tiles are judged, px."""
_SMALL_SCENE_PIXELS = 4_000_000
"""A scene up to this size is judged without overviews."""
_NO_WINDOW = dict.fromkeys((part.name for part in WINDOW_TYPE), 0)
"""Of a scene that cannot be opened: no raster has it, so that the scene never gets one label as a whole."""


@dataclass(frozen=True, kw_only=True)
class TileOptions:
    """How scenes are cut."""

    size: int = 256
    """Side of a tile, px."""
    overlap: float = 0.0
    """Share of a tile's side that it has in common with the next one, 0 to below 1."""
    min_valid: float = 0.0
    """Share of a tile that must not be missing, 0 to 1, where that can be told without reading the scene."""
    bands: tuple[int, ...] | None = None
    """For the column ``bands``; none: no such column."""
    split_shares: Mapping[str, float] | None = None
    """Draws the split of each scene: all its tiles go together, because neighbours look alike."""
    split_from: Literal["folder"] | None = None
    """``folder``: as ``manifest_build.BuildOptions.split_from``."""
    seed: int = 0
    labels: VectorLabels | None = None
    """Fills the column ``target``; tiles that no label touches get none, and are in no split."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < 1 or not 0 <= self.min_valid <= 1:
            raise UsageError("--size must be at least 1, --overlap from 0 to below 1, --min-valid from 0 to 1")

    @property
    def stride(self) -> int:
        """From one tile to the next, px."""
        return max(1, round(self.size * (1 - self.overlap)))


@dataclass
class TileTally:
    """What came of the scenes."""

    num_scenes: int = 0
    num_tiles: int = 0
    num_left_out: int = 0
    """Tiles of which too much is missing."""
    failed: list[str] = field(default_factory=list)
    """Scenes that cannot be opened, and why; each has one row with an empty window, which becomes an error row."""


def tile_scenes(
    sources: Sequence[str],
    output: str,
    options: TileOptions,
    *,
    overwrite: bool = False,
    config: Config | None = None,
) -> TileTally:
    """Write the tiles of the scenes that ``sources`` name to the Parquet file ``output``, as GeoParquet.

    A tile's ``image_id`` is the scene's path below its source with ``#col_off,row_off,width,height``: it stays the
    same when the collection moves. Tiles of objects have their scene's ``size`` and ``etag``.

    Args:
        config: where scenes may lie, and up to which size an object that GDAL cannot read is read whole to see whether
            it is damaged (section ``fetch``); none: the defaults.

    Raises:
        UsageError: a source that cannot be read, two scenes of one name, no scene, or ``output`` exists.
        ImgbatchError: a scene that cannot be read now, and perhaps can later.
    """
    if storage.exists(output) and not (overwrite and storage.is_file(output)):
        raise UsageError(f"output {output}: exists; choose another name or give --overwrite")
    tally = TileTally()
    access = (config or Config()).fetch
    geometry = geoparquet.FileGeometry(geoparquet.geo_metadata())
    # Earlier tiles in the folder of their scenes are not what they are listed by.
    opened = open_sources(sources, TableOptions(), leave_out=output)
    schema = _schema(options, opened)
    with gdal_env(), storage.staged_file(output) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in rechunk(_iter_tables(opened, options, schema, tally, access), BATCH_ROWS):
            geometry.add(table)
            writer.write_table(table, row_group_size=table.num_rows)
        if tally.num_scenes == 0:
            raise UsageError(f"{', '.join(sources)}: no scene found ({', '.join(RASTER_SUFFIXES)})")
        writer.add_key_value_metadata({geoparquet.METADATA_KEY: geometry.metadata()})
    return tally


def tile_windows(width: int, height: int, options: TileOptions) -> np.ndarray:
    """col_off, row_off, width and height of every tile, int64 [N, 4], row by row."""
    columns, rows = (_offsets(length, options) for length in (width, height))
    col_off_N, row_off_N = (grid.ravel() for grid in np.meshgrid(columns, rows))
    sides = [np.full(len(col_off_N), min(options.size, length)) for length in (width, height)]
    return np.stack([col_off_N, row_off_N, *sides], axis=1).astype(np.int64)


def _offsets(length: int, options: TileOptions) -> np.ndarray:
    last = max(0, length - options.size)
    offsets = np.arange(0, last + 1, options.stride)
    return offsets if offsets[-1] == last else np.append(offsets, last)


def _schema(options: TileOptions, sources: Sequence[Source]) -> pa.Schema:
    fields = [(URI, pa.string()), (IMAGE_ID, pa.string()), (WINDOW, WINDOW_TYPE)]
    known = [column for column in OBJECT_COLUMNS if any(column in source.schema for source in sources)]
    fields += [(column.name, column.type) for column in known]
    fields += [(BANDS, pa.list_(pa.int32()))] if options.bands else []
    fields += [(TARGET, pa.string())] if options.labels else []
    fields += [(SPLIT, pa.string())] if options.split_shares or options.split_from else []
    fields += [(CRS, pa.string()), (TRANSFORM, pa.list_(pa.float64())), (GEOMETRY, pa.binary()), (BBOX, BBOX_TYPE)]
    return pa.schema(fields)


def _iter_tables(
    sources: Sequence[Source], options: TileOptions, schema: pa.Schema, tally: TileTally, access: FetchConfig
) -> Iterator[pa.Table]:
    seen: set[str] = set()
    for listed in _iter_scenes(sources):
        uri, name = listed.uri, listed.name
        if name in seen:
            raise UsageError(f"{uri}: another scene is called {name} too; tile the folder that holds both")
        seen.add(name)
        tally.num_scenes += 1
        try:
            table = _tiles_of(listed, options, tally, access).select(schema.names).cast(schema)
        except UsageError:
            raise
        except Exception as error:  # a damaged file raises anything
            # What may well be read later must not be missing.
            if isinstance(error, RasterRejected) and error.status in MAY_PASS:
                raise ImgbatchError(
                    f"{uri}: cannot be read now ({normalise_message(error)}); run the command again, or name the other "
                    "scenes in a list"
                ) from error
            tally.failed.append(f"{uri}: {normalise_message(error)}")
            yield _failed_row(listed, options, schema)
            continue
        tally.num_tiles += table.num_rows
        yield table


def _failed_row(listed: _Listed, options: TileOptions, schema: pa.Schema) -> pa.Table:
    row: dict[str, Any] = {URI: listed.uri, IMAGE_ID: listed.name, WINDOW: _NO_WINDOW}
    row |= {SIZE: listed.size, ETAG: listed.etag}
    row[BANDS] = list(options.bands) if options.bands else None
    return pa.Table.from_pylist([{name: row.get(name) for name in schema.names}], schema=schema)


def _tiles_of(listed: _Listed, options: TileOptions, tally: TileTally, access: FetchConfig) -> pa.Table:
    place = _place(listed.uri, access)
    try:
        with open_raster(place) as scene:
            return _tiles(scene, listed, options, tally)
    except (RasterRejected, RasterioError) as error:
        said = error.status if isinstance(error, RasterRejected) else Status.FETCH_FAILED
        if said is not Status.FETCH_FAILED or not storage.is_s3(place):
            raise
        # GDAL says the same of a damaged file and of a server that failed for a moment; with the bytes in memory, what
        # fails is the file.
        found = read_raster_bytes(place, max_bytes=access.max_bytes)
        if found.data is None:
            unknown = f"{found.size} bytes, more than fetch.max_bytes, so not looked into for damage"
            raise RasterRejected(said, f"{error}; {unknown}") from error
    with MemoryFile(found.data) as memory, open_raster(memory.name, found.data) as scene:
        return _tiles(scene, listed, options, tally)


def _place(uri: str, access: FetchConfig) -> str:
    place = find_raster(uri, access)
    if isinstance(place, RowError):
        raise RasterRejected(place.status, place.message)
    return place


class _Listed(NamedTuple):
    """A scene as its source lists it; size and etag are null of what is not in an object store."""

    uri: str
    name: str
    size: int | None
    etag: str | None


def _iter_scenes(sources: Sequence[Source]) -> Iterator[_Listed]:
    for source in sources:
        for rows in source.iter_rows():
            uris = rows.table[URI].to_pylist()
            unknown = [None] * len(uris)
            sizes, etags = (
                rows.table[column.name].to_pylist() if column in source.schema else unknown for column in OBJECT_COLUMNS
            )
            for uri, name, size, etag in zip(uris, rows.names or uris, sizes, etags, strict=True):
                if uri and uri.lower().endswith(RASTER_SUFFIXES):
                    yield _Listed(uri, name or uri, size, etag)


def _tiles(scene: DatasetReader, listed: _Listed, options: TileOptions, tally: TileTally) -> pa.Table:
    uri, name = listed.uri, listed.name
    windows_N4 = tile_windows(scene.width, scene.height, options)
    if options.min_valid > 0 and (valid_N := _valid_shares(scene, windows_N4)) is not None:
        tally.num_left_out += int((valid_N < options.min_valid).sum())
        windows_N4 = windows_N4[valid_N >= options.min_valid]
    count = len(windows_N4)
    corners_N42 = _corners(scene, windows_N4)
    geometry, bbox = geoparquet.quadrilaterals(corners_N42)
    columns = [pa.array(windows_N4[:, index]) for index in range(4)]
    placed = scene.crs is not None
    table = pa.table(
        {
            URI: pa.repeat(pa.scalar(uri), count),
            IMAGE_ID: pa.array([f"{name}#{','.join(map(str, window))}" for window in windows_N4.tolist()], pa.string()),
            WINDOW: pa.StructArray.from_arrays(columns, fields=list(WINDOW_TYPE)),
            SIZE: pa.repeat(pa.scalar(listed.size, pa.int64()), count),
            ETAG: pa.repeat(pa.scalar(listed.etag, pa.string()), count),
            CRS: pa.repeat(pa.scalar(_crs_name(scene) if placed else None, pa.string()), count),
            TRANSFORM: pa.array(list(_transforms(scene, windows_N4)), pa.list_(pa.float64())),
            GEOMETRY: geometry,
            BBOX: bbox,
        }
    )
    if options.bands:
        table = table.append_column(BANDS, pa.array([list(options.bands)] * count, pa.list_(pa.int32())))
    if options.labels:
        table = table.append_column(TARGET, pa.array(options.labels.targets(geometry), pa.string()))
    if options.split_shares or options.split_from:
        splits = pa.repeat(pa.scalar(_split_of(uri, name, options)), count)
        if options.labels:
            splits = pc.if_else(table[TARGET].is_valid(), splits, pa.scalar(None, pa.string()))
        table = table.append_column(SPLIT, splits)
    return table


def _split_of(uri: str, name: str, options: TileOptions) -> str:
    if options.split_shares:
        return draw_split(name, dict(options.split_shares), options.seed)
    split = split_of_folders(name.split("/")[:-1])
    if split is None:
        raise UsageError(
            f"{uri}: --split-from folder needs a folder named {', '.join(SPLIT_FOLDERS)} in every path below the source"
        )
    return split


def _crs_name(scene: DatasetReader) -> str:
    """``EPSG:32633`` where the CRS has such a name, else its WKT."""
    authority = scene.crs.to_authority()
    return ":".join(authority) if authority else scene.crs.to_wkt()


def _transforms(scene: DatasetReader, windows_N4: np.ndarray) -> np.ndarray:
    """Of every tile: a, b, c, d, e, f of ``x = a * column + b * row + c``, ``y = d * column + e * row + f``."""
    a, b, c, d, e, f = tuple(scene.transform)[:6]
    col_N, row_N = windows_N4[:, 0], windows_N4[:, 1]
    constant = [np.full(len(windows_N4), value) for value in (a, b, d, e)]
    moved_c, moved_f = a * col_N + b * row_N + c, d * col_N + e * row_N + f
    return np.stack([constant[0], constant[1], moved_c, constant[2], constant[3], moved_f], axis=1)


def _corners(scene: DatasetReader, windows_N4: np.ndarray) -> np.ndarray:
    """Longitude and latitude of the corners, float64 [N, 4, 2]: upper left, lower left, lower right, upper right.

    NaN where they are not known, and of tiles across the 180th meridian, whose polygon would go around the world.
    """
    unknown_N42 = np.full((len(windows_N4), 4, 2), np.nan)
    if scene.crs is None:
        return unknown_N42
    left, top, width, height = windows_N4.T
    columns_N4 = np.stack([left, left, left + width, left + width], axis=1)
    rows_N4 = np.stack([top, top + height, top + height, top], axis=1)
    a, b, c, d, e, f = tuple(scene.transform)[:6]
    xs, ys = a * columns_N4 + b * rows_N4 + c, d * columns_N4 + e * rows_N4 + f
    try:
        longitudes, latitudes = to_crs(scene.crs, LONGITUDE_LATITUDE, xs.ravel(), ys.ravel())
    except Exception:  # a coordinate system of a building site, say; PROJ's errors have no common class
        return unknown_N42
    corners_N42 = np.stack([np.array(longitudes), np.array(latitudes)], axis=1).reshape(-1, 4, 2)
    across_N = np.ptp(corners_N42[:, :, 0], axis=1) > 180
    return np.where(across_N[:, None, None], unknown_N42, corners_N42)


def _valid_shares(scene: DatasetReader, windows_N4: np.ndarray) -> np.ndarray | None:
    """Share of each tile that is there, float64 (N,), from a mask of at most 1,024 px; none: too dear to tell."""
    if all(flags == [MaskFlags.all_valid] for flags in scene.mask_flag_enums):
        return None
    if not scene.overviews(1) and scene.width * scene.height > _SMALL_SCENE_PIXELS:
        return None
    step = max(1, math.ceil(max(scene.shape) / _MASK_SIDE))
    shape = (-(-scene.height // step), -(-scene.width // step))
    mask_HW = scene.dataset_mask(out_shape=shape) > 0
    sums_HW = np.pad(mask_HW.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    left, top, width, height = windows_N4.T
    # A tile of a coarse mask is at least one of its pixels.
    x0, y0 = left // step, top // step
    x1, y1 = np.maximum(x0 + 1, (left + width) // step), np.maximum(y0 + 1, (top + height) // step)
    x1, y1 = np.minimum(x1, shape[1]), np.minimum(y1, shape[0])
    inside = sums_HW[y1, x1] - sums_HW[y0, x1] - sums_HW[y1, x0] + sums_HW[y0, x0]
    return inside / ((x1 - x0) * (y1 - y0))
