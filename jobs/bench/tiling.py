"""How long planning the tiles of many large scenes takes, from their headers alone, and how much memory.

    python -m jobs.bench.tiling [--scenes 200] [--side 10000] [--tile 256] [--overlap 0] [--repeats 3]

``imgbatch manifest tile`` runs on a folder whose files are links to one GeoTIFF of four 16-bit bands that has a header
and no blocks, so that the disk is not filled and reading pixels would show: links to one file also mean that the header
comes from the page cache. A scene that cannot be opened fails the benchmark.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import rasterio

from jobs.bench.common import describe_machine, spread

BANDS = 4
BLOCK = 512


def write_sparse_scene(path: Path, side: int) -> None:
    profile = {"driver": "GTiff", "count": BANDS, "dtype": "uint16", "width": side, "height": side, "nodata": 0}
    profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "DEFLATE", "SPARSE_OK": True}
    north = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    with rasterio.open(path, "w", **profile, crs="EPSG:32633", transform=north):
        pass


@dataclass(frozen=True)
class Planned:
    """One run."""

    seconds: float
    peak_bytes: int
    """The largest resident memory of the process."""
    num_tiles: int
    manifest_bytes: int


def plan(folder: Path, options: argparse.Namespace) -> Planned:
    manifest = folder / "tiles.parquet"
    arguments = ["manifest", "tile", str(folder / "scenes"), "-o", str(manifest), "--overwrite"]
    arguments += ["--size", str(options.tile), "--overlap", str(options.overlap)]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from imgbatch.cli import main; main()", *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode or f"of {options.scenes:,} scenes" not in said or "cannot be opened" in said:
        raise SystemExit(f"manifest tile failed: {said}")
    rows = pq.read_metadata(manifest).num_rows
    return Planned(seconds, usage.ru_maxrss * 1024, rows, manifest.stat().st_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--side", type=int, default=10_000, help="of a scene, px")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile, px")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "scenes").mkdir()
        write_sparse_scene(folder / "scene.tif", options.side)
        for index in range(options.scenes):
            (folder / "scenes" / f"{index:06d}.tif").hardlink_to(folder / "scene.tif")
        before = os.getloadavg()[0]
        runs = [plan(folder, options) for _ in range(options.repeats)]
    print(describe_machine(), f"rasterio {rasterio.__version__}, GDAL {rasterio.__gdal_version__}", sep=", ")
    print(f"\n{options.scenes:,} scenes of {options.side:,} px, {runs[0].num_tiles:,} tiles of {options.tile} px with")
    print(f"overlap {options.overlap:g}, manifest of {runs[0].manifest_bytes / 1e6:,.0f} MB; {options.repeats} runs\n")
    print("| seconds | scenes/s | tiles/s | largest memory, MB |\n| --- | --- | --- | --- |")
    seconds = spread([run.seconds for run in runs])
    scenes_per_s = spread([options.scenes / run.seconds for run in runs])
    tiles_per_s = spread([run.num_tiles / run.seconds for run in runs])
    print(f"| {seconds} | {scenes_per_s} | {tiles_per_s} | {spread([run.peak_bytes / 1e6 for run in runs])} |")
    print(f"\nload before {before:.1f}, at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
