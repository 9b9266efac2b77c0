"""The whole job on an S3 server: images, manifest, bundle and output are objects, and every command reads them there.

Where the server is stands in the configuration only, as on a cluster whose workers do not share the environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.cli import run
from imgbatch.config import StorageConfig
from imgbatch.core import storage
from imgbatch.core.model import ModelBundle
from imgbatch.core.regions import bucket_region
from tests.conftest import TINY_CLASSES

Command = Callable[..., str]


@pytest.fixture
def imgbatch(
    s3_bucket: str,  # noqa: ARG001 - its environment comes first, and is changed here
    s3_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Runs a command with ``-c`` and returns what it printed; the server's address is in that file alone."""
    config = tmp_path / "s3.yaml"
    config.write_text(
        f"storage: {{endpoint_url: '{s3_server}'}}\nerrors: {{max_rate: 1.0}}\nresources: {{device: cpu}}"
    )
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(storage, "_filesystems", {})
    here = StorageConfig(endpoint_url=s3_server)
    storage.configure(here)

    def command(*arguments: str, code: int = 0) -> str:
        storage.configure(StorageConfig())  # what the command does not learn from its configuration, it must not know
        result = run([*arguments, "-c", str(config)])
        storage.configure(here)
        printed = capsys.readouterr()
        assert result == code, printed.out + printed.err
        return printed.out

    return command


@pytest.fixture
def images(photos: list[Path], s3_bucket: str) -> str:
    """The photos as objects in folders of their colour."""
    folder = storage.join(s3_bucket, "images")

    def upload(numbered: tuple[int, Path]) -> None:
        index, path = numbered
        storage.replace(storage.join(folder, TINY_CLASSES[index % 3], path.name), path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, enumerate(photos)))
    return folder


@pytest.fixture
def model(tiny_model: ModelBundle, s3_bucket: str) -> str:
    """The tiny model's bundle as objects."""
    for path in Path(tiny_model.path).iterdir():
        storage.replace(storage.join(s3_bucket, "model", path.name), path.read_bytes())
    return storage.join(s3_bucket, "model")


def test_every_command_on_objects(images: str, model: str, s3_bucket: str, imgbatch: Command) -> None:
    manifest, out = storage.join(s3_bucket, "m.parquet"), storage.join(s3_bucket, "out")
    assert "120 images" in imgbatch("manifest", "build", images, "-o", manifest, "--targets-from", "folder")
    assert "no problem found" in imgbatch("manifest", "check", manifest, "--sample", "3", "--seed", "1")
    assert "simple_cnn" in imgbatch("model", "inspect", model)
    arguments = (
        "classify", "-m", model, "--manifest", manifest, "-o", out, "--engine", "local",
        "--set", "classify.unit_rows=16", "--set", "output.partition_by=[target]",
    )  # fmt: skip
    printed = imgbatch(*arguments)
    assert "120 rows: 114 predictions, 6 errors" in printed
    assert f"{out}/predictions/run_id=" in printed
    assert "nothing to do" in imgbatch(*arguments)
    assert "120 of 120 rows" in imgbatch("verify", out)
    (state,) = json.loads(imgbatch("status", out, "--json"))
    assert (state["state"], state["units_done"], state["counts"]["OK"]) == ("finished", 8, 114)
    sql = "select target, count(*) n from predictions group by 1 order by 1"
    assert [row["target"] for row in json.loads(imgbatch("query", out, sql, "--format", "json"))] == sorted(
        TINY_CLASSES
    )
    assert json.loads(imgbatch("evaluate", out, "--json"))["rows"]["predicted"] == 114
    assert "114 images in both" in imgbatch("compare", out, out)
    assert "images listed" in imgbatch("review", "export", out, "-o", storage.join(s3_bucket, "review.csv"))
    assert storage.exists(storage.join(out, "runs", state["run_id"], "report.html"))
    assert imgbatch("report", out, "--thumbnails", "2").strip().endswith("report.html")
    assert "6 rows: 0 predictions, 6 errors" in imgbatch("retry", out, "--engine", "local")
    assert "120 of 120 rows" in imgbatch("verify", out)
    for entry in reversed(json.loads(imgbatch("status", out, "--json"))):
        imgbatch("clean", out, "--run", entry["run_id"], "--yes")
    assert [info.uri for info in storage.list_files(out)] == [f"{out}/current.json"]


