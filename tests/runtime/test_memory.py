from __future__ import annotations

import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core.architectures import build_network
from imgbatch.core.backends import Backend
from imgbatch.core.gpu_share import MAX_ENCODED_BYTES
from imgbatch.core.model import ModelBundle, float32_bytes, load_bundle, save_bundle
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.variants import load_variants
from imgbatch.runtime.job import classify
from imgbatch.runtime.memory import MemoryBudget, memory_budget, stored_unit_bytes
from imgbatch.runtime.pools import Machine, choose_pools
from tests.conftest import TINY_CLASSES, changed
from tests.core.test_variants import plant_variant

SPEC = PreprocessSpec()
ACTOR_BYTES = 180 * 10**6
UNIT_ROWS = 128
KINDS = {"DecodeActor": "decode_actor", "ClassifyActor": "classify_actor", "imgbatch.core.decode_child": "decode_child"}


class PeakPrivateMemory:
    """Of each kind of process below ``roots``, bytes of the largest."""

    def __init__(self, roots: Callable[[], Sequence[psutil.Process]]) -> None:
        self._roots = roots
        self.peaks: dict[str, int] = defaultdict(int)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakPrivateMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            for process in self._roots():
                try:
                    command = " ".join(process.cmdline())
                    kind = next((kind for name, kind in KINDS.items() if name in command), None)
                    if kind is not None:
                        self.peaks[kind] = max(self.peaks[kind], process.memory_full_info().uss)
                except psutil.Error:
                    continue  # it has ended since


@pytest.fixture
def large_units(photo_config: Config, tmp_path: Path) -> Config:
    """Six units of 19 MB each, and a model at 224 px."""
    photos = [uri for uri in pq.read_table(str(photo_config.input.manifest))["uri"].to_pylist() if uri.endswith("jpg")]
    uris = [photos[index % len(photos)] for index in range(6 * UNIT_ROWS)]
    pq.write_table(pa.table({"uri": uris, "image_id": [str(i) for i in range(len(uris))]}), tmp_path / "many.parquet")
    bundle = save_bundle(
        str(tmp_path / "model"),
        arch="simple_cnn",
        task="multiclass",
        class_names=TINY_CLASSES,
        preprocess=SPEC,
        state_dict=build_network("simple_cnn", len(TINY_CLASSES)).state_dict(),
    )
    return changed(
        photo_config,
        input__manifest=str(tmp_path / "many.parquet"),
        model__path=bundle.path,
        classify__unit_rows=UNIT_ROWS,
        classify__engine="ray",
    )


def budget_of(
    config: Config,
    *,
    cpus: int,
    unit_rows: int = UNIT_ROWS,
    weight_bytes: int = 10**5,
    in_flight: int = 32,
    on_cluster: bool = False,
) -> MemoryBudget:
    return memory_budget(
        choose_pools(config.resources, "cpu", Machine(cpus, 0)),
        SPEC,
        Backend(),
        unit_rows=unit_rows,
        batch_size=8,
        weight_bytes=weight_bytes,
        in_flight=in_flight,
        image_pixels=90 * 90,
        on_cluster=on_cluster,
    )


@pytest.mark.usefixtures("ray_local")
def test_actors_stay_within_the_budget(large_units: Config) -> None:
    this = psutil.Process()
    with PeakPrivateMemory(lambda: this.children(recursive=True)) as memory:
        result = classify(large_units)
    assert result.counts["OK"] > 700
    budget, pools = budget_of(large_units, cpus=4), choose_pools(large_units.resources, "cpu", Machine(4, 0))
    allowed = {kind: getattr(budget, kind) for kind in KINDS.values()}
    # A unit that no other process maps for the moment counts as private, though the budget has it among the units.
    allowed["decode_actor"] += 2 * pools.decode_processes * UNIT_ROWS * SPEC.pixel_bytes
    allowed["decode_child"] += UNIT_ROWS * SPEC.pixel_bytes
    allowed["classify_actor"] += pools.classify_calls * UNIT_ROWS * SPEC.pixel_bytes
    assert memory.peaks.keys() == allowed.keys()
    over = {kind: peak for kind, peak in memory.peaks.items() if not allowed[kind] / 5 < peak <= allowed[kind]}
    assert over == {}, f"{over} of {allowed}"


def test_what_the_budget_grows_with(photo_config: Config) -> None:
    budget = budget_of(photo_config, cpus=4)
    doubled = budget_of(photo_config, cpus=4, unit_rows=2 * UNIT_ROWS)
    assert doubled == replace(budget, units=2 * budget.units, total=budget.total + budget.units)
    heavier = budget_of(photo_config, cpus=4, weight_bytes=10**5 + 10**8)
    assert heavier.classify_actor == budget.classify_actor + 4 * 10**8
    calls = choose_pools(photo_config.resources, "cpu", Machine(4, 0)).decode_calls
    more_files = budget_of(photo_config, cpus=4, in_flight=32 + 100)
    assert more_files.decode_actor == budget.decode_actor + calls * 100 * 90 * 90 // 2
    assert budget_of(photo_config, cpus=16).total > budget.total
    assert budget_of(photo_config, cpus=4, on_cluster=True).total == budget.total + 300 * 10**6


