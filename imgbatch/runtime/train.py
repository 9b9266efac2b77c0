"""Fine-tuning, whatever the engine: plan, decode once, train, measure, write the bundle.

plan_training -> store_start -> decode crops -> settle_job -> epochs (each a checkpoint) -> save_trained
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from rich.console import Console

from imgbatch.config import Config, ResourcesConfig
from imgbatch.core import storage
from imgbatch.core.architectures import build_network
from imgbatch.core.baselines import has_linear_head
from imgbatch.core.budget import ErrorBudget
from imgbatch.core.model import DESCRIPTION_FILE, ModelBundle, load_bundle, load_metrics
from imgbatch.core.plan import DeviceKind
from imgbatch.core.results import Receipt
from imgbatch.core.training.checkpoint import json_lines, read_epochs
from imgbatch.core.training.crops import CropStore, FailedImage, OnPart, decode_crops
from imgbatch.core.training.finish import describe_hardware, save_trained
from imgbatch.core.training.job import TrainingJob, load_job
from imgbatch.core.training.labelled import TRAIN
from imgbatch.core.training.plan import TrainingPlan, plan_training, settle_job, store_start
from imgbatch.core.training.space import check_space
from imgbatch.errors import Status, UsageError
from imgbatch.runtime.parts import map_parts_of
from imgbatch.runtime.pools import Machine, choose_device, device_remarks, this_machine
from imgbatch.runtime.progress import RunProgress
from imgbatch.runtime.reporter import Reporter

OnEpoch = Callable[[dict[str, Any]], None]

_WORK = re.compile(r"(t|crops-)[0-9a-f]{12}")
"""Directories of jobs and of decoded images."""


class TrainEngine(Protocol):
    """What runs the two parts of training that take long."""

    def decode(self, store: CropStore, config: Config, on_part: OnPart) -> None:
        """Decode the parts of a store that are missing, calling ``on_part`` with the report of each."""

    def run(self, job: TrainingJob, on_epoch: OnEpoch) -> None:
        """Train until outcome.json is there, calling ``on_epoch`` with every record that is new."""


@dataclass(frozen=True)
class TrainResult:
    """A trained model."""

    bundle: ModelBundle
    metrics: dict[str, Any]
    """As in metrics.json."""
    failed: tuple[FailedImage, ...]
    """Images that were left out."""
    already_finished: bool
    """Whether there was nothing to do."""


def train(config: Config, console: Console | None = None, *, overwrite: bool = False) -> TrainResult:
    """Train a model and write its bundle to ``output.path``; the same configuration again continues or finds it done.

    Args:
        console: where progress goes; none: nowhere.
        overwrite: replace another model that is there.

    Raises:
        UsageError: bad input or configuration, or another model is in the way.
        ErrorBudgetExceeded: too many images cannot be used.
        ImgbatchError: training failed more than ``train.max_failures`` times, or there is no space.
    """
    console = console or Console(quiet=True)
    storage.configure(config.storage)
    with _session(config):
        config = _resolve(config, console)
        plan = plan_training(config, map_parts_of(config))
        if _is_finished(plan, overwrite=overwrite):
            bundle = load_bundle(str(config.output.path))
            return TrainResult(bundle, load_metrics(bundle.path), (), already_finished=True)
        storage.check_writable(plan.storage)
        engine = _build_engine(config)
        stores = _choose_stores(plan)
        check_space(plan, stores)
        store_start(plan)
        _decode(engine, stores, config, console)
        job, failed = settle_job(plan, stores)
        _announce(plan, job, failed, console)
        records = _Records(plan, job, console)
        try:
            records.draw_contact_sheet()
            if not storage.exists(job.paths.outcome):
                engine.run(job, records.add)
            records.draw_curves(failed)
        finally:
            job.remove_local_copies()
    num_workers, device = int(config.train.num_workers), config.resources.device
    hardware = describe_hardware(num_workers=num_workers, device=device)
    bundle = save_trained(plan, job, failed, hardware=hardware)
    if config.train.storage is None:
        _remove_work(plan.storage)
    return TrainResult(bundle, load_metrics(bundle.path), tuple(failed), already_finished=False)


def _choose_stores(plan: TrainingPlan) -> dict[str, CropStore]:
    """Where the images are: those of a job that is settled, whatever limits this command decodes with, or new ones."""
    if storage.exists(plan.paths.description):
        settled = load_job(plan.paths.directory).stores
        if all(storage.exists(store.rows_file) for store in settled.values()):
            return settled
        return plan.stores()
    stores = plan.stores()
    for store in stores.values():
        store.forget_what_may_pass()
    return stores


def _decode(engine: TrainEngine, stores: dict[str, CropStore], config: Config, console: Console) -> None:
    """Decode what is missing; raises :class:`ErrorBudgetExceeded` as soon as too many images fail."""
    budget = ErrorBudget(config.errors)
    total = sum(store.num_rows for store in stores.values())
    missing = sum(store.rows_in(part) for store in stores.values() for part in store.missing_parts())
    reporter = Reporter(console, run_id="", as_json=False)
    with RunProgress(reporter, total_rows=total, done_rows=total - missing, num_actors={}) as progress:

        def add(report: dict[str, Any]) -> None:
            receipt = _receipt(report)
            progress.add(receipt)
            budget.add(receipt)

        for store in stores.values():
            engine.decode(store, config, add)


def _receipt(report: dict[str, Any]) -> Receipt:
    """A part's report as that of a unit."""
    failed = report["failed"]
    counts = Counter(image["status"] for image in failed)
    counts[Status.OK.value] = report["num_rows"] - len(failed)
    examples = {image["status"]: f"{image['uri'] or image['row_id']}: {image['message']}" for image in failed}
    return Receipt(0, "committed", report["num_rows"], counts, examples)


