from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, GeoConfig, StorageConfig, load_config
from imgbatch.core import band_statistics
from imgbatch.core.band_statistics import BandSample, ReadSettings, read_part, sample_bands
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.raster_request import RasterRequest
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError
from imgbatch.schema import WINDOW_TYPE
from tests.rasters import noise, write_raster

GEO = GeoConfig()


def tiles_of(path: Path, folder: Path, side: int) -> Manifest:
    """A manifest of four tiles of ``path``, and of one that is not there."""
    windows = [{"col_off": x, "row_off": y, "width": side, "height": side} for y in (0, side) for x in (0, side)]
    uris = [str(path)] * 4 + [str(folder / "gone.tif")]
    pq.write_table(
        pa.table({"uri": uris, "window": pa.array([*windows, windows[0]], WINDOW_TYPE)}), folder / "tiles.parquet"
    )
    return open_manifest(str(folder / "tiles.parquet"))


def test_the_values_of_every_band_are_sampled_and_a_tile_that_is_gone_is_said(tmp_path):
    samples = noise(3, 64, 64)
    samples[1] = 7
    samples[2, :, :16] = 0
    path = write_raster(tmp_path / "scene.tif", samples, nodata=0, scales=(0.1, 1.0, 1.0), offsets=(0.0, 0.0, -5.0))
    manifest = tiles_of(path, tmp_path, 32)
    sample = sample_bands(manifest, np.arange(5), None, num_tiles=256, config=Config())
    assert (sample.bands, sample.num_tiles, sample.values_NC.shape) == ((1, 2, 3), 4, (4096, 3))
    assert [failure.partition(": ")[0] for failure in sample.failed] == [str(tmp_path / "gone.tif")]
    first, second, third = sample.describe()
    values = samples[0] * 0.1
    assert first["mean"] == pytest.approx(values.mean(), rel=1e-5)
    assert first["std"] == pytest.approx(values.std(), rel=1e-5)
    assert (first["p2"], first["p98"]) == pytest.approx(tuple(np.percentile(values, (2, 98))), rel=1e-5)
    assert (second["min"], second["max"], second["std"]) == (7, 7, 0)
    assert (third["missing"], third["max"]) == (0.25, samples[2].max() - 5)


def test_the_bands_asked_for_are_sampled_in_their_order(tmp_path):
    samples = noise(3, 32, 32)
    manifest = tiles_of(write_raster(tmp_path / "scene.tif", samples), tmp_path, 16)
    sample = sample_bands(manifest, np.arange(4), (3, 1), num_tiles=2, config=Config())
    assert sample.num_tiles == 2
    np.testing.assert_array_equal(sample.values_NC[:256], samples[[2, 0], :16, :16].reshape(2, -1).T)


def test_parts_together_are_the_whole(tmp_path, monkeypatch):
    manifest = tiles_of(write_raster(tmp_path / "scene.tif", noise(3, 64, 64)), tmp_path, 32)
    whole = sample_bands(manifest, np.arange(5), None, num_tiles=9, config=Config())
    monkeypatch.setattr(band_statistics, "TILES_PER_PART", 3)
    parts = sample_bands(manifest, np.arange(5), None, num_tiles=9, config=Config())
    assert (parts.bands, parts.num_tiles, parts.failed) == (whole.bands, 4, whole.failed)
    np.testing.assert_array_equal(parts.values_NC, whole.values_NC)


def test_embedded_rasters_are_sampled_and_damaged_ones_say_why(tmp_path):
    samples = noise(2, 16, 16)
    data = write_raster(tmp_path / "scene.tif", samples).read_bytes()
    pq.write_table(pa.table({"bytes": [data, b"no raster", b""]}), tmp_path / "tiles.parquet")
    manifest = open_manifest(str(tmp_path / "tiles.parquet"))
    sample = sample_bands(manifest, np.arange(3), None, num_tiles=9, config=Config())
    np.testing.assert_array_equal(sample.values_NC, samples.reshape(2, -1).T)
    assert ["no raster begins" in failure or "no bytes" in failure for failure in sample.failed] == [True, True]


REQUESTS = """
import sys
import numpy as np
import pyarrow as pa
from imgbatch.config import FetchConfig
from imgbatch.core.band_statistics import _requests
from imgbatch.core.manifest import open_manifest

failed = []
assert not list(_requests(open_manifest(sys.argv[1]), np.array([7, 299_999]), None, FetchConfig(), failed))
print(*(line.partition(": ")[0] for line in failed), pa.default_memory_pool().max_memory())
"""


