"""What is to be trained, checked before anything is decoded, and settled once everything is.

plan_training -> TrainingPlan -> store_start -> (decode its stores) -> settle_job -> TrainingJob
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.config import Config, GeoConfig, TrainConfig
from imgbatch.core import storage
from imgbatch.core.architectures import (
    ARCHITECTURES,
    DEFAULT_ARCHITECTURE,
    HOG_COLOR,
    check_architecture,
    default_preprocess,
)
from imgbatch.core.band_statistics import sample_bands
from imgbatch.core.baselines import BASELINES, check_linear_head
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.model import DESCRIPTION_FILE, ModelBundle, load_bundle, load_network
from imgbatch.core.parallel import MapParts, in_threads
from imgbatch.core.row_decoder import reads_rasters
from imgbatch.core.training.augment import check_augmentation, room_spec
from imgbatch.core.training.crops import CropStore, FailedImage, create_store
from imgbatch.core.training.job import JobPaths, TrainingJob, save_initial, save_job
from imgbatch.core.training.labelled import TRAIN, Labelled, check_class_counts, read_labelled
from imgbatch.core.training.measure import check_metric
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.weights import adapt_channels, fit_network, published_name, read_state_dict
from imgbatch.errors import ErrorBudgetExceeded, UsageError
from imgbatch.schema import BANDS, WINDOW

if TYPE_CHECKING:
    from torch import nn

_UNDECISIVE = {"num_workers", "max_failures", "storage", "weights"}
"""Keys of the section ``train`` that do not change the result; weights count by their content."""


@dataclass(frozen=True)
class TrainingPlan:
    """What is to be trained, checked; nothing is decoded yet."""

    config: Config
    manifest: Manifest
    manifest_identity: str
    labelled: Labelled
    arch: str
    """The network; a baseline's backbone."""
    baseline: str | None
    method: str
    """``fine_tune``, ``linear_probe`` or ``from_scratch``; of a baseline ``frozen``."""
    start: ModelBundle | None
    """The bundle that training starts from, if it does."""
    weights_identity: str | None
    spec: PreprocessSpec
    storage: str
    fingerprint: str

    @property
    def paths(self) -> JobPaths:
        return JobPaths(storage.join(self.storage, f"t{self.fingerprint}"))

    def stores(self) -> dict[str, CropStore]:
        """Where images are decoded to: training images with room for augmentation, the others as they are seen."""
        train_spec = self.spec if self.baseline else room_spec(self.spec, self.config.augment)

        def store(rows_N: np.ndarray, spec: PreprocessSpec) -> CropStore:
            return create_store(self.storage, self.manifest, rows_N, spec, self.config, identity=self.manifest_identity)

        others = next(name for name in self.labelled.splits if name != TRAIN)
        return {
            "train": store(self.stored_rows(TRAIN), train_spec),
            "evaluation": store(self.stored_rows(others), self.spec),
        }

    def stored_rows(self, split: str) -> np.ndarray:
        """The rows in the store that holds a split, int64, rising: train has its own, the others share one."""
        splits = self.labelled.splits
        if split == TRAIN:
            return splits[TRAIN].row_ids_N
        return np.sort(np.concatenate([images.row_ids_N for name, images in splits.items() if name != TRAIN]))


def plan_training(config: Config, map_parts: MapParts = in_threads) -> TrainingPlan:
    """Check everything that can be checked without looking at an image, but for the statistics of rasters' bands.

    Args:
        map_parts: where tiles are read for those.

    Raises:
        UsageError: one line that names the option, column or class at fault.
    """
    train = config.train
    if config.input.manifest is None:
        raise UsageError("input.manifest: not given; name one with --manifest")
    if config.output.path is None:
        raise UsageError("output.path: not given; name a directory with -o")
    baseline = train.arch if train.arch in BASELINES else None
    start = _bundle_at(train.weights)
    arch = _backbone(train, start) if baseline else train.arch
    check_architecture(arch)
    if baseline and train.weights is None and arch != HOG_COLOR:
        raise UsageError(
            f"train.weights: {baseline} needs a trained backbone; name its weights with --weights, "
            f"or take hand-made features: --set train.backbone={HOG_COLOR}"
        )
    method = _resolve_method(train, baseline)
    if start is not None and start.arch != arch:
        raise UsageError(
            f"train.weights: the model at {start.path} is a {start.arch}, not a {arch}; give --arch for it"
        )
    manifest = open_manifest(config.input.manifest)
    labelled = read_labelled(manifest, task=train.task, limit=config.input.limit)
    check_class_counts(labelled, min_images=1 if baseline else 2, where=f"manifest {manifest.path}")
    if start is not None and not baseline:
        labelled = _in_order_of(start, labelled)
    if start is not None:
        _check_bands(config.geo, start)
    if train.metric != "auto" and train.metric != "loss" and not check_metric(train.metric, labelled.task):
        raise UsageError(f"train.metric: {labelled.task} has no {train.metric}; auto fits every task")
    spec = start.preprocess if start else default_preprocess(arch, published_name(train.weights or "") or "DEFAULT")
    try:
        spec = spec.overridden(**config.preprocess.model_dump())
    except ValueError as error:
        raise UsageError(f"preprocess: {error}") from error
    if start is None and reads_bands(config, manifest):
        spec = measured_spec(config, manifest, labelled.splits[TRAIN].row_ids_N, spec, map_parts)
    if spec.bands is not None:
        check_augmentation(config.augment, spec)
    identity = manifest.content_identity()
    weights_identity = _weights_identity(train.weights, start)
    return TrainingPlan(
        config=config,
        manifest=manifest,
        manifest_identity=identity,
        labelled=labelled,
        arch=arch,
        baseline=baseline,
        method=method,
        start=start,
        weights_identity=weights_identity,
        spec=spec,
        storage=storage.absolute(train.storage or storage.join(str(config.output.path), "training")),
        fingerprint=_fingerprint(config, manifest, identity, weights_identity, spec),
    )


