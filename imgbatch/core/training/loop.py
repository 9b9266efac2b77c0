"""One worker's part in training: fit the head, then epochs of steps, each measured; go on from the last checkpoint.

Legend of shape suffixes: B image of the batch, N image of the split, C channel, H height, W width, D feature, K class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from imgbatch.core import storage
from imgbatch.core.architectures import build_network, forward_features, head_module_name
from imgbatch.core.baselines import LOGISTIC_REGRESSION, fit_head, has_linear_head
from imgbatch.core.failpoints import failpoint
from imgbatch.core.forest import adopt_forest
from imgbatch.core.machine import keep_freed_memory
from imgbatch.core.training.augment import derived_seed, mix_pairs
from imgbatch.core.training.checkpoint import (
    load_best,
    load_last,
    load_weights,
    remove_earlier_best,
    save_best,
    save_last,
)
from imgbatch.core.training.images import (
    AugmentedImages,
    Batch,
    Normaliser,
    iter_evaluation_batches,
    iter_training_batches,
)
from imgbatch.core.training.job import TrainingJob
from imgbatch.core.training.labelled import TRAIN, VALIDATION
from imgbatch.core.training.losses import build_loss, class_weights
from imgbatch.core.training.measure import choose_label_thresholds, measure, score
from imgbatch.core.training.optimisation import (
    AveragedWeights,
    build_optimizer,
    parameter_groups,
    rate_factor,
    set_rates,
    shrink_weights,
    warmup_steps,
)
from imgbatch.core.training.sampling import BatchPlan, Draw, balancing_weights, spread_over_classes
from imgbatch.core.training.space import check_copy_space
from imgbatch.core.training.workers import Worker
from imgbatch.errors import ImgbatchError

Report = Callable[[dict[str, Any]], None]
"""Told of every epoch's record."""

_CPU_BATCH, _GPU_BATCH = 32, 256
_NOISE = 2
"""Keeps the seed of dropout apart from those of other uses."""


