"""What reading a scene tile by tile costs beside rasterio's own windowed reads, and how much memory it takes.

    python -m jobs.bench.rasters [--side 4096] [--tile 256] [--overlap 0.1] [--repeats 3]

A scene of four 16-bit bands (tiles of 512 px, DEFLATE) is written and read by window, in the order of the manifest:
by rasterio alone, by the decode function in this process, and by the job's decoder, whose child process it is in. Runs
alternate; medians and the range are printed as a Markdown table. A tile that cannot be read fails the benchmark.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.windows

from imgbatch.config import Config
from imgbatch.core.bands import BandSpec
from imgbatch.core.decoder import Decoder
from imgbatch.core.images import Decoded
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.rasters import RasterDecoder, gdal_env, open_raster
from imgbatch.core.tiling import TileOptions, tile_windows
from imgbatch.core.transforms import PreprocessSpec
from jobs.bench.common import describe_machine

BANDS = 4
BLOCK = 512
UNIT_ROWS = 64


def write_scene(path: Path, side: int) -> None:
    """Terrain-like values that compress as scenes do: slow waves and a little noise."""
    rng = np.random.default_rng(0)
    profile = {"driver": "GTiff", "count": BANDS, "dtype": "uint16", "width": side, "height": side, "nodata": 0}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "DEFLATE", "predictor": 2}
    with rasterio.open(path, "w", **profile, crs="EPSG:32633", transform=rasterio.Affine(10, 0, 0, 0, -10, 0)) as scene:
        for top in range(0, side, BLOCK):
            height = min(BLOCK, side - top)
            rows, columns = np.mgrid[top : top + height, :side]
            waves = 2000 + 1500 * np.sin(rows / 170) * np.cos(columns / 230)
            strip = np.stack([waves * (1 + band / 4) + rng.integers(1, 60, waves.shape) for band in range(BANDS)])
            scene.write(strip.astype("uint16"), window=rasterio.windows.Window(0, top, side, height))


@dataclass(frozen=True)
class Reading:
    """One run of a candidate."""

    seconds: float
    peak_bytes: int = 0
    """The child's largest resident memory."""


def read_with_rasterio(path: Path, windows: np.ndarray, _: PreprocessSpec) -> Reading:
    started = time.perf_counter()
    with open_raster(str(path)) as scene:
        for window in windows.tolist():
            scene.read(window=rasterio.windows.Window(*window))
    return Reading(time.perf_counter() - started)


def decode_in_process(path: Path, windows: np.ndarray, spec: PreprocessSpec) -> Reading:
    started = time.perf_counter()
    decoder = RasterDecoder(spec, max_pixels=10**9, max_nodata=0.5)
    for window in windows.tolist():
        outcome = decoder.decode(RasterRequest(str(path), Window(*window)))
        if not isinstance(outcome, Decoded):
            raise SystemExit(f"{window}: {outcome}")
    return Reading(time.perf_counter() - started)


def decode_in_child(path: Path, windows: np.ndarray, spec: PreprocessSpec) -> Reading:
    requests = [RasterRequest(str(path), Window(*window)) for window in windows.tolist()]
    with Decoder(spec, Config().decode, max_nodata=0.5) as decoder:
        decoder.decode([b""], 1)  # starts the child, which a job does once
        started = time.perf_counter()
        for first in range(0, len(requests), UNIT_ROWS):
            unit = requests[first : first + UNIT_ROWS]
            failed = [error for error in decoder.decode(unit, len(unit)).errors if error is not None]
            if failed:
                raise SystemExit(f"{failed[0]}")
        seconds = time.perf_counter() - started
        status = Path(f"/proc/{decoder.child_pid}/status").read_text().splitlines()
    return Reading(seconds, next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


CANDIDATES: dict[str, Callable[[Path, np.ndarray, PreprocessSpec], Reading]] = {
    "rasterio, windowed reads alone": read_with_rasterio,
    "decode function, this process": decode_in_process,
    "decoder with its child": decode_in_child,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="of the scene, px")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile, px")
    parser.add_argument("--overlap", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    bands = BandSpec(tuple(range(1, BANDS + 1)), (0.0,) * BANDS, (8000.0,) * BANDS)
    spec = PreprocessSpec(options.tile, options.tile, mean=(0.5,) * BANDS, std=(0.25,) * BANDS, bands=bands)
    windows = tile_windows(options.side, options.side, TileOptions(size=options.tile, overlap=options.overlap))
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    peak = 0
    with tempfile.TemporaryDirectory() as folder, gdal_env():
        scene = Path(folder, "scene.tif")
        write_scene(scene, options.side)
        size = scene.stat().st_size
        for _ in range(options.repeats):
            for name, read in CANDIDATES.items():
                reading = read(scene, windows, spec)
                peak = max(peak, reading.peak_bytes)
                seconds[name].append(reading.seconds)
    print(describe_machine(), f"rasterio {rasterio.__version__}, GDAL {rasterio.__gdal_version__}", sep=", ")
    print(f"\n{options.side} px scene of {BANDS} bands, {size / 1e6:.0f} MB; {len(windows)} tiles of {options.tile} px")
    print(f"with overlap {options.overlap:g}; {options.repeats} runs; child's largest memory {peak / 1e6:.0f} MB\n")
    print("| route | tiles/s | range | of rasterio's rate |\n| --- | ---: | ---: | ---: |")
    baseline = statistics.median(seconds["rasterio, windowed reads alone"])
    for name, runs in seconds.items():
        rates = sorted(len(windows) / run for run in runs)
        share = baseline / statistics.median(runs)
        print(f"| {name} | {statistics.median(rates):.0f} | {rates[0]:.0f} to {rates[-1]:.0f} | {share:.2f} |")
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