def test_of_a_large_manifest_only_the_rows_chosen_stay_in_memory(tmp_path):
    """In a process of its own, whose most bytes in Arrow's memory are those of this alone."""
    uris = np.zeros(300_000, np.int32)
    uris[[7, 299_999]] = 1, 2
    names = ["/nowhere/" + "x" * 300, "/nowhere/7", "/nowhere/299999"]
    path = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"uri": pa.DictionaryArray.from_arrays(uris, names)}), path)
    command = [sys.executable, "-c", REQUESTS, str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert printed[:2] == names[1:]
    assert int(printed[2]) < 60e6  # all rows are 95 MB


def test_a_tile_that_never_comes_costs_no_other(tmp_path):
    os.mkfifo(tmp_path / "pipe.tif")
    scene = RasterRequest(str(write_raster(tmp_path / "scene.tif", noise(1, 16, 16))))
    requests = [scene, RasterRequest(str(tmp_path / "pipe.tif")), scene]
    before, lost, after = read_part(ReadSettings(StorageConfig(), timeout_s=1.0), requests)
    assert lost == "reading it took more than 1 s (decode.timeout_s)"
    np.testing.assert_array_equal(before[1], after[1])


def test_a_script_that_guards_nothing_runs_once(tmp_path):
    tiles_of(write_raster(tmp_path / "scene.tif", noise(3, 64, 64)), tmp_path, 32)
    (tmp_path / "script.py").write_text(
        "import numpy as np\n"
        "from imgbatch.config import Config\n"
        "from imgbatch.core.band_statistics import sample_bands\n"
        "from imgbatch.core.manifest import open_manifest\n"
        "print('started')\n"
        f"manifest = open_manifest({str(tmp_path / 'tiles.parquet')!r})\n"
        "print(sample_bands(manifest, np.arange(5), None, num_tiles=9, config=Config()).num_tiles)\n"
    )
    script = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, check=False, timeout=120
    )
    assert script.stdout.split() == ["started", "4"], script.stderr


def test_where_nothing_can_be_read_the_first_reason_is_given(tmp_path):
    manifest = tiles_of(write_raster(tmp_path / "scene.tif", noise(1, 32, 32)), tmp_path, 16)
    with pytest.raises(UsageError, match=r"none of 1 tiles can be read, like .*gone\.tif: "):
        sample_bands(manifest, np.array([4]), None, num_tiles=9, config=Config())


@pytest.fixture
def sample() -> BandSample:
    values = np.stack([np.arange(1001), np.arange(1001) * 10], axis=1).astype(np.float32)
    return BandSample((4, 2), values, 1, ())


@pytest.mark.parametrize(
    ("geo", "low", "high"),
    [
        (GEO, (20, 200), (980, 9800)),
        (GeoConfig(stretch="deviation"), (500 - 2 * 288.96367, 10 * (500 - 2 * 288.96367)), (1077.927, 10779.27)),
        (GeoConfig(stretch="physical", value_range=(0, 2000)), (0, 0), (2000, 2000)),
    ],
)
def test_a_stretch_is_stated_in_the_spec_and_its_outcome_normalised(sample, geo, low, high):
    spec = sample.preprocess(PreprocessSpec(resize_size=32, crop_size=32), geo)
    assert spec.bands is not None
    assert (spec.bands.indices, spec.bands.stretch) == ((4, 2), geo.stretch)
    assert spec.bands.low == pytest.approx(low, rel=1e-4)
    assert spec.bands.high == pytest.approx(high, rel=1e-4)
    scaled = np.clip((sample.values_NC - np.array(low)) / (np.array(high) - np.array(low)), 0, 1)
    assert spec.mean == pytest.approx(tuple(scaled.mean(axis=0)), abs=1e-4)
    assert spec.std == pytest.approx(tuple(scaled.std(axis=0)), abs=1e-4)
    assert PreprocessSpec.from_dict(spec.to_dict()) == spec
    assert spec.describe().startswith(f"bands(4: {spec.bands.low[0]:g} to {spec.bands.high[0]:g}, 2: ")


def test_a_band_of_one_value_is_refused(sample):
    flat = BandSample((1, 2), np.column_stack([np.ones(9), np.arange(9)]).astype(np.float32), 1, ())
    with pytest.raises(UsageError, match="band 1 has no two different values"):
        flat.preprocess(PreprocessSpec(), GEO)
    with pytest.raises(UsageError, match=r"geo\.value_range"):
        sample.preprocess(PreprocessSpec(), load_config(None, ["geo.stretch=physical"]).geo)