def _remove_work(directory: str) -> None:
    """Jobs and decoded images, also of trainings that were given up; what a person looks at stays."""
    prefix = storage.listing_prefix(directory)
    names = {info.uri.removeprefix(prefix).split("/", 1)[0] for info in storage.iter_files(directory)}
    for name in names:
        if _WORK.fullmatch(name):
            storage.remove(storage.join(directory, name))


class LocalTrainEngine:
    """One worker in this process, without Ray: for tests, notebooks and debugging."""

    def decode(self, store: CropStore, config: Config, on_part: OnPart) -> None:
        decode_crops(store, config, on_part)

    def run(self, job: TrainingJob, on_epoch: OnEpoch) -> None:
        import torch

        from imgbatch.core.training.loop import run_training
        from imgbatch.core.training.workers import Worker

        device = torch.device(job.config.resources.device)
        run_training(load_job(job.paths.directory), Worker(device), on_epoch)


class _Records:
    """Every epoch as a line for a person, and as files beside the bundle."""

    def __init__(self, plan: TrainingPlan, job: TrainingJob, console: Console) -> None:
        self._job = job
        self._console = console
        self._directory = storage.join(str(plan.config.output.path), "training")
        self._started = time.monotonic()
        self._first_epoch: int | None = None

    def add(self, record: dict[str, Any]) -> None:
        if self._first_epoch is None:
            self._first_epoch, self._started = record["epoch"], time.monotonic()
        self._console.print(self._line(record), markup=False)

    def draw_contact_sheet(self) -> None:
        """What the network will see, as a picture."""
        if self._job.baseline is None:
            self._draw("augmented.png", lambda: _contact_sheet(self._job))

    def draw_curves(self, failed: list[FailedImage]) -> None:
        """epochs.jsonl, the curves, TensorBoard's events and the list of images that were left out."""
        records = read_epochs(self._job.paths)
        storage.replace(storage.join(self._directory, "epochs.jsonl"), json_lines(records))
        if failed:
            storage.replace(storage.join(self._directory, "left_out.jsonl"), json_lines(map(asdict, failed)))
        if len(records) > 1:
            from imgbatch.report.plots import training_curves, write_tensorboard

            self._draw("curves.png", lambda: training_curves(records))
            if storage.is_local(self._directory):
                self._try(lambda: write_tensorboard(records, storage.join(self._directory, "tensorboard")))

    def _draw(self, name: str, picture: Callable[[], bytes]) -> None:
        self._try(lambda: storage.replace(storage.join(self._directory, name), picture()))

    def _try(self, action: Callable[[], None]) -> None:
        """A picture that cannot be drawn is no reason to lose a training."""
        try:
            action()
        except Exception as error:
            self._console.print(str(error), markup=False)

    def _line(self, record: dict[str, Any]) -> str:
        validation = record["validation"]
        name = next(n for n in ("mean_average_precision", "top1") if n in validation)
        parts = [self._job.baseline or f"epoch {record['epoch']} of {self._job.train.epochs}"]
        if record["train_loss"] is not None:
            parts.append(f"loss {record['train_loss']:.4f}")
        value = "–" if validation[name] is None else f"{validation[name]:.4f}"
        parts.append(f"validation {name} {value}{' (best)' if record['is_best'] else ''}")
        if record["images_per_s"]:
            parts.append(f"{record['images_per_s']:,.0f} images/s")
        done = record["epoch"] - int(self._first_epoch or 0)
        if done > 0:
            left = (time.monotonic() - self._started) / done * (self._job.train.epochs - record["epoch"])
            parts.append(f"{int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} left")
        return ", ".join(parts)


