"""Tiles of scenes survive what photographs survive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import DecodeConfig, StorageConfig
from imgbatch.core import storage
from imgbatch.core.decoder import Decoder
from imgbatch.core.model import ModelBundle
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import ExitCode, RowError, Status
from imgbatch.schema import WINDOW_TYPE
from tests.core.raster_decoding import encoded
from tests.faults.conftest import Job, assert_exactly_once, outcomes
from tests.faults.drivers import KILLED
from tests.faults.proxy import Fault, FaultyServer, faulty_server
from tests.rasters import noise, write_raster

SIDE = 32


def write_scene(path: Path, *, seed: int) -> str:
    """6 x 6 tiles of three 16-bit bands, of which the first row holds no data."""
    samples_CHW = noise(3, 6 * SIDE, 6 * SIDE, seed=seed)
    samples_CHW[:, :SIDE] = 0
    return str(write_raster(path, samples_CHW, tiled=True, blockxsize=64, blockysize=64, nodata=0))


@pytest.fixture
def scenes(tmp_path: Path, tiny_model: ModelBundle) -> Job:
    """72 tiles of two scenes, in units of 16 that end with a scene, then four of a scene cut short and of none."""
    whole = [write_scene(tmp_path / f"scene{seed}.tif", seed=seed) for seed in (0, 1)]
    cut = tmp_path / "cut.tif"
    data = Path(whole[0]).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    places = [(uri, row, column) for uri in whole for row in range(6) for column in range(6)]
    places += [
        (str(cut), 5, 5),
        (str(cut), 5, 4),
        (str(tmp_path / "none.tif"), 1, 1),
        (str(tmp_path / "none.tif"), 1, 2),
    ]
    windows = [{"col_off": SIDE * c, "row_off": SIDE * r, "width": SIDE, "height": SIDE} for _, r, c in places]
    table = pa.table(
        {
            "uri": [uri for uri, _, _ in places],
            "window": pa.array(windows, WINDOW_TYPE),
            "image_id": [f"{Path(uri).name}#{row},{column}" for uri, row, column in places],
            "shop": ["north" if row < 3 else "south" for _, row, _ in places],
        }
    )
    pq.write_table(table, tmp_path / "tiles.parquet")
    return Job(tmp_path / "tiles.parquet", tiny_model.path, tmp_path / "out", tmp_path)


def test_a_driver_killed_among_tiles_and_run_again(scenes: Job) -> None:
    undisturbed = replace(scenes, out=scenes.out.with_name("undisturbed"))
    assert undisturbed.run() == ExitCode.DONE
    statuses = np.array([row[2] for row in outcomes(undisturbed)])
    first_rows = np.arange(72) % 36 < 6
    assert (statuses[:72][first_rows] == "EMPTY").all()
    assert (statuses[:72][~first_rows] == "OK").all()
    assert list(statuses[72:]) == ["TRUNCATED", "TRUNCATED", "NOT_FOUND", "NOT_FOUND"]
    for failpoint in ("commit.after=kill@3", "storage.create[unit-00000004.parquet]=kill", "finalize.mid_file=kill"):
        assert scenes.run(failpoint) == KILLED
    assert scenes.run() == ExitCode.DONE
    assert_exactly_once(scenes, undisturbed)


@pytest.mark.soak
def test_a_tile_that_the_decoder_does_not_survive_costs_its_row(scenes: Job) -> None:
    assert scenes.run("decode.row[9]=kill") == ExitCode.DONE
    statuses = {row[0]: row[2] for row in outcomes(scenes)}
    # Units of 16, 16 and 4 tiles for each scene, and one for what is left.
    assert {row for row, status in statuses.items() if status == "DECODER_CRASH"} == {9, 25, 45, 61}


@dataclass(frozen=True)
class RemoteScene:
    """A scene in a bucket behind a server that fails as it is told to, read by one child."""

    uri: str
    server: FaultyServer
    decoder: Decoder

    def read(self, col_off: int, row_off: int) -> RowError | None:
        """What is wrong with a tile, which the child reads; none: nothing."""
        return read_tile(self.decoder, self.uri, col_off, row_off)

    def fail(self, action: str, **limits: int) -> None:
        """From now on the server answers so."""
        self.server.faults = [Fault(method, r"/scene\.tif", action, **limits) for method in ("GET", "HEAD")]

    def recover(self) -> None:
        self.server.faults = []


def read_tile(decoder: Decoder, uri: str, col_off: int, row_off: int) -> RowError | None:
    window = Window(col_off, row_off, SIDE, SIDE)
    return decoder.decode([RasterRequest(uri, window)], 1).errors[0]


TILES = PreprocessSpec(resize_size=SIDE, crop_size=SIDE)


@pytest.fixture
def remote_scene(s3_bucket: str, s3_server: str, tmp_path: Path) -> Iterator[RemoteScene]:
    """3 x 3 blocks of 256 px, so that a tile at the other end needs a request of its own."""
    samples_CHW = noise(3, 768, 768, dtype="uint8", high=255)
    path = write_raster(tmp_path / "scene.tif", samples_CHW, tiled=True, blockxsize=256, blockysize=256)
    uri = storage.join(s3_bucket, "scene.tif")
    storage.replace(uri, path.read_bytes())
    with faulty_server(s3_server) as (url, server):
        storage.configure(StorageConfig(endpoint_url=url))
        with Decoder(TILES, DecodeConfig(), max_nodata=0.5) as decoder:
            yield RemoteScene(uri, server, decoder)


@pytest.mark.parametrize(("action", "status"), [("404", Status.NOT_FOUND), ("403", Status.FORBIDDEN)])
def test_a_scene_that_could_not_be_opened_is_asked_for_again(
    action: str, status: Status, remote_scene: RemoteScene
) -> None:
    remote_scene.fail(action)
    error = remote_scene.read(0, 0)
    assert error is not None
    assert error.status is status
    remote_scene.recover()
    assert remote_scene.read(0, 0) is None


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("404", Status.NOT_FOUND),
        ("403", Status.FORBIDDEN),
        ("truncate", Status.FETCH_FAILED),
        pytest.param("503", Status.FETCH_FAILED, marks=pytest.mark.soak),
        pytest.param("reset", Status.FETCH_FAILED, marks=pytest.mark.soak),
    ],
)
def test_a_scene_that_is_lost_while_it_is_open_is_not_called_damaged(
    action: str, status: Status, remote_scene: RemoteScene
) -> None:
    assert remote_scene.read(0, 0) is None
    remote_scene.fail(action)
    error = remote_scene.read(700, 700)
    assert error is not None
    assert error.status is status, error
    remote_scene.recover()
    assert remote_scene.read(700, 700) is None


def test_a_request_that_fails_once_while_a_scene_is_open_costs_no_tile(remote_scene: RemoteScene) -> None:
    assert remote_scene.read(0, 0) is None
    remote_scene.fail("403", times=1)
    assert remote_scene.read(700, 700) is None
    assert [action for _, _, action in remote_scene.server.acted] == ["403"]


def test_a_server_that_stalls_is_no_fault_of_the_tile(remote_scene: RemoteScene) -> None:
    remote_scene.fail("slow:5")
    with Decoder(TILES, DecodeConfig(timeout_s=1), max_nodata=0.5) as impatient:
        error = read_tile(impatient, remote_scene.uri, 0, 0)
    assert error is not None
    assert (error.status, error.attempts) == (Status.FETCH_FAILED, 1)
    assert "decode.timeout_s" in error.message


def damage_block(data: bytes) -> bytes:
    return data[:-2000] + b"\xff" * 1800 + data[-200:]


def damage_directory(data: bytes) -> bytes:
    directory = int.from_bytes(data[4:8], "little")
    return data[:directory] + b"\xff" * 200 + data[directory + 200 :]


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (damage_block, Status.CORRUPT),
        (damage_directory, Status.CORRUPT),
        (lambda data: data[:-300], Status.TRUNCATED),
        (lambda data: data[:7], Status.TRUNCATED),
        (lambda _: b"", Status.EMPTY),
        (lambda _: b"no raster", Status.NOT_AN_IMAGE),
    ],
    ids=["block", "directory", "cut", "cut in the header", "empty", "text"],
)
def test_what_is_damaged_in_the_bucket_is_what_it_is_on_a_disk(
    damage: Callable[[bytes], bytes], status: Status, remote_scene: RemoteScene, tmp_path: Path
) -> None:
    local = write_raster(tmp_path / "damaged.tif", noise(3, 64, 64), compress="deflate")
    local.write_bytes(damage(local.read_bytes()))
    remote = remote_scene.uri.replace("scene.tif", "damaged.tif")
    storage.replace(remote, local.read_bytes())
    for uri in (str(local), remote):
        error = read_tile(remote_scene.decoder, uri, 32, 32)
        assert error is not None
        assert error.status is status, error


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_photograph_that_was_cut_in_the_bucket_is_truncated(kind: str, remote_scene: RemoteScene) -> None:
    data = encoded(kind, 256)
    uri = remote_scene.uri.replace("scene.tif", f"cut.{kind.lower()}")
    storage.replace(uri, data[: len(data) // 2])
    error = read_tile(remote_scene.decoder, uri, 220, 220)
    assert error is not None
    assert error.status is Status.TRUNCATED, error


def test_of_a_large_scene_that_was_cut_in_the_bucket_what_is_there_is_read(
    remote_scene: RemoteScene, tmp_path: Path
) -> None:
    """Too large to be read whole for each of its tiles: its size tells."""
    samples_CHW = np.zeros((3, 2560, 2560), "uint8")
    path = write_raster(tmp_path / "large.tif", samples_CHW, tiled=True, blockxsize=256, blockysize=256)
    data = path.read_bytes()
    assert len(data) > 17 * 2**20
    uri = remote_scene.uri.replace("scene.tif", "large.tif")
    storage.replace(uri, data[:-1000])
    error = read_tile(remote_scene.decoder, uri, 2528, 2528)
    assert error is not None
    assert error.status is Status.TRUNCATED, error
    assert read_tile(remote_scene.decoder, uri, 0, 0) is None
    assert max(size for _, _, size in remote_scene.server.passed) < 2**20


def test_a_tile_that_gdal_cannot_get_twice_is_read_from_the_bytes_of_its_scene(remote_scene: RemoteScene) -> None:
    """GDAL asks for parts, and our own client for the whole."""
    assert remote_scene.read(0, 0) is None
    whole = storage.file_info(remote_scene.uri).size
    remote_scene.fail("parts")
    assert remote_scene.read(700, 700) is None
    assert whole in {size for _, _, size in remote_scene.server.passed}