def test_plan_tells_of_a_bucket_in_another_region(images: str, model: str, s3_bucket: str, imgbatch: Command) -> None:
    region = bucket_region(s3_bucket)
    if region is None:
        pytest.skip("the server does not tell regions")
    manifest = storage.join(s3_bucket, "m.parquet")
    imgbatch("manifest", "build", images, "-o", manifest)
    arguments = ("plan", "-m", model, "--manifest", manifest, "-o", storage.join(s3_bucket, "out"), "--json")
    arguments += ("--set", "classify.engine=local", "--set", "plan.sample_rows=4")

    def warnings(where: str) -> list[str]:
        printed = json.loads(imgbatch(*arguments, "--set", f"storage.region={where}"))
        return [line for line in printed["warnings"] if "region" in line]

    assert warnings(region) == []
    (line,) = warnings("eu-west-1")
    assert f"{s3_bucket} in region {region}, and the work in eu-west-1" in line


def test_objects_that_changed_since_they_were_listed(
    images: str, model: str, s3_bucket: str, photos: list[Path], imgbatch: Command
) -> None:
    manifest = storage.join(s3_bucket, "m.parquet")
    imgbatch("manifest", "build", storage.join(images, "red"), "-o", manifest)
    whole = photos[3].read_bytes()
    storage.replace(storage.join(images, "red", photos[0].name), whole)

    def classify(mode: str) -> list[str]:
        out = storage.join(s3_bucket, mode)
        imgbatch(
            "classify", "-m", model, "--manifest", manifest, "-o", out, "--engine", "local",
            "--set", f"input.if_changed={mode}",
        )  # fmt: skip
        rows = json.loads(imgbatch("query", out, "select status from errors", "--format", "json"))
        return [row["status"] for row in rows]

    assert "CHANGED" in classify("error")
    assert "CHANGED" not in classify("warn")


def test_models_and_training_on_objects(images: str, s3_bucket: str, imgbatch: Command) -> None:
    manifest, model = storage.join(s3_bucket, "m.parquet"), storage.join(s3_bucket, "trained")
    imgbatch(
        "manifest", "build", images, "-o", manifest, "--targets-from", "folder",
        "--split", "train=0.6,validation=0.4",
    )  # fmt: skip
    printed = imgbatch(
        "train", "--manifest", manifest, "-o", model, "--engine", "local", "--arch", "simple_cnn", "--epochs", "1",
        "--set", "preprocess.resize_size=36", "--set", "preprocess.crop_size=32", "--set", "train.batch_size=16",
    )  # fmt: skip
    assert "3 classes" in printed
    assert "simple_cnn" in imgbatch("model", "inspect", model)


def test_images_embedded_in_parquet_on_objects(
    photos: list[Path], model: str, s3_bucket: str, imgbatch: Command
) -> None:
    folder, out = storage.join(s3_bucket, "embedded"), storage.join(s3_bucket, "out")
    for part in range(2):
        table = pa.table({"bytes": [path.read_bytes() for path in photos[part * 20 : part * 20 + 20]]})
        with storage.staged_file(storage.join(folder, f"part-{part}.parquet")) as staged:
            pq.write_table(table, staged, row_group_size=10)
    imgbatch("classify", "-m", model, "--manifest", folder, "-o", out, "--engine", "local")
    assert "40 of 40 rows" in imgbatch("verify", out)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_local")
def test_the_job_on_ray_on_objects(images: str, model: str, s3_bucket: str, imgbatch: Command) -> None:
    manifest, out = storage.join(s3_bucket, "m.parquet"), storage.join(s3_bucket, "out")
    imgbatch("manifest", "build", images, "-o", manifest)
    printed = imgbatch(
        "classify", "-m", model, "--manifest", manifest, "-o", out,
        "--set", "classify.unit_rows=16", "--set", "resources.decode_actors=1", "--set", "resources.classify_actors=1",
    )  # fmt: skip
    assert "120 rows: 114 predictions, 6 errors" in printed
    assert "120 of 120 rows" in imgbatch("verify", out)
