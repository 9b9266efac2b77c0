from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from imgbatch.config import Config, PlanConfig
from imgbatch.core import backends, storage
from imgbatch.core.backends import Backend
from imgbatch.core.clean import remove_run
from imgbatch.core.machine import Gpu
from imgbatch.core.model import ModelBundle
from imgbatch.core.plan import plan_run
from imgbatch.core.units import UnitLayout
from imgbatch.errors import UsageError
from imgbatch.runtime.forecast import (
    _batch_size,
    _runs_here,
    forecast,
    gpu_warnings,
    price_per_hour,
    stage_rates,
    unit_warnings,
    zone_warnings,
)
from imgbatch.runtime.job import classify
from imgbatch.runtime.pools import Machine, Pools, this_machine
from tests.conftest import changed
from tests.core.test_variants import plant_variant


def test_a_forecast_names_the_run_that_classify_makes_and_writes_nothing(photo_config: Config) -> None:
    out = Path(str(photo_config.output.path))
    ahead = forecast(photo_config)
    assert not out.exists()
    assert (ahead.state, ahead.num_rows, ahead.num_units, ahead.unit_rows) == ("new", 120, 8, 16)
    assert ahead.sampled == 32
    assert sum(ahead.failed.values()) > 0, "every 20th photo is cut short"
    assert set(ahead.stage_ms) == {"fetch", "decode", "classify"}
    assert ahead.hours is not None
    run = plan_run(photo_config, "cpu")
    assert (run.run_id, run.plan.layout.num_units) == (ahead.run_id, ahead.num_units)
    assert forecast(photo_config).state == "unfinished"
    classify(photo_config)
    done = forecast(photo_config)
    assert (done.state, done.units_done, done.hours) == ("finished", 8, None)


def test_what_is_left_are_the_rows_of_pending_units(
    photo_config: Config, photo_manifest: Path, photos: list[Path], tmp_path: Path
) -> None:
    """Units end at row groups, here after 10 rows, and stay those of the run whatever is asked for now."""
    table = pq.read_table(photo_manifest).drop_columns("uri")
    embedded = table.append_column("bytes", [[path.read_bytes() for path in photos]])
    pq.write_table(embedded, tmp_path / "embedded.parquet", row_group_size=10)
    config = changed(photo_config, input__manifest=str(tmp_path / "embedded.parquet"))
    run = plan_run(config, "cpu")
    for index in range(9):
        storage.create_if_absent(run.paths.unit_file(index), b"")
    ahead = forecast(changed(config, classify__unit_rows=5))
    assert (ahead.state, ahead.units_done, ahead.num_units, ahead.unit_rows) == ("unfinished", 9, 12, 16)
    assert ahead.hours is not None
    assert ahead.images_per_s is not None
    assert 3600 * ahead.hours == pytest.approx(30 + 30 / ahead.images_per_s)


def test_once_a_run_was_removed_a_forecast_says_what_classify_would_do(
    photo_config: Config, photos: list[Path], tmp_path: Path
) -> None:
    """The second night's run is finished, but what the first one had labelled is to be labelled again."""

    def night(number: int, chosen: list[Path], **flags: object) -> Config:
        manifest = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"uri": [str(photo) for photo in chosen]}), manifest)
        return changed(photo_config, input__manifest=str(manifest), plan__sample_rows=0, **flags)

    first = classify(night(1, photos[:4]))
    second = night(2, photos[:5], input__skip_existing=True)
    finished = classify(second)
    ahead = forecast(second)
    assert (ahead.run_id, ahead.state, ahead.num_rows) == (finished.run_id, "finished", 1)
    remove_run(first.out, first.run_id)
    ahead = forecast(second)
    assert (ahead.state, ahead.num_rows, ahead.units_done) == ("new", 4, 0)
    again = classify(second)
    assert (again.run_id, again.num_rows, again.already_finished) == (ahead.run_id, 4, False)
    for run_id in (again.run_id, finished.run_id):
        remove_run(first.out, run_id)
    ahead = forecast(second)
    assert (ahead.run_id, ahead.state, ahead.num_rows) == (finished.run_id, "new", 5)


def test_a_second_run_is_forecast_where_one_is_asked_for(photo_config: Config) -> None:
    first = classify(photo_config)
    ahead = forecast(changed(photo_config, run__new_run=True, plan__sample_rows=0))
    assert (ahead.run_id, ahead.state) == (f"{first.run_id}-2", "new")