def reads_bands(config: Config, manifest: Manifest) -> bool:
    """Whether a model is to be trained on the bands of rasters rather than on RGB."""
    return config.geo.bands is not None or not {WINDOW, BANDS}.isdisjoint(manifest.schema.names)


def measured_spec(
    config: Config, manifest: Manifest, train_rows_N: np.ndarray, spec: PreprocessSpec, map_parts: MapParts
) -> PreprocessSpec:
    """``spec`` for the bands that the configuration asks for, with statistics of a sample of the training tiles."""
    wanted = config.geo.bands
    bands = wanted if isinstance(wanted, tuple) else None
    sample = sample_bands(
        manifest, train_rows_N, bands, num_tiles=config.geo.sample_tiles, config=config, map_parts=map_parts
    )
    return sample.preprocess(spec, config.geo)


def initial_network(plan: TrainingPlan) -> nn.Module:
    """The network before the first step, float32: as the weights and the seed say."""
    import torch

    from imgbatch.core.architectures import build_network, replace_head

    num_classes = len(plan.labelled.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.config.train.seed)
        if plan.weights_identity is None:
            return build_network(
                plan.arch, num_classes, crop_size=plan.spec.crop_size, num_channels=plan.spec.num_channels
            )
        network = _trained_network(plan)
        if plan.baseline or plan.start is None:
            replace_head(network, plan.arch, num_classes)
    if plan.baseline:
        check_linear_head(network, plan.arch)
    return network


def _trained_network(plan: TrainingPlan) -> nn.Module:
    from imgbatch.core.forest import refuse_forest

    if plan.start is not None:
        network = load_network(replace(plan.start, preprocess=plan.spec))
        refuse_forest(network, plan.arch, where=f"train.weights: the model at {plan.start.path}")
        return network
    weights = str(plan.config.train.weights)
    state_dict = adapt_channels(plan.arch, read_state_dict(weights, plan.arch), plan.spec.num_channels)
    return fit_network(plan.arch, state_dict, crop_size=plan.spec.crop_size, where=f"--weights {weights}").float()


def store_start(plan: TrainingPlan) -> None:
    """Store the weights before the first step, unless the job is settled: what is wrong is said before decoding.

    Raises:
        UsageError: they cannot be had or do not fit the network, or there are too few images for a batch.
    """
    if not storage.exists(plan.paths.description):
        _check_batch(plan.config.train, len(plan.labelled.splits[TRAIN]))
        save_initial(plan.paths, initial_network(plan).state_dict())


def settle_job(plan: TrainingPlan, stores: dict[str, CropStore]) -> tuple[TrainingJob, list[FailedImage]]:
    """Store the job after :func:`store_start`, without the images that could not be decoded, which are returned.

    Raises:
        UsageError: too few images of a class are left, or too few for a batch.
        ErrorBudgetExceeded: more than ``errors.max_rate`` of the images failed.
    """
    failed = [image for store in stores.values() for image in store.failed_images()]
    num_images = sum(store.num_rows for store in stores.values())
    if len(failed) > plan.config.errors.max_rate * num_images:
        first = failed[0]
        raise ErrorBudgetExceeded(
            f"{len(failed):,} of {num_images:,} images cannot be used, more than errors.max_rate "
            f"{plan.config.errors.max_rate:g}; the first: {first.uri or first.row_id}: {first.status}: {first.message}"
        )
    failed_rows = [image.row_id for image in failed]
    splits = {
        name: images.take(~np.isin(images.row_ids_N, failed_rows)) for name, images in plan.labelled.splits.items()
    }
    usable = Labelled(plan.labelled.task, plan.labelled.class_names, splits, plan.labelled.num_unused)
    where = f"manifest {plan.manifest.path}, images that can be decoded"
    if not all(len(images) for images in splits.values()):
        raise UsageError(f"{where}: a split is empty")
    check_class_counts(usable, min_images=1 if plan.baseline else 2, where=where)
    _check_batch(plan.config.train, len(splits[TRAIN]))
    job = TrainingJob(
        paths=plan.paths,
        config=plan.config,
        arch=plan.arch,
        baseline=plan.baseline,
        method=plan.method,
        keeps_head=plan.start is not None and plan.baseline is None,
        task=plan.labelled.task,
        class_names=plan.labelled.class_names,
        spec=plan.spec,
        stores=stores,
        splits=splits,
        positions={name: np.searchsorted(plan.stored_rows(name), images.row_ids_N) for name, images in splits.items()},
    )
    if not storage.exists(job.paths.description):
        save_job(job)
    return job, failed