def _contact_sheet(job: TrainingJob) -> bytes:
    from imgbatch.core.training.images import sample_augmented
    from imgbatch.report.plots import contact_sheet

    images_NHWC, captions = sample_augmented(job)
    return contact_sheet(images_NHWC, captions)


def _announce(plan: TrainingPlan, job: TrainingJob, failed: list[FailedImage], console: Console) -> None:
    counts = ", ".join(f"{len(images):,} {split}" for split, images in job.splits.items())
    what = f"{job.baseline} on {job.arch}" if job.baseline else f"{job.arch}, {job.method}"
    console.print(
        f"{what}: {job.task}, {len(job.class_names)} classes, {counts} images; {job.spec.describe()}", markup=False
    )
    if job.head_images < len(job.splits[TRAIN]) and not job.keeps_head:
        network = build_network(job.arch, len(job.class_names), empty=True)
        if has_linear_head(network, job.arch):
            chosen = f"{job.head_images:,} training images, evenly of each class"
            console.print(f"the new head is fitted to {chosen}; then all layers are trained on all", markup=False)
    if plan.labelled.num_unused:
        console.print(f"{plan.labelled.num_unused:,} rows are in no split that training knows", markup=False)
    if failed:
        first = failed[0]
        console.print(
            f"{len(failed):,} images left out; the first: {first.uri or first.row_id}: {first.status}: {first.message}",
            markup=False,
        )


def _is_finished(plan: TrainingPlan, *, overwrite: bool) -> bool:
    """Whether the output holds this very model; raises :class:`UsageError` if it holds another or a damaged one."""
    out = str(plan.config.output.path)
    if not storage.exists(storage.join(out, DESCRIPTION_FILE)):
        return False
    try:
        there = load_bundle(out)
    except UsageError:
        if overwrite:
            return False
        raise
    if there.provenance.get("fingerprint") == plan.fingerprint:
        return True
    if not overwrite:
        raise UsageError(f"{out}: holds another model ({there.model_id}); choose another place, or --overwrite it")
    return False


def _resolve(config: Config, console: Console) -> Config:
    """Paths that mean the same in every process, and numbers in place of ``auto``."""
    machine = _machine(config)
    device = choose_device(config.resources, machine)
    for line in device_remarks(config.resources, machine):
        console.print(line, markup=False)
    num_workers = _num_workers(config, machine, device, console)
    train_config = config.train.model_copy(update={"num_workers": num_workers})
    updates: dict[str, Any] = {
        "train": train_config,
        "resources": config.resources.model_copy(update={"device": device}),
    }
    if config.input.manifest is not None:
        absolute = storage.absolute(config.input.manifest)
        updates["input"] = config.input.model_copy(update={"manifest": absolute})
    if config.output.path is not None:
        updates["output"] = config.output.model_copy(update={"path": storage.absolute(config.output.path)})
    return config.model_copy(update=updates)


def _num_workers(config: Config, machine: Machine, device: DeviceKind, console: Console) -> int:
    """``train.num_workers`` in numbers.

    Raises:
        UsageError: more than this machine can run at once; a cluster may grow, so there it is only said.
    """
    asked = config.train.num_workers
    room = min(machine.num_cpus, machine.num_gpus) if device == "cuda" else machine.num_cpus
    num_workers = asked if isinstance(asked, int) else max(1, room) if device == "cuda" else 1
    if config.classify.engine == "local":
        if num_workers > 1:
            raise UsageError("train.num_workers: the local engine has one worker; take the ray engine for more")
    elif num_workers > room:
        each = "a GPU and a CPU" if device == "cuda" else "a CPU"
        lacking = f"train.num_workers: {num_workers} workers take {each} each, and there is room for {room}"
        if not config.on_cluster:
            raise UsageError(f"{lacking}; take fewer")
        console.print(f"{lacking} now; training waits for more nodes, and ends if none come", markup=False)
    return num_workers


def _session(config: Config) -> AbstractContextManager[object]:
    if config.classify.engine == "local":
        return nullcontext()
    from imgbatch.runtime.session import ray_session

    return ray_session(config)


def _machine(config: Config) -> Machine:
    here = this_machine()
    if config.classify.engine == "local":
        return here
    from imgbatch.runtime.session import cluster_machine

    there = cluster_machine(ResourcesConfig())  # workers have no labels
    return there if config.on_cluster else replace(there, node_cpus=0, unfit_gpus=here.unfit_gpus)


def _build_engine(config: Config) -> TrainEngine:
    if config.classify.engine == "local":
        return LocalTrainEngine()
    from imgbatch.runtime.ray_train import RayTrainEngine

    return RayTrainEngine()