def test_an_unfinished_run_in_the_way_is_warned_of(photo_config: Config) -> None:
    unfinished = plan_run(photo_config, "cpu")
    other = changed(photo_config, output__top_k=1, plan__sample_rows=0)
    with pytest.raises(UsageError) as refused:
        plan_run(other, "cpu")
    (warning,) = forecast(other).warnings
    assert warning == f"classify would stop: {refused.value}"
    given_up = changed(other, run__on_unfinished="abandon")
    assert forecast(given_up).warnings == []
    assert plan_run(given_up, "cpu").run_id != unfinished.run_id
    # Its own settings again are another run.
    again = changed(photo_config, run__on_unfinished="abandon", plan__sample_rows=0)
    ahead = forecast(again)
    assert (ahead.run_id, ahead.state) == (f"{unfinished.run_id}-2", "new")
    assert plan_run(again, "cpu").run_id == ahead.run_id


@pytest.mark.skipif(bool(this_machine().num_gpus), reason="there is a GPU here")
def test_a_model_for_a_gpu_that_is_not_here_is_not_measured(photo_config: Config) -> None:
    pools = {"resources__decode_actors": 2, "resources__classify_actors": 1}
    ahead = forecast(changed(photo_config, resources__device="cuda", report__price_per_hour=2.0, **pools))
    assert set(ahead.stage_ms) == {"fetch", "decode"}
    assert (ahead.limit, ahead.images_per_s, ahead.hours, ahead.cost) == (None, None, None, None)
    (warning,) = [warning for warning in ahead.warnings if "the model was not measured: no GPU here" in warning]
    assert "imgbatch submit --entrypoint-gpus 1 -- plan" in warning


def test_no_image_is_looked_at_where_none_is_wanted(photo_config: Config) -> None:
    blind = forecast(changed(photo_config, plan__sample_rows=0))
    assert (blind.sampled, blind.stage_ms, blind.limit, blind.hours) == (0, {}, None, None)
    assert blind.num_units == 8


