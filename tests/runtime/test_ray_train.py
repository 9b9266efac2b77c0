"""Training on Ray held to the plain loop, also when a worker is killed."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.model import load_bundle, load_network
from imgbatch.core.training.checkpoint import read_epochs
from imgbatch.core.training.crops import decode_crops
from imgbatch.core.training.loop import run_training
from imgbatch.core.training.plan import plan_training
from imgbatch.core.training.workers import Worker
from imgbatch.errors import ErrorBudgetExceeded, ImgbatchError, UsageError
from imgbatch.runtime.ray_train import share_of_cores
from imgbatch.runtime.train import train
from tests.conftest import RAY_CPUS, changed
from tests.core.training.conftest import settle

_EPOCHS = 20
"""Enough that a worker is killed long before the last."""

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def config(colour_config: Config) -> Config:
    """Frozen batch norms, because statistics of half a batch are others than those of a whole one."""
    return changed(colour_config, train__batch_norm="frozen", augment__mixup=0.2, train__ema_decay=0.9)


def on_ray(config: Config, tmp_path: Path, **flags: object) -> Config:
    paths = {"output__path": str(tmp_path / "on_ray"), "train__storage": (tmp_path / "ray_work").as_uri()}
    return changed(config, classify__engine="ray", train__num_workers=2, **paths, **flags)


def assert_same_model(config: Config, oracle: Config) -> None:
    """Weights within what the order of additions changes."""
    ours, theirs = (load_network(load_bundle(str(c.output.path))).state_dict() for c in (config, oracle))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_two_workers_give_what_one_gives(config, tmp_path):
    expected = train(config)
    shared = on_ray(config, tmp_path)
    decode_crops(plan_training(shared).stores()["evaluation"], shared)  # as a pool of actors takes 10 s to start
    result = train(shared)
    assert_same_model(shared, config)
    assert result.metrics["steps"] == expected.metrics["steps"]
    assert result.metrics["test"]["loss"] == pytest.approx(expected.metrics["test"]["loss"], rel=1e-3)
    assert result.bundle.provenance["hardware"]["workers"] == 2


@pytest.mark.parametrize(
    ("cores", "local_workers", "on_cpu", "on_gpu"),
    [(2, 1, (2, 0), (1, 1)), (64, 4, (16, 0), (1, 8)), (7, 2, (3, 0), (1, 2)), (1, 2, (1, 0), (1, 0))],
)
def test_a_worker_takes_its_share_of_its_own_machine(cores, local_workers, on_cpu, on_gpu):
    assert share_of_cores(cores, local_workers, use_gpu=False) == on_cpu
    assert share_of_cores(cores, local_workers, use_gpu=True) == on_gpu


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train__num_workers": RAY_CPUS + 1}, "5 workers take a CPU each, and there is room for 4; take fewer"),
        ({"resources__device": "cuda"}, "1 workers take a GPU and a CPU each, and there is room for 0; take fewer"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(config, flags, message):
    with pytest.raises(UsageError, match=f"train.num_workers: {message}"):
        train(changed(config, classify__engine="ray", **flags))


def test_workers_that_a_cluster_never_has_room_for_end_training(config, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    flags = {"train__num_workers": RAY_CPUS + 1, "train__max_failures": 1, "ray__address": "auto"}
    config = changed(config, classify__engine="ray", **flags)
    settle(config)
    printed = io.StringIO()
    with pytest.raises(ImgbatchError, match="training: its workers found no place to start, each time; take fewer"):
        train(config, Console(file=printed, width=200))
    assert "5 workers take a CPU each, and there is room for 4 now; training waits" in printed.getvalue()


def test_decoding_on_ray_stops_as_soon_as_too_many_images_fail(config_of_nothing):
    with pytest.raises(ErrorBudgetExceeded, match=r"8 of the last 8 rows failed, .* NOT_FOUND \(.*gone\d+.png: "):
        train(changed(config_of_nothing, classify__engine="ray"))


@pytest.mark.soak
def test_a_worker_that_fails_leaves_no_copies_of_images(config, s3_bucket, tmp_path, monkeypatch):
    of_workers = Path(tempfile.gettempdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # here, not in workers
    config = changed(config, train__storage=f"{s3_bucket}/work", train__max_failures=0)
    job, _ = settle(config)
    store = job.stores["evaluation"]
    storage.replace(store.pixels_file(0), b"damaged")
    with pytest.raises(ImgbatchError, match="training: "):
        train(changed(config, classify__engine="ray", train__num_workers=1))
    assert not (of_workers / store._copy_directory.name).exists()


@pytest.mark.soak
def test_a_training_that_goes_on_tells_of_new_epochs_only(config):
    class Stop(Exception):
        pass

    def stop(record: dict[str, object]) -> None:
        if record["epoch"] == 2:
            raise Stop

    config = changed(config, train__epochs=4)
    job, _ = settle(config)
    with pytest.raises(Stop):
        run_training(job, Worker(torch.device("cpu")), stop)
    printed = io.StringIO()
    train(changed(config, classify__engine="ray", train__num_workers=1), Console(file=printed, width=200))
    told = [line.split(",")[0] for line in printed.getvalue().splitlines() if line.startswith("epoch ")]
    assert told == ["epoch 3 of 4", "epoch 4 of 4"]


@pytest.mark.soak
def test_a_killed_worker_changes_nothing(config, tmp_path):
    config = changed(config, train__epochs=_EPOCHS)
    disturbed = on_ray(config, tmp_path)
    paths = plan_training(disturbed).paths
    killed: list[int] = []
    finished = threading.Event()

    def kill_a_worker() -> None:
        while len(read_epochs(paths)) < 3 and not finished.is_set():
            time.sleep(0.02)
        while not killed and not finished.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if not killed and "RayTrainWorker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    try:
        train(disturbed)
    finally:
        finished.set()
        killer.join()
    assert killed
    train(config)
    ours, theirs = (
        [record["train_loss"] for record in read_epochs(plan_training(each).paths)[1:]] for each in (disturbed, config)
    )
    assert len(ours) == _EPOCHS
    assert ours == pytest.approx(theirs, rel=0.01)
    assert_same_model(disturbed, config)


@pytest.mark.soak
def test_a_training_that_cannot_work_is_one_line_and_not_tried_again(config, tmp_path):
    hopeless = changed(config, train__learning_rate=1e30, train__clip_norm=0.0, train__optimizer="sgd")
    with pytest.raises(ImgbatchError, match=r"the loss of epoch \d is not finite") as caught:
        train(on_ray(hopeless, tmp_path))
    assert "\n" not in str(caught.value)
