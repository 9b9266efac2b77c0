"""What ``fetch`` allows holds wherever an image is looked at, by any command; none of them opens a file beyond it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run
from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.runs import RunPaths
from imgbatch.runtime.job import classify
from tests.conftest import changed
from tests.rasters import noise, write_raster

Command = Callable[..., str]


class _Opened:
    """Files below a folder that this process opens, from when the folder is set."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.paths: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is not None and event == "open" and str(arguments[0]).startswith(str(self.folder)):
            self.paths.append(str(arguments[0]))


_opened = _Opened()  # a hook stays for the life of the process


@pytest.fixture
def opened(photos: list[Path]) -> Iterator[list[str]]:
    """The photos that were opened."""
    _opened.folder, _opened.paths = photos[0].parent, []
    yield _opened.paths
    _opened.folder = None


@pytest.fixture
def imgbatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command that may read ``tmp_path / "elsewhere"`` only; returns what it printed."""

    def command(*arguments: str, code: int = 0, allow: str = f"fetch.roots=[{tmp_path / 'elsewhere'}]") -> str:
        result = run([*arguments, "--set", allow])
        printed = capsys.readouterr()
        assert result == code, printed.out + printed.err
        return printed.out + printed.err

    return command


@pytest.mark.parametrize("allow", ["fetch.roots=[/nowhere]", "fetch.schemes=[s3]"])
def test_a_manifest_is_checked_without_what_is_not_allowed(
    allow: str, photo_manifest: Path, imgbatch: Command, opened: list[str]
) -> None:
    arguments = ("manifest", "check", str(photo_manifest), "--sample", "8")
    assert "REFUSED 8" in imgbatch(*arguments, code=5, allow=allow)
    assert opened == []
    imgbatch(*arguments, code=5, allow="fetch.roots=[]")
    assert len(opened) >= 8


COMMANDS = {
    "attack": (["attack", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "OUT"], 2),
    "explain": (["explain", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "OUT"], 2),
    "optimize": (["model", "optimize", "MODEL", "--target", "torch-compile", "--calibration", "MANIFEST"], 2),
    "export": (["model", "export", "MODEL", "--format", "onnx", "-o", "OUT.onnx", "--manifest", "MANIFEST"], 2),
    "classify": (["classify", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "OUT", "--engine", "local"], 3),
    "plan": (["plan", "-m", "MODEL", "--manifest", "MANIFEST", "-o", "OUT"], 0),
    "train": (["train", "--manifest", "SPLITS", "--arch", "simple_cnn", "-o", "OUT", "--engine", "local",
               "--set", "preprocess.resize_size=36", "--set", "preprocess.crop_size=32"], 3),
    "baseline": (["train", "--manifest", "SPLITS", "--arch", "logistic_regression", "-o", "OUT", "--engine", "local",
                  "--set", "train.backbone=hog_color"], 3),
}  # fmt: skip


NEVER_WITHOUT = ("classify", "plan", "train", "baseline")
"""These have always had a configuration; they take longer."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak if name in NEVER_WITHOUT else ()) for name in COMMANDS]
)
def test_commands_on_a_manifest(
    name: str, photo_manifest: Path, tiny_model: ModelBundle, tmp_path: Path, imgbatch: Command, opened: list[str]
) -> None:
    pytest.importorskip("captum", reason="the explain extra is not installed")
    arguments, code = COMMANDS[name]
    table = pq.read_table(photo_manifest)
    splits = ["validation" if index % 4 == 3 else "train" for index in range(table.num_rows)]
    pq.write_table(table.append_column("split", pa.array(splits)), tmp_path / "splits.parquet")
    given = {
        "MODEL": tiny_model.path,
        "MANIFEST": str(photo_manifest),
        "SPLITS": str(tmp_path / "splits.parquet"),
        "OUT": str(tmp_path / "out"),
        "OUT.onnx": str(tmp_path / "out.onnx"),
    }
    printed = imgbatch(*(given.get(argument, argument) for argument in arguments), code=code)
    assert "REFUSED" in printed or "fetch.roots" in printed
    assert opened == []