def _in_order_of(start: ModelBundle, labelled: Labelled) -> Labelled:
    """What the manifest teaches in the order of the bundle's logits; raises :class:`UsageError` for other classes."""
    if {*start.class_names} != {*labelled.class_names}:
        raise UsageError(
            f"train.weights: the model at {start.path} has other classes ({', '.join(start.class_names[:5])}, …) "
            f"than the manifest ({', '.join(labelled.class_names[:5])}, …); give its model.safetensors for a new head"
        )
    return labelled.in_order(start.class_names)


def _check_bands(geo: GeoConfig, start: ModelBundle) -> None:
    """Raise :class:`UsageError` where other bands are asked for than those of the bundle, which training keeps."""
    bands = start.preprocess.bands
    limits = {*zip(bands.low, bands.high, strict=True)} if bands else set()
    differs = {
        "bands": geo.bands is not None and (bands is None or geo.bands not in ("all", bands.indices)),
        "stretch": geo.stretch != GeoConfig().stretch and (bands is None or geo.stretch != bands.stretch),
        # Another stretch than the physical one makes no use of it.
        "value_range": geo.value_range is not None
        and (bands is None or bands.stretch == "physical")
        and limits != {geo.value_range},
    }
    if option := next((name for name, is_other in differs.items() if is_other), None):
        raise UsageError(
            f"geo.{option}: the model at {start.path} keeps its own preprocessing ({start.preprocess.describe()}); "
            "leave it out, or give its model.safetensors for a new head"
        )


def _backbone(train: TrainConfig, start: ModelBundle | None) -> str:
    """What the weights are of: as the configuration says, as their bundle says, or as their file's name begins."""
    if train.backbone != "auto" or train.weights is None:
        return DEFAULT_ARCHITECTURE if train.backbone == "auto" else train.backbone
    if start is not None:
        return start.arch
    file_name = train.weights.rsplit("/", 1)[-1]
    return max((arch for arch in ARCHITECTURES if file_name.startswith(arch)), key=len, default=DEFAULT_ARCHITECTURE)


def _resolve_method(train: TrainConfig, baseline: str | None) -> str:
    if baseline:
        return "frozen"
    if train.method == "auto":
        return "from_scratch" if train.weights is None else "fine_tune"
    if train.method == "from_scratch" and train.weights is not None:
        raise UsageError("train.weights: from_scratch starts without weights; leave them out, or fine_tune")
    if train.method != "from_scratch" and train.weights is None:
        raise UsageError(f"train.weights: {train.method} starts from weights; name them with --weights")
    return train.method


def _bundle_at(weights: str | None) -> ModelBundle | None:
    if weights is None or published_name(weights) or not storage.exists(storage.join(weights, DESCRIPTION_FILE)):
        return None
    return load_bundle(weights)


def _weights_identity(weights: str | None, start: ModelBundle | None) -> str | None:
    if weights is None or start is not None:
        return start.model_id if start else None
    if name := published_name(weights):
        return name
    try:
        return storage.sha256(weights)
    except OSError as error:
        raise UsageError(f"--weights {weights}: {error.strerror or error}") from error


def _check_batch(train: TrainConfig, num_images: int) -> None:
    """A worker needs a pair of images for every forward pass."""
    workers = train.num_workers if isinstance(train.num_workers, int) else 1
    least = 2 * workers * train.accumulate
    size = min(train.batch_size, num_images)
    if size < least:
        raise UsageError(
            f"train.batch_size: {size} images are too few for {workers} workers and accumulate {train.accumulate}, "
            f"which need {least}; take fewer workers"
        )


def _fingerprint(
    config: Config, manifest: Manifest, identity: str, weights_identity: str | None, spec: PreprocessSpec
) -> str:
    decisive: dict[str, Any] = {
        "manifest": identity,
        "limit": config.input.limit,
        "weights": weights_identity,
        "train": config.train.model_dump(mode="json", exclude=_UNDECISIVE),
        "augment": config.augment.model_dump(mode="json"),
        "spec": spec.to_dict(),
        "max_pixels": config.decode.max_pixels,
    }
    # The default is left out, so that trainings from before it counted are found again.
    if reads_rasters(manifest.schema.names, spec) and config.geo.max_nodata != GeoConfig().max_nodata:
        decisive["max_nodata"] = config.geo.max_nodata
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