def test_what_is_measured_is_what_would_run(
    photo_config: Config, make_bundle: Callable[..., ModelBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle()
    engine = Backend(plant_variant(bundle, "onnx-int8", device="cuda", batch_size=256), device="cuda")
    compiled = Backend(plant_variant(bundle, "torch-compile", device="cuda", batch_size=256), device="cuda")
    automatic = changed(photo_config, classify__batch_size="auto")
    sizes = [
        _batch_size(config, bundle.preprocess, backend, "cuda", 16)
        for config in (automatic, changed(photo_config, classify__batch_size=64))
        for backend in (engine, compiled)
    ]
    assert sizes == [256, 16, 64, 16], "TensorRT would build another engine for units that are smaller"
    for has_it in (True, False):
        monkeypatch.setattr(backends, "has_bfloat16", lambda has_it=has_it: has_it)
        assert _runs_here(Backend(plant_variant(bundle, "openvino-bf16")), "cpu") == has_it
        assert _runs_here(Backend(), "cpu")
    monkeypatch.setattr("imgbatch.runtime.forecast.this_machine", lambda: Machine(2, 1))
    on_gpu = Backend(plant_variant(bundle, "torch-bf16", device="cuda"), device="cuda")
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr("imgbatch.runtime.forecast.local_gpus", lambda found=capability: (Gpu("here", found),))
        assert _runs_here(on_gpu, "cuda") == (capability == (8, 0)), "a cluster's GPUs may run what the head's does not"
        assert _runs_here(Backend(device="cuda"), "cuda")


def test_gpus_that_torch_does_not_compute_on_are_left_out_in_one_line(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = Machine(2, 1, unfit_gpus="torch is for CUDA 13 and the GPU's driver for CUDA 12; install a newer one")
    for place in ("job", "forecast"):
        monkeypatch.setattr(f"imgbatch.runtime.{place}.this_machine", lambda: unfit)
    config = changed(photo_config, resources__device="auto", plan__sample_rows=0)
    remark = f"resources.device auto: the CPU, as {unfit.unfit_gpus}"
    ahead = forecast(config)
    assert (ahead.device, ahead.warnings) == ("cpu", [remark])
    assert not _runs_here(Backend(device="cuda"), "cuda")
    printed = StringIO()
    result = classify(config, Console(file=printed, width=1000))
    assert result.counts["OK"] > 0
    assert printed.getvalue().count(remark) == 1
    for command in (forecast, classify):
        with pytest.raises(UsageError, match=r"^resources\.device cuda: torch is for CUDA 13"):
            command(changed(config, resources__device="cuda"))


def test_a_share_for_the_gpu_where_there_is_none(photo_config: Config) -> None:
    pytest.importorskip("torchcodec", reason="torchcodec is not installed (extra nvjpeg)")
    blind = changed(photo_config, plan__sample_rows=0, decode__gpu_share=0.5)
    assert [warning.partition(":")[0] for warning in forecast(blind).warnings] == ["decode.gpu_share"]


def test_what_a_look_at_the_images_warns_of(photo_config: Config, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (400, 300)).save(large)
    table = pa.table({"uri": [str(large), str(tmp_path / "gone.png")], "target": ["red", "purple"]})
    pq.write_table(table, tmp_path / "m.parquet")
    config = changed(photo_config, input__manifest=str(tmp_path / "m.parquet"))
    warnings = forecast(config).warnings
    expected = ("NOT_FOUND", "300 px", "preprocess.reducing_gap", "'purple'")
    assert [word for word in expected if not any(word in w for w in warnings)] == []
    assert not any("300 px" in w for w in forecast(changed(config, preprocess__reducing_gap=2)).warnings)


def test_the_limit_is_the_slowest_pool_or_the_shared_cores() -> None:
    seconds = {"fetch": 0.002, "decode": 0.002, "classify": 0.001}
    on_gpu = Pools(4, 2, 1, 2, 1, 1.0, 0.5, 1.0)
    assert stage_rates(seconds, on_gpu, "cuda", Machine(10, 1)) == {"decode": 2000, "classify": 1000}
    on_cpu = Pools(1, 2, 1, 2, 1, 0.5, 0.5, 0.0)
    rates = stage_rates(seconds, on_cpu, "cpu", Machine(2, 0))
    assert rates == {"decode": 500, "classify": 2000, "cores": pytest.approx(2 / 0.003)}
    assert stage_rates({}, on_cpu, "cpu", Machine(2, 0)) == {}


def test_units_that_are_too_many_or_too_small_for_one_driver() -> None:
    assert unit_warnings(UnitLayout(128, (1_000_000,)), 4_000.0, 512) == []
    assert unit_warnings(UnitLayout(128, (1_000_000,)), None, 512) == []
    assert unit_warnings(UnitLayout(128, (100_000,)), 12_800.0, 512) == []
    (too_small,) = unit_warnings(UnitLayout(128, (1_000_000,)), 12_800.0, 512)
    assert "could do 100 units a second" in too_small
    assert "raise classify.unit_rows, which is 128, to 512 at most" in too_small
    (too_many,) = unit_warnings(UnitLayout(1, (200_001,)), 30.0, 512)
    assert too_many.startswith("200,001 units")
    (at_the_limit,) = unit_warnings(UnitLayout(512, (10_000_000,)), 51_200.0, 512)
    assert "classify.unit_rows" not in at_the_limit
    assert "cut the manifest" in at_the_limit


def test_classify_actors_that_would_wait_for_a_gpu() -> None:
    given = Pools(4, 2, 4, 2, 1, 1.0, 0.0, 1.0)
    (warning,) = gpu_warnings(given, Machine(16, 2))
    assert warning.startswith("resources.classify_actors is 4 and there are 2 GPUs for them")
    assert gpu_warnings(given, Machine(16, 4)) == []
    assert gpu_warnings(given, Machine(0, 0)) == [], "the cluster starts from zero"
    assert gpu_warnings(replace(given, classify_gpus=0.0), Machine(16, 2)) == []


def test_the_price_is_of_all_nodes() -> None:
    plan = PlanConfig(nodes={"g6.2xlarge": 2, "c7i.4xlarge": 3}, prices={"g6.2xlarge": 1.0, "c7i.4xlarge": 0.5})
    assert price_per_hour(plan, 9.0) == 3.5
    assert price_per_hour(PlanConfig(), 9.0) == 9.0
    with pytest.raises(UsageError, match=r"no price for g6\.2xlarge"):
        price_per_hour(PlanConfig(nodes={"g6.2xlarge": 2}), None)


def test_zones_that_differ_are_told() -> None:
    assert zone_warnings(["a"], ["a"]) == []
    assert zone_warnings(["a"], []) == []
    assert "cross between zones" in zone_warnings(["a", "b"], ["b"])[0]