class _Clocks:
    """Time on the clock and of this process's CPUs since it was made."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s = time.perf_counter(), time.process_time()

    def elapsed(self) -> _Clocks:
        passed = _Clocks()
        passed.wall_s -= self.wall_s
        passed.cpu_s -= self.cpu_s
        return passed


def run_training(job: TrainingJob, worker: Worker, report: Report) -> None:
    """Train, from the last checkpoint if there is one, and write outcome.json; every worker calls it.

    Raises:
        ImgbatchError: the loss is not finite, or there is no space for a checkpoint or for copies of images.
    """
    check_copy_space(job)
    if job.train.deterministic:
        torch.use_deterministic_algorithms(True)
    trainer = Trainer(job, worker)
    saved = load_last(job.paths)
    if saved is None:
        trainer.start(report)
    else:
        trainer.resume(*saved)
    if job.baseline is None:
        trainer.run_epochs(report)
    trainer.conclude()


class Trainer:
    """The state of a training on one worker."""

    def __init__(self, job: TrainingJob, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self.head = head_module_name(job.arch)
        spec = job.spec
        network = build_network(
            job.arch, len(job.class_names), crop_size=spec.crop_size, num_channels=spec.num_channels
        )
        network.load_state_dict(load_weights(job.paths.initial))
        if worker.device.type == "cpu":
            keep_freed_memory()
        self.network = network.to(worker.device).to(memory_format=torch.channels_last)
        self.normalise = Normaliser(job.spec, worker.device)
        if job.method == "linear_probe":
            self.network.requires_grad_(False)
            self.network.get_submodule(self.head).requires_grad_(True)
        self.optimizer = build_optimizer(parameter_groups(self.network, self.head, job.train), job.train)
        self.average = AveragedWeights(self.network, job.train.ema_decay) if job.train.ema_decay else None
        self.batches = BatchPlan(
            num_images=len(job.splits[TRAIN]),
            batch_size=job.train.batch_size,
            seed=job.train.seed,
            world_size=worker.world_size,
            rank=worker.rank,
            accumulate=job.train.accumulate,
        )
        self.epoch = 0
        """Epochs that are finished."""
        self.history: list[dict[str, Any]] = []

    def start(self, report: Report) -> None:
        """Fit the head to frozen features where it is new, and measure what training starts from as epoch 0."""
        started = _Clocks()
        if self.job.method != "from_scratch" and not self.job.keeps_head:
            self._fit_head()
        self._finish_epoch({"stage": "head", "steps": 0, "train_loss": None, "learning_rate": 0.0}, started, report)

    def resume(self, state: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """Go on from a checkpoint."""
        self._load(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.epoch, self.history = int(state["epoch"]), history

    def _load(self, state_dict: dict[str, Tensor]) -> None:
        adopt_forest(self.network, self.job.arch, _shapes(state_dict))
        self.network.load_state_dict(state_dict)

    def run_epochs(self, report: Report) -> None:
        """The epochs that are left, until the last one or until patience is at its end."""
        train, job = self.job.train, self.job
        if self._is_exhausted() or self.epoch >= train.epochs:
            return
        images, num_classes = job.splits[TRAIN], len(job.class_names)
        counts_K = images.class_counts(num_classes)
        weights_N = balancing_weights(images.truth, counts_K) if train.imbalance == "sampler" else None
        weights_K = class_weights(counts_K, len(images), job.task) if train.imbalance == "weights" else None
        loss_of = build_loss(
            job.task, kind=train.loss, label_smoothing=train.label_smoothing, class_weights_K=weights_K
        )
        trains_statistics = self._set_training_mode()
        self._drop_features()
        shared = self.worker.share(self.network, has_statistics=trains_statistics)

        def passes() -> Iterator[list[Draw]]:
            for epoch in range(self.epoch + 1, train.epochs + 1):
                yield from self.batches.passes(epoch, weights_N)

        batches = iter_training_batches(AugmentedImages(job), passes(), self.worker)
        while self.epoch < train.epochs and not self._is_exhausted():
            started = _Clocks()
            self._set_training_mode()
            mean_loss = self._run_steps(shared, batches, loss_of)
            stage = "head" if job.method == "linear_probe" else "all"
            steps = self.epoch * self.batches.steps_per_epoch
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            record = {"stage": stage, "steps": steps, "train_loss": mean_loss, "learning_rate": rate}
            self._finish_epoch(record, started, report)

    def conclude(self) -> None:
        """Measure the best epoch on every split but train and write outcome.json.

        A multilabel model's labels apply from the probabilities that are best for F1 on the validation split.
        """
        self.worker.barrier()
        job = self.job
        best = next(record for record in reversed(self.history) if record["is_best"])
        self._load(load_best(job.paths, best["epoch"]))
        label_thresholds = None
        if job.task == "multilabel":
            truth_NK = job.splits[VALIDATION].truth
            label_thresholds = choose_label_thresholds(self._probs(VALIDATION, exact=True), truth_NK, job.class_names)
        metrics = {
            split: self._measure(split, per_class=True, exact=True, label_thresholds=label_thresholds)
            for split in job.splits
            if split != TRAIN
        }
        if self.worker.is_first:
            outcome = {
                "best_epoch": best["epoch"],
                "epochs": self.epoch,
                "steps": self.history[-1]["steps"],
                "train_seconds": round(sum(record["seconds"] for record in self.history), 2),
                "metrics": metrics,
                "thresholds": {"labels": label_thresholds} if label_thresholds else None,
            }
            storage.write_json(job.paths.outcome, outcome)

    def _run_steps(self, shared: nn.Module, batches: Iterator[Batch], loss_of: Any) -> float:
        """One epoch of optimiser steps; returns the mean loss of its images."""
        train, plan = self.job.train, self.batches
        epoch = self.epoch + 1
        torch.manual_seed(derived_seed(_NOISE, train.seed, epoch, self.worker.rank))
        num_steps = train.epochs * plan.steps_per_epoch
        rising = warmup_steps(train, plan.steps_per_epoch)
        trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        loss_sum = torch.zeros((), device=self.worker.device, dtype=torch.float64)
        for step in range(plan.steps_per_epoch):
            done = self.epoch * plan.steps_per_epoch + step
            set_rates(self.optimizer, rate_factor(done, num_steps=num_steps, warmup_steps=rising))
            self.optimizer.zero_grad(set_to_none=True)
            for part in range(train.accumulate):
                images_BCHW, truth_BK, row_ids_B = next(batches)
                inputs_BCHW, truth_BK = mix_pairs(
                    self.normalise(images_BCHW),
                    truth_BK.to(self.worker.device, non_blocking=True),
                    row_ids_B,
                    self.job.config.augment,
                    seed=train.seed,
                    epoch=epoch,
                )
                with self.worker.accumulating(shared, last=part == train.accumulate - 1):
                    with self._autocast():
                        logits_BK = shared(inputs_BCHW)
                    loss = loss_of(logits_BK.float(), truth_BK).sum()
                    # Workers' gradients are averaged, so that the sum over all images is divided by their number.
                    (loss * (self.worker.world_size / plan.step_images)).backward()
                loss_sum += loss.detach()
            if train.clip_norm:
                nn.utils.clip_grad_norm_(trainable, train.clip_norm)
            self.optimizer.step()
            failpoint("train.step")
            if train.l1:
                shrink_weights(self.optimizer, train.l1)
            if self.average is not None:
                self.average.update(self.network)
        self.epoch = epoch
        mean_loss = float(self.worker.sum(loss_sum)) / (plan.steps_per_epoch * plan.step_images)
        if not math.isfinite(mean_loss):
            raise ImgbatchError(f"training: the loss of epoch {epoch} is not finite; lower train.learning_rate")
        return mean_loss

    def _finish_epoch(self, record: dict[str, Any], started: _Clocks, report: Report) -> None:
        """Measure, keep the weights if they are the best, save a checkpoint and tell."""
        job = self.job
        trained = started.elapsed()
        num_seen = self.batches.steps_per_epoch * self.batches.step_images if self.epoch else 0
        averaged = self.average is not None and self.epoch > 0
        own = {name: tensor.clone() for name, tensor in self.network.state_dict().items()} if averaged else {}
        if averaged and self.average is not None:
            self.network.load_state_dict(self.average.weights())
        self.worker.agree_on_statistics(self.network)
        validation = self._measure(VALIDATION)
        if validation["loss"] is None:
            advice = "lower train.learning_rate" if self.epoch else "start from other weights"
            raise ImgbatchError(f"training: the validation loss of epoch {self.epoch} is not finite; {advice}")
        earlier = [score(old["validation"], job.train.metric, job.task) for old in self.history]
        is_best = not earlier or score(validation, job.train.metric, job.task) > max(earlier)
        record = {
            "epoch": self.epoch,
            **record,
            "validation": validation,
            "is_best": is_best,
            "seconds": round(started.elapsed().wall_s, 3),
            "images_per_s": round(num_seen / trained.wall_s, 1) if num_seen else None,
            "cpu_s": round(trained.cpu_s, 3),
        }
        self.history.append(record)
        if is_best and self.worker.is_first:
            save_best(job.paths, self.epoch, self.network.state_dict())
        if averaged:
            self.network.load_state_dict(own)
        if self.worker.is_first:
            state = {
                "epoch": self.epoch,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average is not None else None,
            }
            save_last(job.paths, state, self.history)
            if is_best:
                remove_earlier_best(job.paths, self.epoch)
        report(record)

    def _is_exhausted(self) -> bool:
        """Whether the last ``patience`` epochs brought nothing better."""
        patience = self.job.train.patience
        if patience is None or len(self.history) <= patience:
            return False
        return not any(record["is_best"] for record in self.history[-patience:])

    def _set_training_mode(self) -> bool:
        """Training mode, but for frozen parts and frozen batch norms; returns whether statistics are trained."""
        frozen_backbone = self.job.method == "linear_probe"
        choice = self.job.train.batch_norm
        frozen_norms = choice == "frozen" or (choice == "auto" and self.job.method != "from_scratch")
        self.network.train(not frozen_backbone)
        norms = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        if frozen_norms:
            for norm in norms:
                norm.eval()
        return any(norm.training for norm in norms)

    def _drop_features(self) -> None:
        """Dropout before the head, in training only."""
        share, network = self.job.train.dropout, self.network
        if share:
            head = network.get_submodule(self.head)
            head.register_forward_pre_hook(
                # The network may be in evaluation mode while only its head trains: gradients tell training apart.
                lambda _, inputs: (functional.dropout(inputs[0], share, training=torch.is_grad_enabled()),)
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        precision, kind = self.job.train.precision, self.worker.device.type
        # A GPU that only emulates it, as a T4 does, gains nothing by it.
        fits = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16" or (precision == "auto" and fits))

    def _measure(
        self,
        split: str,
        *,
        per_class: bool = False,
        exact: bool = False,
        label_thresholds: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        """Metrics of a split; see :meth:`_probs`."""
        job = self.job
        return measure(
            self._probs(split, exact=exact),
            job.splits[split].truth,
            task=job.task,
            class_names=job.class_names,
            per_class=per_class,
            label_thresholds=label_thresholds,
        )

    @torch.inference_mode()
    def _probs(self, split: str, *, exact: bool) -> np.ndarray:
        """probs_NK of a split, float32; ``exact``: computed in float32, as classification does it."""
        logits_NK = self._gather(split, self.network, exact=exact)
        return (logits_NK.sigmoid() if self.job.task == "multilabel" else logits_NK.softmax(dim=1)).numpy()

    def _gather(
        self, split: str, forward: Callable[[Tensor], Tensor], *, exact: bool = False, job: TrainingJob | None = None
    ) -> Tensor:
        """What ``forward`` makes of every image of a split, float32 on the CPU, computed by all workers together.

        Args:
            job: whose split; none: that of this training.
        """
        job = job or self.job
        self.network.eval()
        batch_size = _GPU_BATCH if self.worker.device.type == "cuda" else _CPU_BATCH
        batches = iter_evaluation_batches(job, split, self.worker, batch_size)
        with nullcontext() if exact else self._autocast():
            mine: list[Tensor] = []
            for images_BCHW in batches:
                # The batch before, which was computed while this one was cut out: a device may not hold all of them.
                mine[-1:] = [rows.cpu() for rows in mine[-1:]]
                mine.append(forward(self.normalise(images_BCHW)).float())
            if not mine:
                # Fewer images than workers: no rows of this one's, but as wide as the others' are.
                side = job.spec.crop_size
                blank_BCHW = torch.zeros((1, job.spec.num_channels, side, side), dtype=torch.uint8)
                mine = [forward(self.normalise(blank_BCHW)).float()[:0]]
        return self.worker.gather_rows(torch.cat([rows.cpu() for rows in mine]), len(job.splits[split]))

    def _fit_head(self) -> None:
        """Logistic regression, or what the baseline asks for, on the frozen features of plain images.

        The first worker fits it and tells the others: it may take much memory. A head that is a convolution stays.
        """
        job = _with_head_images(self.job)
        if not has_linear_head(self.network, job.arch):
            return
        with torch.no_grad():
            train_ND, validation_ND = (
                self._gather(split, lambda images: forward_features(self.network, job.arch, images), job=job)
                for split in (TRAIN, VALIDATION)
            )
        if self.worker.is_first:
            train_NK, validation_NK = (
                torch.from_numpy(job.splits[split].dense_truth(len(job.class_names))) for split in (TRAIN, VALIDATION)
            )
            kind = job.baseline or LOGISTIC_REGRESSION
            with self.worker.fitting():
                head = fit_head(kind, train_ND, train_NK, validation_ND, validation_NK, task=job.task)
            head.install(self.network, job.arch)
        shapes = self.worker.hear_first(_shapes(self.network.state_dict()))
        if not self.worker.is_first:
            adopt_forest(self.network, job.arch, shapes)
        self.worker.agree_on(self.network.get_submodule(self.head).state_dict().values())


def _with_head_images(job: TrainingJob) -> TrainingJob:
    """The job with the training images that its head is fitted to."""
    images = job.splits[TRAIN]
    if job.head_images == len(images):
        return job
    counts_K = images.class_counts(len(job.class_names))
    chosen = spread_over_classes(images.truth, counts_K, most=job.head_images, seed=job.train.seed)
    return replace(
        job,
        splits=job.splits | {TRAIN: images.take(chosen)},
        positions=job.positions | {TRAIN: job.positions[TRAIN][chosen]},
    )


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
