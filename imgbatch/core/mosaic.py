"""Labels of tiles burnt back into rasters: one cloud-optimised GeoTIFF per scene, on the scene's own grid.

Where tiles overlap, a pixel has the mean of their probabilities, and the label that this mean makes the likeliest.
Pixels without a labelled tile are nodata. Needs the extra ``geo``.

Legend of shape suffixes: N tiles, K classes, Y and X cells between the edges of tiles.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.io import DatasetReader
from rasterio.shutil import copy

from imgbatch.config import Config, FetchConfig
from imgbatch.core import storage
from imgbatch.core.access import fetch_settings
from imgbatch.core.database import bounded_memory
from imgbatch.core.palette import class_colour
from imgbatch.core.raster_samples import RasterRejected
from imgbatch.core.rasters import gdal_env, open_raster
from imgbatch.core.row_decoder import find_raster
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import read_labeller
from imgbatch.core.views import open_views
from imgbatch.errors import RowError, UsageError

_MEMORY_MB = 2000
_STRIP_ROWS = 512
_MAX_BYTE_CLASSES = 255

_TILES = """
select uri, image_id, "window".col_off, "window".row_off, "window".width, "window".height, probabilities
from predictions where "window" is not null and uri is not null order by uri, row_id
"""
_EMBEDDED = 'select count(*) from predictions where "window" is not null and uri is null'


@dataclass
class MosaicTally:
    """What was written."""

    files: list[str] = field(default_factory=list)
    num_tiles: int = 0
    """Those that are in the files."""
    failed: list[str] = field(default_factory=list)
    """Scenes that are not there any more, or not as large as their tiles say, and why; embedded ones in one line."""


@dataclass(frozen=True)
class _Tiles:
    """The labelled tiles of one scene."""

    uri: str
    name: str
    windows_N4: np.ndarray
    """col_off, row_off, width, height, int64."""
    probs_NK: np.ndarray


class _Cells:
    """The scene cut at the edges of its tiles: within a cell every pixel has the same tiles, so the same answer."""

    def __init__(self, tiles: _Tiles) -> None:
        left, top, width, height = tiles.windows_N4.T
        self._xs, self._ys = np.unique([left, left + width]), np.unique([top, top + height])
        shape = (len(self._ys) - 1, len(self._xs) - 1)
        sums_YXK = np.zeros((*shape, tiles.probs_NK.shape[1]), np.float32)
        counts_YX1 = np.zeros((*shape, 1), np.float32)
        x0, x1 = np.searchsorted(self._xs, left), np.searchsorted(self._xs, left + width)
        y0, y1 = np.searchsorted(self._ys, top), np.searchsorted(self._ys, top + height)
        for tile, probs_K in enumerate(tiles.probs_NK):
            inside = slice(y0[tile], y1[tile]), slice(x0[tile], x1[tile])
            sums_YXK[inside] += probs_K
            counts_YX1[inside] += 1
        self.covered_YX = counts_YX1[..., 0] > 0
        self.probs_YXK = sums_YXK / np.maximum(counts_YX1, 1)

    def spread(self, values_YX: np.ndarray, first_row: int, num_rows: int, width: int, nodata: Any) -> np.ndarray:
        """Values of cells as those of pixels, for some rows of the scene."""
        # A border of nodata stands for what lies before the first edge and after the last.
        framed = np.full((values_YX.shape[0] + 2, values_YX.shape[1] + 2), nodata, values_YX.dtype)
        framed[1:-1, 1:-1] = values_YX
        rows = np.searchsorted(self._ys, np.arange(first_row, first_row + num_rows), side="right")
        columns = np.searchsorted(self._xs, np.arange(width), side="right")
        return framed[rows][:, columns]


def write_mosaics(
    out: str, directory: str, *, class_name: str | None = None, config: Config | None = None
) -> MosaicTally:
    """Write ``NAME.labels.tif`` of every scene that an output has labelled tiles of, or ``NAME.CLASS.tif``.

    Args:
        directory: a local folder; files of the same name are replaced.
        class_name: the probability of this class, float32, instead of labels (the class's index from 0).
        config: where scenes may lie, unless the newest run's command said; none: as it said.

    Raises:
        UsageError: no tiles there, not all probabilities were kept, or no such class.
    """
    if not storage.is_local(directory):
        raise UsageError(f"-o {directory}: rasters are written to local folders; copy them from there")
    tally = MosaicTally()
    with gdal_env(), closing(open_views(out)) as views, bounded_memory(views, _MEMORY_MB):
        labeller = read_labeller(views, out)
        class_names = tuple(labeller.class_names)
        if class_name is not None and class_name not in class_names:
            raise UsageError(f"--class {class_name}: the classes are {', '.join(class_names)}")
        if not labeller.has_probabilities:
            raise UsageError(
                f"{out}: not every probability was kept; classify with --set output.probabilities=all for a mosaic"
            )
        plan = storage.read_json(RunPaths(storage.absolute(out), labeller.run_ids[-1]).plan)
        access = fetch_settings(plan, (config or Config()).fetch)
        columns = [column[0] for column in views.execute("describe predictions").fetchall()]
        if "window" not in columns:
            raise UsageError(f"{out}: its images are no tiles of scenes (there is no column 'window')")
        ((num_embedded,),) = views.execute(_EMBEDDED).fetchall()
        if num_embedded:
            tally.failed.append(f"{num_embedded:,} tiles of embedded rasters, which have no file to take the grid from")
        for tiles in _by_scene(views.sql(_TILES).to_arrow_reader()):
            try:
                target = _target(storage.local_path(directory), tiles, class_name, tally.files)
                _write(tiles, target, class_names, class_name, access)
                tally.files.append(str(target))
                tally.num_tiles += len(tiles.windows_N4)
            except (RasterRejected, _Unplaced) as error:
                tally.failed.append(f"{tiles.uri}: {error}")
    return tally


class _Unplaced(Exception):
    """The scene is not what its tiles were cut from."""


def _by_scene(batches: Iterable[Any]) -> Iterator[_Tiles]:
    held: list[tuple[Any, ...]] = []
    for batch in batches:
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            if held and row[0] != held[0][0]:
                yield _gather(held)
                held = []
            held.append(row)
    if held:
        yield _gather(held)


def _gather(rows: list[tuple[Any, ...]]) -> _Tiles:
    uri, image_id = rows[0][:2]
    windows_N4 = np.array([row[2:6] for row in rows], np.int64)
    return _Tiles(uri, _scene_name(uri, image_id), windows_N4, np.array([row[6] for row in rows], np.float32))


def _scene_name(uri: str, image_id: str) -> str:
    """The scene's path below its collection, as tiling put it into the image_id, or else its file; without suffix."""
    scene, _, window = image_id.rpartition("#")
    relative = posixpath.normpath(scene)
    sound = re.fullmatch(r"\d+,\d+,\d+,\d+", window) and not relative.startswith(("/", "..")) and "://" not in scene
    return posixpath.splitext(relative if sound else posixpath.basename(uri))[0]


def _target(directory: Path, tiles: _Tiles, class_name: str | None, taken: Sequence[str]) -> Path:
    """The file of a scene; scenes that would share a name get a part of their uri's hash after it."""
    ending = "labels" if class_name is None else re.sub(r"[^\w-]+", "_", class_name)
    if class_name is not None and ending == "labels":
        ending = "labels_"
    target = directory / f"{tiles.name}.{ending}.tif"
    if str(target) not in taken:
        return target
    return directory / f"{tiles.name}-{hashlib.sha256(tiles.uri.encode()).hexdigest()[:8]}.{ending}.tif"


def _write(
    tiles: _Tiles, target: Path, class_names: tuple[str, ...], class_name: str | None, access: FetchConfig
) -> None:
    place = find_raster(tiles.uri, access)
    if isinstance(place, RowError):
        raise _Unplaced(place.message)
    cells = _Cells(tiles)
    with open_raster(place) as scene:
        ends = (tiles.windows_N4[:, :2] + tiles.windows_N4[:, 2:]).max(axis=0)
        if ends[0] > scene.width or ends[1] > scene.height:
            raise _Unplaced(f"is {scene.width} x {scene.height} px now, less than its tiles")
        if class_name is None:
            values_YX, options = _label_raster(cells, class_names)
        else:
            values_YX = np.where(cells.covered_YX, cells.probs_YXK[..., class_names.index(class_name)], np.nan)
            values_YX, options = values_YX.astype(np.float32), {"nodata": np.nan, "dtype": "float32"}
        with storage.staged_file(str(target)) as staged, tempfile.TemporaryDirectory(dir=staged.parent) as folder:
            plain = Path(folder, "plain.tif")
            _burn(plain, scene, cells, values_YX, options, class_names, class_name)
            resampling = "MODE" if class_name is None else "AVERAGE"
            copy(str(plain), str(staged), driver="COG", compress="DEFLATE", overview_resampling=resampling)


def _label_raster(cells: _Cells, class_names: tuple[str, ...]) -> tuple[np.ndarray, dict[str, Any]]:
    dtype, nodata = ("uint8", 255) if len(class_names) <= _MAX_BYTE_CLASSES else ("uint16", 65535)
    labels_YX = np.where(cells.covered_YX, cells.probs_YXK.argmax(axis=-1), nodata).astype(dtype)
    return labels_YX, {"nodata": nodata, "dtype": dtype}


def _burn(
    path: Path,
    scene: DatasetReader,
    cells: _Cells,
    values_YX: np.ndarray,
    options: dict[str, Any],
    class_names: tuple[str, ...],
    class_name: str | None,
) -> None:
    profile = {"driver": "GTiff", "count": 1, "width": scene.width, "height": scene.height, **options}
    profile |= {"crs": scene.crs, "transform": scene.transform, "compress": "DEFLATE", "BIGTIFF": "IF_SAFER"}
    with rasterio.open(path, "w", tiled=True, blockxsize=_STRIP_ROWS, blockysize=_STRIP_ROWS, **profile) as target:
        if options["dtype"] == "uint8":
            target.write_colormap(1, {index: (*class_colour(index), 255) for index in range(len(class_names))})
        target.update_tags(1, class_names=json.dumps(class_names))
        target.set_band_description(1, "label" if class_name is None else f"probability of {class_name}")
        for first in range(0, scene.height, _STRIP_ROWS):
            rows = min(_STRIP_ROWS, scene.height - first)
            strip = cells.spread(values_YX, first, rows, scene.width, options["nodata"])
            target.write(strip, 1, window=((first, first + rows), (0, scene.width)))
