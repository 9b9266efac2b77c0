"""What the bands of a collection hold, over a sample of its tiles: the numbers that stretch and normalisation need.

Tiles are read in parts, each in a process of its own, which a damaged raster may take down. Needs the extra ``geo``.

Legend of shape suffixes: N samples, C band, H height, W width.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from imgbatch.config import Config, FetchConfig, GeoConfig, StorageConfig
from imgbatch.core import storage
from imgbatch.core.bands import BandSpec, require_rasterio
from imgbatch.core.manifest import Manifest
from imgbatch.core.parallel import MapParts, in_threads
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.row_decoder import find_raster
from imgbatch.core.rows import EmbeddedImages, take_rows
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import ImgbatchError, RowError, UsageError, normalise_message
from imgbatch.schema import BANDS, URI, WINDOW

PERCENTILES = (2.0, 98.0)
DEVIATIONS = 2.0
TILES_PER_PART = 64
"""Read one after the other by one process, which takes a second to start."""
_TILE_SAMPLES = 4096
_MAX_SIDE = 512
"""Of the part that is read of a larger tile: its middle, px."""


@dataclass(frozen=True)
class BandSample:
    """Values of some tiles, in the raster's units (scale and offset applied)."""

    bands: tuple[int, ...]
    values_NC: np.ndarray
    """float32, NaN where missing."""
    num_tiles: int
    """That were read."""
    failed: tuple[str, ...]
    """Why others were not, a line each."""

    def describe(self) -> list[dict[str, Any]]:
        """A row of plain numbers per band; ``None`` where a band has no value at all."""
        return [
            {"band": band, "missing": float(np.isnan(values_N).mean()), **_statistics(values_N[~np.isnan(values_N)])}
            for band, values_N in zip(self.bands, self.values_NC.T, strict=True)
        ]

    def preprocess(self, spec: PreprocessSpec, geo: GeoConfig) -> PreprocessSpec:
        """``spec`` for these bands: stretched as ``geo`` says, normalised by the mean and std of what comes out.

        Raises:
            UsageError: a band without values, or with one value only.
        """
        described = self.describe()
        for row in described:
            if row["std"] is None or (row["std"] == 0 and geo.stretch != "physical"):
                raise UsageError(
                    f"geo.bands: band {row['band']} has no two different values in the sample; leave it out"
                )
        if geo.stretch == "physical":
            if geo.value_range is None:
                raise UsageError("geo.value_range: the stretch 'physical' needs it: the values that become 0 and 255")
            limits = [geo.value_range for _ in described]
        elif geo.stretch == "deviation":
            limits = [
                (row["mean"] - DEVIATIONS * row["std"], row["mean"] + DEVIATIONS * row["std"]) for row in described
            ]
        else:
            limits = [(row["p2"], row["p98"]) for row in described]
            # More than 96% of the samples are one value.
            limits = [
                (low, high) if low < high else (row["min"], row["max"])
                for (low, high), row in zip(limits, described, strict=True)
            ]
        low, high = (tuple(float(pair[end]) for pair in limits) for end in (0, 1))
        try:
            bands = BandSpec(self.bands, low, high, geo.stretch)
        except ValueError as error:
            raise UsageError(f"geo.value_range: {error}") from error
        scaled_NC = np.clip((self.values_NC - np.array(low)) / (np.array(high) - np.array(low)), 0, 1)
        mean_C, std_C = np.nanmean(scaled_NC, axis=0), np.nanstd(scaled_NC, axis=0)
        return replace(
            spec,
            bands=bands,
            mean=tuple(round(float(mean), 6) for mean in mean_C),
            std=tuple(max(round(float(std), 6), 1e-3) for std in std_C),
        )


def _statistics(values_N: np.ndarray) -> dict[str, float | None]:
    names = ("min", "p2", "mean", "std", "p98", "max")
    if not len(values_N):
        return dict.fromkeys(names)
    low, high = np.percentile(values_N, PERCENTILES)
    numbers = (
        values_N.min(),
        low,
        values_N.mean(dtype=np.float64),
        values_N.std(dtype=np.float64),
        high,
        values_N.max(),
    )
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


@dataclass(frozen=True)
class ReadSettings:
    """What reading a tile needs to know."""

    storage: StorageConfig
    timeout_s: float
    """Of one tile."""


