"""What windows of a scene in an object store cost: GDAL's own client (/vsis3/), as the job has it, or fsspec's files.

    python -m jobs.bench.raster_s3 [--side 2048] [--tile 256] [--repeats 3] [--latency-ms 0]

A scene of four 16-bit bands (tiles of 512 px, DEFLATE) lies on a moto server in a process of its own, which counts what
it is asked and what it answers. A run reads the windows of all its tiles in the order of the manifest, or of every
tenth, from an object that nothing has read before. Routes alternate; medians and the range are printed as Markdown
tables. A window that differs from the scene on the disk fails the benchmark.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.windows
from rasterio.io import DatasetReader

from imgbatch.core import storage
from imgbatch.core.rasters import gdal_env, open_raster
from imgbatch.core.tiling import TileOptions, tile_windows
from jobs.bench.common import describe_machine, spread
from jobs.bench.rasters import BLOCK, write_scene

BUCKET = "s3://bench"
SMALL_BLOCK = 64 * 1024
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}


def serve(counts: Any, port: Any, latency_s: float) -> None:
    """Runs in the server's process. ``counts``: requests, and bytes of the bodies of answers."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any, **__: Any) -> None:
            pass

    moto = DomainDispatcherApplication(create_backend_app)

    def counted(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        time.sleep(latency_s)
        body = b"".join(moto(environ, start_response))
        with counts.get_lock():
            counts[0] += 1
            counts[1] += len(body)
        return [body]

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Silent)
    port.value = server.port
    server.serve_forever()


def with_vsis3(uri: str) -> DatasetReader:
    return open_raster(uri)


def with_fsspec(uri: str, **options: Any) -> DatasetReader:
    fs, path = storage.filesystem(uri)

    def opener(path: str, mode: str = "rb", **_: Any) -> Any:
        if "/" not in path:
            # rasterio tries every opener on the name "test", and s3fs takes it for a bucket.
            raise FileNotFoundError(path)
        return fs.open(path, mode, **options)

    return rasterio.open(path, driver="GTiff", opener=opener)


ROUTES: dict[str, Callable[[str], DatasetReader]] = {
    "GDAL's /vsis3/, as the job opens it": with_vsis3,
    "fsspec opener, its defaults": with_fsspec,
    "fsspec opener, blocks of 64 KiB kept": partial(
        with_fsspec, block_size=SMALL_BLOCK, cache_type="blockcache", cache_options={"maxblocks": 256}
    ),
}


@dataclass(frozen=True)
class Read:
    """One run."""

    requests: int
    num_bytes: int
    seconds: float


def read(opened: Callable[[str], DatasetReader], uri: str, windows: np.ndarray, sums: list[int], counts: Any) -> Read:
    before, started = list(counts), time.perf_counter()
    with closing(opened(uri)) as scene:
        for window, expected in zip(windows.tolist(), sums, strict=True):
            if int(scene.read(window=rasterio.windows.Window(*window)).sum()) != expected:
                raise SystemExit(f"{uri}: {window} is not what was written")
    seconds = time.perf_counter() - started
    return Read(counts[0] - before[0], counts[1] - before[1], seconds)


def block_bytes(path: Path, windows: np.ndarray) -> int:
    """Stored bytes of all blocks that the windows touch, each once."""
    blocks = set()
    for left, top, width, height in windows.tolist():
        rows = range(top // BLOCK, -(-(top + height) // BLOCK))
        blocks |= {(column, row) for row in rows for column in range(left // BLOCK, -(-(left + width) // BLOCK))}
    with rasterio.open(path) as scene:
        return sum(int(scene.get_tag_item(f"BLOCK_SIZE_{x}_{y}", "TIFF", bidx=1)) for x, y in blocks)


def compare(title: str, path: Path, windows: np.ndarray, repeats: int, counts: Any) -> None:
    with rasterio.open(path) as scene:
        sums = [int(scene.read(window=rasterio.windows.Window(*window)).sum()) for window in windows.tolist()]
    runs: dict[str, list[Read]] = {name: [] for name in ROUTES}
    for repeat in range(repeats):
        for number, (name, opened) in enumerate(ROUTES.items()):
            uri = f"{BUCKET}/{len(windows)}-{repeat}-{number}.tif"
            storage.replace(uri, path.read_bytes())
            runs[name].append(read(opened, uri, windows, sums, counts))
    needed = block_bytes(path, windows)
    print(f"\n{title}: {len(windows)} tiles, whose blocks hold {needed / len(windows) / 1e3:,.0f} KB a tile\n")
    print("| route | requests a tile | KB a tile | of the blocks' | ms a tile |\n| --- | --- | --- | --- | --- |")
    for name, found in runs.items():
        requests, kilobytes, milliseconds = (
            spread([value / len(windows) for value in values])
            for values in (
                [run.requests for run in found],
                [run.num_bytes / 1e3 for run in found],
                [run.seconds * 1e3 for run in found],
            )
        )
        share = statistics.median(run.num_bytes for run in found) / needed
        print(f"| {name} | {requests} | {kilobytes} | {share:.2f} | {milliseconds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2048, help="of the scene, px")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile, px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="that the server waits before each answer")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    counts, port = context.Array("q", 2), context.Value("i", 0)
    server = context.Process(target=serve, args=(counts, port, options.latency_ms / 1e3), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.05)
    os.environ.update(KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port.value}"})
    fs, bucket = storage.filesystem(BUCKET)
    fs.mkdir(bucket)
    windows = tile_windows(options.side, options.side, TileOptions(size=options.tile))
    print(describe_machine(), f"rasterio {rasterio.__version__}, GDAL {rasterio.__gdal_version__}", sep=", ")
    print(f"the server waits {options.latency_ms:g} ms before each answer; {options.repeats} runs")
    with tempfile.TemporaryDirectory() as folder, gdal_env():
        path = Path(folder, "scene.tif")
        write_scene(path, options.side)
        compare("all tiles, in the order of the manifest", path, windows, options.repeats, counts)
        compare("every tenth tile", path, windows[::10], options.repeats, counts)
    server.terminate()
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
