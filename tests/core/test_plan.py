from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config, option_names
from imgbatch.core import plan, storage
from imgbatch.core.architectures import build_network
from imgbatch.core.backends import Backend
from imgbatch.core.fingerprint import fingerprint_of, result_fields
from imgbatch.core.machine import Gpu
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_bundle
from imgbatch.core.plan import RunPlan, plan_run
from imgbatch.core.rows import RowsReader
from imgbatch.errors import UsageError
from tests.conftest import changed
from tests.core.test_variants import plant_variant

NUM_ROWS = 5_000_000
PEAK_BYTES = 10**9

PLAN_AND_REPORT = """
import re, sys
from pathlib import Path
from imgbatch.config import parse_config
from imgbatch.core.plan import plan_run
import json
run = plan_run(parse_config(json.loads(sys.argv[1])), "cpu")
assert "torch" not in sys.modules
# Not ru_maxrss, which a new process inherits from the one that started it.
peak_kb = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(run.plan.layout.num_units, peak_kb * 1024)
"""


def test_the_drivers_memory_does_not_grow_with_the_manifest(photo_config: Config, tmp_path: Path) -> None:
    """Five million rows are planned by a fresh process in less than a gigabyte."""
    manifest = tmp_path / "huge.parquet"
    step = 100_000
    with pq.ParquetWriter(manifest, pa.schema([("uri", pa.string())])) as writer:
        for first in range(0, NUM_ROWS, step):
            writer.write_table(pa.table({"uri": [f"s3://bucket/{row}.jpg" for row in range(first, first + step)]}))
    config = changed(photo_config, input__manifest=str(manifest), classify__unit_rows=512)
    result = subprocess.run(
        [sys.executable, "-c", PLAN_AND_REPORT, config.model_dump_json()],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
        timeout=500,
    )
    num_units, peak = map(int, result.stdout.split())
    assert num_units == -(-NUM_ROWS // 512)
    assert peak < PEAK_BYTES


def test_a_plan_reads_back_as_it_was(photo_config: Config) -> None:
    run = plan_run(photo_config, "cpu")
    assert RunPlan.from_json(storage.read_json(run.paths.plan)) == run.plan
    assert run.run_id == "r" + run.plan.fingerprint[:12]
    assert run.pending_units() == list(range(8))


def test_rows_are_one_row_group_per_unit(photo_config: Config, photo_manifest: Path) -> None:
    run = plan_run(photo_config, "cpu")
    (path,) = Path(run.paths.rows).iterdir()
    assert pq.ParquetFile(path).num_row_groups == 8
    reader = RowsReader(run.paths)
    rows = pa.concat_tables([reader.read(unit) for unit in run.plan.layout])
    reader.close()
    manifest = pq.read_table(photo_manifest)
    assert rows.column_names == ["row_id", "image_id", "uri", "target", "shop", "price"]
    assert rows["row_id"].to_pylist() == list(range(120))
    assert rows["image_id"].to_pylist() == rows["uri"].to_pylist() == manifest["uri"].to_pylist()


SAME: dict[str, object] = {
    "fetch.timeout_s": 1.0,
    "fetch.retries": 1,
    "fetch.in_flight": 2,
    "fetch.max_bytes": 1_000,
    "fetch.hedge_after_s": 1.0,
    "fetch.client": "s3fs",
    "fetch.schemes": ("file",),
    "fetch.roots": ("/",),
    "fetch.private_addresses": True,
    "classify.unit_rows": 4,
    "classify.batch_size": 2,
    "classify.engine": "ray",
    "resources.decode_actors": 3,
    "resources.decode_processes": 2,
    "resources.classify_actors": 3,
    "resources.classify_threads": 2,
    "resources.classify_streams": 2,
    "resources.decode_labels": {"ray.io/market-type": "spot"},
    "resources.classify_labels": {"ray.io/market-type": "spot"},
    "output.keep_units": True,
    "errors.max_rate": 0.5,
    "errors.min_rows": 5,
    "run.on_unfinished": "abandon",
    "run.new_run": True,
    "run.log_format": "json",
    "run.no_progress_s": 5.0,
    "run.stop_after_s": 5.0,
    "storage.endpoint_url": "http://localhost:1",
    "storage.region": "eu-west-1",
    "storage.profile": "night",
    "storage.anonymous": True,
    "storage.requester_pays": True,
    "storage.connect_timeout_s": 1.0,
    "storage.read_timeout_s": 1.0,
    "ray.address": "auto",
    "ray.object_store_mb": 100,
    "plan.sample_rows": 0,
    "plan.nodes": {"g6.2xlarge": 4},
    "plan.prices": {"g6.2xlarge": 1.0},
    "report.price_per_hour": 1.0,
}
OTHER: dict[str, object] = {
    "input.limit": 7,
    "input.duplicates": "keep",
    "input.skip_existing": True,
    "input.since_run": "r000000000001",
    "input.if_changed": "warn",
    "preprocess.resize_size": 40,
    "preprocess.crop_size": 24,
    "preprocess.resize_mode": "stretch",
    "preprocess.median_size": 3,
    "preprocess.reducing_gap": 2.0,
    "decode.timeout_s": 1.0,
    "decode.memory_mb": 100,
    "decode.max_pixels": 10_000,
    "decode.gpu_share": 0.5,
    "geo.max_nodata": 0.1,
    "output.partition_by": ("shop",),
    "output.probabilities": "none",
    "output.top_k": 2,
    "output.embeddings": True,
    "output.target_file_mb": 64,
}
PLACES = {"input.manifest", "model.path", "output.path"}
CHOSEN = {"classify.backend", "classify.min_agreement", "resources.device"}
"""The fingerprint holds what they lead to: the device, and the variant of the model (in the backends' tests)."""
TRAINING = {name for name in option_names() if name.startswith(("train.", "augment."))} | {
    *("geo.bands", "geo.stretch", "geo.value_range", "geo.sample_tiles")
}


def test_of_every_option_it_is_known_whether_it_changes_the_run() -> None:
    assert sorted([*SAME, *OTHER, *PLACES, *CHOSEN, *TRAINING]) == sorted(option_names())


@pytest.fixture
def detailed(photo_config: Config, photo_manifest: Path, tmp_path: Path) -> Config:
    """With etags and windows in the manifest, for the options that count only there."""
    table = pq.read_table(photo_manifest)
    window = {"col_off": 0, "row_off": 0, "width": 1, "height": 1}
    for name, value in (("etag", "e"), ("window", window)):
        table = table.append_column(name, pa.array([value] * table.num_rows))
    pq.write_table(table, tmp_path / "detailed.parquet")
    return changed(photo_config, input__manifest=str(tmp_path / "detailed.parquet"))


def fingerprint(config: Config, device: str = "cpu") -> str:
    manifest, bundle = open_manifest(str(config.input.manifest)), load_bundle(str(config.model.path))
    spec = bundle.preprocess.overridden(**config.preprocess.model_dump())
    return fingerprint_of(result_fields(config, manifest, bundle, spec, device, Backend()))


@pytest.mark.parametrize("option", SAME)
def test_how_the_work_is_done_does_not_change_the_run(detailed: Config, option: str) -> None:
    other = changed(detailed, **{option.replace(".", "__"): SAME[option]})
    assert other != detailed
    assert fingerprint(other) == fingerprint(detailed)


@pytest.mark.parametrize("option", OTHER)
def test_what_changes_a_result_changes_the_run(detailed: Config, option: str) -> None:
    other = changed(detailed, **{option.replace(".", "__"): OTHER[option]})
    assert fingerprint(other) != fingerprint(detailed)


def test_the_device_is_part_of_the_run_and_where_things_are_is_not(photo_config: Config, tmp_path: Path) -> None:
    manifest, model = tmp_path / "elsewhere.parquet", tmp_path / "model"
    shutil.copy(str(photo_config.input.manifest), manifest)
    shutil.copytree(str(photo_config.model.path), model)
    places = {"input__manifest": str(manifest), "model__path": str(model), "output__path": str(tmp_path / "other")}
    assert fingerprint(changed(photo_config, **places)) == fingerprint(photo_config)
    assert fingerprint(photo_config, "cuda") != fingerprint(photo_config)


def test_equal_fields_have_the_same_fingerprint_in_every_version() -> None:
    """With another one, no unfinished run could be continued after an update."""
    expected = "ae8a9a50524642753023cd4de34447191a8651989979c60bbcc5b0eeebb6e1dc"
    assert fingerprint_of({"b": [2], "a": 1}) == expected


def test_the_manifests_content_is_part_of_the_run(photo_config: Config, photos: list[Path], tmp_path: Path) -> None:
    manifest = tmp_path / "m.parquet"
    config = changed(photo_config, input__manifest=str(manifest))
    pq.write_table(pa.table({"uri": [str(photos[0])]}), manifest)
    first = plan_run(config, "cpu")
    pq.write_table(pa.table({"uri": [str(photos[1])]}), manifest)
    with pytest.raises(UsageError, match="manifest:"):
        plan_run(config, "cpu")
    storage.create_if_absent(first.paths.success, b"")
    assert plan_run(config, "cpu").run_id != first.run_id


def test_rows_that_another_driver_planned_meanwhile_are_left_alone(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = plan.choose_layout

    def choose_later(*arguments: Any, **settings: Any) -> Any:
        monkeypatch.setattr(plan, "choose_layout", choose)
        plan_run(changed(photo_config, classify__unit_rows=32), "cpu")
        return choose(*arguments, **settings)

    monkeypatch.setattr(plan, "choose_layout", choose_later)
    run = plan_run(photo_config, "cpu")
    assert run.plan.layout.unit_rows == 32
    (path,) = Path(run.paths.rows).iterdir()
    assert pq.ParquetFile(path).num_row_groups == run.plan.layout.num_units == 4


def test_what_is_left_of_a_run_without_a_plan_is_not_taken_for_the_new_ones(photo_config: Config) -> None:
    paths = plan_run(photo_config, "cpu").paths
    storage.remove(paths.plan)
    for uri in (paths.unit_file(0), paths.finalize, paths.files, paths.success, paths.abandoned):
        storage.replace(uri, b"of then")
    run = plan_run(photo_config, "cpu")
    assert run.paths == paths
    assert run.pending_units() == list(range(run.plan.layout.num_units))
    assert sorted(path.name for path in Path(paths.root).iterdir()) == ["plan.json", "rows"]


def test_units_of_a_driver_that_planned_meanwhile_are_left_alone(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at what is left and the look for a plan; the leftovers are gone by then."""
    exists = storage.exists
    paths = plan_run(photo_config, "cpu").paths
    storage.remove(paths.plan)
    storage.replace(paths.unit_file(0), b"of then")
    looks: list[str] = []

    def plans_meanwhile(uri: str) -> bool:
        looks.append(uri)
        if uri == paths.plan and looks.count(uri) == 2:
            plan_run(photo_config, "cpu")
            storage.replace(paths.unit_file(0), b"of now")
        return exists(uri)

    monkeypatch.setattr(storage, "exists", plans_meanwhile)
    run = plan_run(photo_config, "cpu")
    assert storage.read_bytes(run.paths.unit_file(0)) == b"of now"
    assert run.pending_units() == list(range(1, run.plan.layout.num_units))


def test_while_another_driver_plans_the_run_nobody_else_does(photo_config: Config) -> None:
    paths = plan_run(photo_config, "cpu").paths
    assert not Path(paths.heartbeat).exists()
    storage.remove(paths.root)
    storage.write_json(paths.heartbeat, {"host": socket.gethostname(), "pid": os.getppid(), "time": time.time()})
    with pytest.raises(UsageError, match="another driver works on it"):
        plan_run(photo_config, "cpu")
    assert not Path(paths.rows).exists()


def test_rasters_need_the_extra_that_reads_them(
    photo_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = pa.array([{"col_off": 0, "row_off": 0, "width": 1, "height": 1}])
    manifest = tmp_path / "window.parquet"
    pq.write_table(pa.table({"uri": ["a.tif"], "window": window}), manifest)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UsageError, match=r"imgbatch\[geo\]"):
        plan_run(changed(photo_config, input__manifest=str(manifest)), "cpu")


def test_a_crop_that_the_network_cannot_take_is_known_before_anything_is_written(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle(arch="hog_color", state_dict=build_network("hog_color", 3).state_dict())
    config = changed(photo_config, model__path=bundle.path, preprocess__crop_size=15)
    with pytest.raises(UsageError, match="hog_color: crop_size 15 must be at least 16"):
        plan_run(config, "cpu")
    assert not Path(str(config.output.path)).exists()


def test_a_run_is_planned_with_what_all_of_its_gpus_run(photo_config: Config, make_bundle: Callable[..., ModelBundle]):
    bundle = make_bundle()
    variant = plant_variant(bundle, "torch-bf16", device="cuda")
    config = changed(photo_config, model__path=bundle.path, run__on_unfinished="abandon")
    newer, older = Gpu("A100", (8, 0)), Gpu("V100", (7, 0))
    assert plan_run(config, "cuda", [newer]).plan.fields["variant"] == variant.variant_id
    run = plan_run(config, "cuda", [newer, older])
    assert (run.plan.backend, run.backend.name) == ("torch", "torch")
    assert run.backend.left_out[0].startswith("torch-bf16 is left out: ")


@pytest.fixture
def nightly(photo_config: Config) -> Config:
    """On a cluster, with everything that hangs on its nodes left to them."""
    on_cluster = changed(photo_config, classify__engine="ray", ray__address="10.0.0.1:6379")
    return changed(on_cluster, classify__backend="auto", resources__device="auto")


def begin(config: Config, device: plan.DeviceKind, gpus: list[Gpu] | None = None) -> plan.Run:
    """A run of which one unit is done."""
    run = plan_run(config, device, gpus)
    storage.create_if_absent(run.paths.unit_file(0), b"done")
    return run


@pytest.mark.parametrize("on_unfinished", ["stop", "abandon"])
@pytest.mark.parametrize(("begun", "now"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_where_it_was_begun_whatever_nodes_are_up(
    nightly: Config, begun: plan.DeviceKind, now: plan.DeviceKind, on_unfinished: str
) -> None:
    nightly = changed(nightly, run__on_unfinished=on_unfinished)
    first = begin(nightly, begun)
    run = plan_run(nightly, now)
    assert (run.run_id, run.plan.device, run.backend.device) == (first.run_id, begun, begun)
    assert run.remark.startswith(
        f"the run goes on as it was begun, on {begun} with torch, though auto would now be {now}"
    )
    assert (first.remark, plan_run(nightly, begun).remark) == ("", "")
    assert not storage.exists(run.paths.abandoned)


def test_what_is_named_differs_from_what_a_run_was_begun_with(nightly: Config, photo_config: Config) -> None:
    begin(nightly, "cuda")
    device = "device: cuda -> cpu"
    for other, differing in [
        (changed(nightly, resources__device="cpu"), device),
        (changed(nightly, output__top_k=1), rf"{device}, output\.top_k: 5 -> 1"),
        (photo_config, device),  # this machine has its GPUs, or not
    ]:
        with pytest.raises(UsageError, match=rf"unfinished .* other settings \({differing}\)"):
            plan_run(other, "cpu")


def test_of_a_run_of_which_nothing_is_done_nothing_is_lost(nightly: Config) -> None:
    plan_run(nightly, "cpu")
    with pytest.raises(UsageError, match="device: cpu -> cuda"):
        plan_run(nightly, "cuda")


def test_a_run_goes_on_with_the_backend_that_it_was_begun_with(
    nightly: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle()
    variant = plant_variant(bundle, "torch-bf16", device="cuda", labels=0.995)
    newer, older = Gpu("A100", (8, 0)), Gpu("V100", (7, 0))
    config = changed(nightly, model__path=bundle.path, resources__device="cuda")
    first = begin(config, "cuda", [newer])
    for device, gpus in [("cuda", [newer, older]), ("cuda", []), ("cpu", None)]:
        run = plan_run(changed(config, resources__device="auto"), device, gpus)
        assert (run.run_id, run.backend.fields["variant"]) == (first.run_id, variant.variant_id)
    for other in ({"classify__backend": "torch"}, {"classify__min_agreement": 0.999}):
        with pytest.raises(UsageError, match="backend: torch_bf16 -> torch, variant: "):
            plan_run(changed(config, **other), "cuda", [newer])


def test_what_cannot_be_done_is_refused(photo_config: Config) -> None:
    for partition_by, words in [(("colour",), "no column 'colour'"), (("price",), "'price' is float")]:
        with pytest.raises(UsageError, match=words):
            plan_run(changed(photo_config, output__partition_by=partition_by), "cpu")