def sample_bands(
    manifest: Manifest,
    row_ids_N: np.ndarray,
    bands: tuple[int, ...] | None,
    *,
    num_tiles: int,
    config: Config,
    map_parts: MapParts = in_threads,
) -> BandSample:
    """The values of up to ``num_tiles`` rows spread evenly over ``row_ids_N``, up to 4,096 of each tile.

    Args:
        row_ids_N: int64, rising.
        bands: from 1; none: of the manifest's own ``bands``, or else every band but alpha of the first tile read.
        config: its section ``decode`` says how long a tile may take.
        map_parts: where tiles are read; the result is the same.

    Raises:
        UsageError: the extra ``geo`` is not installed, or not one tile can be read.
    """
    require_rasterio()
    chosen_N = row_ids_N[np.unique(np.linspace(0, len(row_ids_N) - 1, min(num_tiles, len(row_ids_N))).astype(int))]
    values: list[np.ndarray] = []
    failed: list[str] = []
    requests = list(_requests(manifest, chosen_N, bands, config.fetch, failed))
    parts = [requests[first : first + TILES_PER_PART] for first in range(0, len(requests), TILES_PER_PART)]
    settings = ReadSettings(storage.settings(), config.decode.timeout_s)
    outcomes = itertools.chain.from_iterable(map_parts(read_part, settings, parts))
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, str):
            failed.append(f"{request.uri}: {outcome}")
        elif values and outcome[1].shape[1] != values[0].shape[1]:
            failed.append(f"{request.uri}: {len(outcome[0])} bands, but the first tile has {values[0].shape[1]}")
        else:
            bands = bands or outcome[0]
            values.append(outcome[1])
    if bands is None or not values:
        raise UsageError(f"manifest {manifest.path}: none of {len(failed)} tiles can be read, like {failed[0]}")
    return BandSample(bands, np.concatenate(values), len(values), tuple(failed))


def _requests(
    manifest: Manifest, row_ids_N: np.ndarray, bands: tuple[int, ...] | None, config: FetchConfig, failed: list[str]
) -> Iterator[RasterRequest]:
    """What to read of the rows; those that are not there are added to ``failed``."""
    names = [name for name in (URI, WINDOW, BANDS) if name in manifest.schema.names]
    rows = take_rows(manifest.iter_batches(names), row_ids_N).to_pylist() if names else []
    images = EmbeddedImages(manifest).read(row_ids_N.tolist()) if manifest.has_bytes else (None for _ in row_ids_N)
    for row, data in zip(rows or [{} for _ in row_ids_N], images, strict=True):
        window = Window(**row[WINDOW]) if row.get(WINDOW) else None
        wanted = bands or (tuple(row[BANDS]) if row.get(BANDS) else None)
        place = None if data is not None else find_raster(row.get(URI), config)
        if isinstance(place, RowError):
            failed.append(f"{row.get(URI)}: {place.message}")
        else:
            yield RasterRequest(place, window, wanted, data)


Outcome = tuple[tuple[int, ...], np.ndarray] | str
"""The bands that were read of a tile and some of their values, float32 [N, C], or why there are none."""


def read_part(settings: ReadSettings, requests: Sequence[RasterRequest]) -> list[Outcome]:
    """Read some tiles, for :class:`MapParts`; the values are every n-th pixel's."""
    child = _Child(settings.storage)
    outcomes: list[Outcome] = []
    try:
        for request in requests:
            try:
                outcomes.append(child.read(request, settings.timeout_s))
            except (EOFError, OSError) as error:
                child.kill()
                child = _Child(settings.storage)
                too_long = isinstance(error, TimeoutError)
                took = f"reading it took more than {settings.timeout_s:g} s (decode.timeout_s)"
                outcomes.append(took if too_long else "the process that read it died")
    finally:
        child.kill()
    return outcomes


class _Child:
    """A process that reads tiles: a new interpreter, for ``multiprocessing`` would re-run the caller's ``__main__``.

    Raises:
        ImgbatchError: it does not start; why is on standard error.
    """

    def __init__(self, settings: StorageConfig) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "imgbatch.core.band_statistics", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
            )
        try:
            self._connection.send(settings)
            self._connection.recv()
        except (EOFError, OSError) as error:
            self.kill()
            raise ImgbatchError("the process that reads tiles does not start") from error

    def read(self, request: RasterRequest, timeout_s: float) -> Outcome:
        """Raises ``TimeoutError``, and ``EOFError`` or another ``OSError`` where the process died."""
        self._connection.send(request)
        if not self._connection.poll(timeout_s):
            raise TimeoutError
        return self._connection.recv()

    def kill(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _serve(connection: Connection) -> None:
    """Runs in the child until the parent closes its end."""
    from imgbatch.core.rasters import gdal_env

    # Ctrl-C reaches the whole process group; what to do about it is the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    storage.configure(connection.recv())
    with gdal_env():
        connection.send(None)
        while True:
            try:
                request = connection.recv()
            except EOFError:
                return
            connection.send(_read_tile(request))


def _read_tile(request: RasterRequest) -> Outcome:
    """Runs in the child."""
    from rasterio.io import MemoryFile

    from imgbatch.core.raster_samples import all_bands, read_samples
    from imgbatch.core.rasters import checked_window, open_raster

    try:
        with MemoryFile(request.data or b"") as memory, open_raster(request.uri or memory.name, request.data) as scene:
            whole = checked_window(scene, request.window)
            width, height = min(whole.width, _MAX_SIDE), min(whole.height, _MAX_SIDE)
            col_off, row_off = whole.col_off + (whole.width - width) // 2, whole.row_off + (whole.height - height) // 2
            bands = request.bands or all_bands(scene)
            values_CHW = read_samples(scene, Window(col_off, row_off, width, height), bands).values()
    except Exception as error:  # a damaged raster raises anything
        return normalise_message(error)
    values_NC = values_CHW.reshape(len(bands), -1).T.astype(np.float32)
    return bands, values_NC[:: max(1, len(values_NC) // _TILE_SAMPLES)]


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