@pytest.mark.soak
def test_commands_on_an_output(
    photo_config: Config, photos: list[Path], tmp_path: Path, imgbatch: Command, opened: list[str]
) -> None:
    """The runs were allowed everything; these commands are not."""
    out = classify(photo_config).out
    other = classify(changed(photo_config, preprocess__crop_size=24, output__path=str(tmp_path / "other"))).out
    opened.clear()  # by the runs
    page = tmp_path / "page.html"
    imgbatch("report", out, "-o", str(page))
    assert "outside the directories that images may lie in" in page.read_text()
    imgbatch("compare", out, other)
    chosen = ["--image-id", str(photos[0])]
    assert "REFUSED" in imgbatch("explain", out, *chosen, code=2)
    assert "6 REFUSED" in imgbatch("retry", out, "--engine", "local")
    assert opened == []


@pytest.mark.soak
def test_what_a_run_was_not_allowed_its_followers_are_not(
    photo_config: Config, photos: list[Path], tmp_path: Path, imgbatch: Command, opened: list[str]
) -> None:
    """Without a word on the command line, report, explain, retry and repair keep to what the run's command said."""
    link = tmp_path / "link.jpg"
    link.symlink_to(photos[6])
    inside = tmp_path / "inside.jpg"
    inside.write_bytes(photos[7].read_bytes())
    manifest = tmp_path / "manifest.parquet"
    pq.write_table(pa.table({"uri": [str(inside), str(link), str(photos[8])]}), manifest)
    config = changed(photo_config, input__manifest=str(manifest), fetch__roots=(str(tmp_path),))
    result = classify(config)
    assert result.counts == {"OK": 1, "REFUSED": 2}
    opened.clear()  # by this test
    quietly = "fetch.retries=1"
    assert "2 REFUSED" in imgbatch("retry", result.out, "--engine", "local", allow=quietly)
    imgbatch("report", result.out, allow=quietly)
    assert "REFUSED" in imgbatch("explain", result.out, "-o", str(tmp_path / "x"), "--image-id", str(inside),
                                 "--set", "fetch.schemes=[s3]", code=2, allow=quietly)  # fmt: skip
    assert "1 image in" in imgbatch("explain", result.out, "--image-id", str(inside), allow=quietly)
    (path,) = Path(result.out, "errors", f"run_id={result.run_id}").glob("*.parquet")
    path.unlink()
    assert "1 file" in imgbatch("repair", result.out, "--set", "classify.engine=local", allow=quietly)
    assert opened == []


def test_scenes(tmp_path: Path, imgbatch: Command, store_run: Callable[..., Path]) -> None:
    """Rasters are opened by GDAL, which no hook sees; what the commands say must do."""
    scene = write_raster(tmp_path / "scene.tif", noise(1, 64, 64))
    window = {"col_off": 0, "row_off": 0, "width": 32, "height": 32}
    manifest = tmp_path / "tiles.parquet"
    pq.write_table(pa.table({"uri": [str(scene)], "window": [window]}), manifest)
    reason = "outside the directories that images may lie in"
    assert f"cannot be opened: {scene}: {reason}" in imgbatch("manifest", "tile", str(scene), "-o", str(tmp_path / "t"))
    assert reason in imgbatch("manifest", "stats", str(manifest), code=2)
    columns = {"window": [window], "uri": [str(scene)]}
    out = store_run(("a", "b"), np.array([[1, 0]], np.float32), columns=columns, image_ids=["scene.tif#0,0,32,32"])
    assert f"left out: {scene}: {reason}" in imgbatch("mosaic", str(out), "-o", str(tmp_path / "maps"), code=2)
    plan = RunPaths(str(out), "r000000000001").plan
    storage.write_json(plan, storage.read_json(plan) | {"config": {"fetch": {"roots": [str(tmp_path / "elsewhere")]}}})
    assert f"left out: {scene}: {reason}" in imgbatch(
        "mosaic", str(out), "-o", str(tmp_path / "maps"), allow="fetch.retries=1", code=2
    )
    assert "1 rasters" in imgbatch("mosaic", str(out), "-o", str(tmp_path / "maps"), allow=f"fetch.roots=[{tmp_path}]")