def test_a_gpu_has_its_activations_in_its_own_memory_and_encoded_images_beside_the_pixels(photo_config: Config) -> None:
    pools = choose_pools(photo_config.resources, "cuda", Machine(8, 1))

    def budget(batch_size: int, gpu_share: float) -> MemoryBudget:
        return memory_budget(
            pools,
            SPEC,
            Backend(device="cuda"),
            unit_rows=UNIT_ROWS,
            batch_size=batch_size,
            weight_bytes=10**5,
            in_flight=32,
            image_pixels=90 * 90,
            gpu_share=gpu_share,
        )

    # 38,535,168 bytes of pixels take 64 MiB, two for each of two streams; one image of 150,528 takes 256 KiB.
    pinned = budget(256, 0.0).classify_actor - budget(1, 0.0).classify_actor
    assert pinned == 4 * (2**26 - 2**18)
    assert budget(256, 0.0).total - budget(1, 0.0).total == pinned
    on_a_gpu = budget(1, 0.0).classify_actor
    pools = replace(pools, classify_gpus=0.0)
    assert on_a_gpu - budget(1, 0.0).classify_actor == 1500 * 10**6 + 4 * 2**18 - 2 * 224**2 * 192
    with_encoded = UNIT_ROWS * SPEC.pixel_bytes + MAX_ENCODED_BYTES
    assert stored_unit_bytes(UNIT_ROWS, SPEC, 0.5) == with_encoded
    assert budget(256, 0.5).units * UNIT_ROWS * SPEC.pixel_bytes == budget(256, 0.0).units * with_encoded


def test_what_is_compiled_has_its_compilers_beside_it(
    photo_config: Config, make_bundle: Callable[..., ModelBundle]
) -> None:
    bundle = make_bundle()

    def classify_actor(backend: Backend) -> int:
        return memory_budget(
            choose_pools(photo_config.resources, "cuda", Machine(8, 1)),
            SPEC,
            backend,
            unit_rows=UNIT_ROWS,
            batch_size=8,
            weight_bytes=10**5,
            in_flight=32,
            image_pixels=90 * 90,
        ).classify_actor

    eager = classify_actor(Backend(device="cuda"))
    for target, num_compilers in (("torch-bf16", 4), ("torch-compile", 4), ("onnx-int8", 0)):
        variant = plant_variant(bundle, target, device="cuda")
        assert classify_actor(Backend(variant, device="cuda")) - eager == num_compilers * 250 * 10**6


def test_the_budget_in_words(photo_config: Config) -> None:
    pools = choose_pools(photo_config.resources, "cpu", Machine(2, 0))
    words = budget_of(photo_config, cpus=2).describe(pools)
    assert words.startswith("2,") or words.startswith("1,"), words
    assert "1 x " in words
    assert words.endswith(" 600 Ray")


MNN_OF_RESNET18 = """
import sys
import numpy as np, psutil
from imgbatch.core.mnn_build import convert_network
from imgbatch.core.model import load_bundle

if sys.argv[2] == "convert":
    for name, data in convert_network(load_bundle(sys.argv[1])).items():
        open(f"{sys.argv[1]}/{name}", "wb").write(data)
else:
    from imgbatch.core.mnn_predict import MnnPredictor
    bundle = load_bundle(sys.argv[1])
    before = psutil.Process().memory_full_info().uss
    contents = {name: open(f"{sys.argv[1]}/{name}", "rb").read() for name in ("model.mnn", "model.mnn.weight")}
    predictor = MnnPredictor(bundle, contents, batch_size=8, num_threads=1, streams=2)
    predictor.predict(np.zeros((32, 224, 224, 3), np.uint8))
    print(psutil.Process().memory_full_info().uss - before)
"""


@pytest.mark.usefixtures("mnn_model")
def test_mnn_stays_within_the_budget(photo_config: Config, mnn_model: ModelBundle, tmp_path: Path) -> None:
    path = str(tmp_path / "resnet18")
    save_bundle(
        path,
        arch="resnet18",
        task="multiclass",
        class_names=TINY_CLASSES,
        preprocess=SPEC,
        state_dict=build_network("resnet18", len(TINY_CLASSES)).state_dict(),
    )
    for step in ("convert", "run"):
        command = [sys.executable, "-c", MNN_OF_RESNET18, path, step]
        taken = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (variant,) = load_variants(mnn_model)
    budget = memory_budget(
        replace(choose_pools(photo_config.resources, "cpu", Machine(2, 0)), classify_streams=2, classify_threads=1),
        SPEC,
        Backend(variant),
        unit_rows=UNIT_ROWS,
        batch_size=8,
        weight_bytes=float32_bytes(load_bundle(path)),
        in_flight=32,
        image_pixels=90 * 90,
    )
    of_the_model = budget.classify_actor - ACTOR_BYTES
    assert 0 < int(taken) <= of_the_model


def test_each_thread_of_mnn_has_weights_of_its_own(photo_config: Config, mnn_model: ModelBundle) -> None:
    (variant,) = load_variants(mnn_model)
    pools = choose_pools(photo_config.resources, "cpu", Machine(16, 0))
    threads = pools.classify_streams * pools.classify_threads
    assert threads > pools.classify_streams

    def classify_actor(weight_bytes: int) -> int:
        return memory_budget(
            pools,
            SPEC,
            Backend(variant),
            unit_rows=UNIT_ROWS,
            batch_size=8,
            weight_bytes=weight_bytes,
            in_flight=32,
            image_pixels=90 * 90,
        ).classify_actor

    assert classify_actor(2 * 10**6) - classify_actor(10**6) == (4 * threads + 1) * 10**6
