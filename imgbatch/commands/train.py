"""``imgbatch train``: fine-tune a network, or fit a baseline to a frozen one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages, read_config
from imgbatch.errors import UsageError

if TYPE_CHECKING:
    from imgbatch.runtime.train import TrainResult

_SHOWN = ("top1", "balanced_accuracy", "mean_average_precision", "macro_f1", "loss")


def train(
    config_file: ConfigFile = None,
    manifest: Annotated[
        str | None, typer.Option("--manifest", help="Parquet manifest with targets and splits.", show_default=False)
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="MODEL", help="Directory to write.", show_default=False)
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            help="A network, or a baseline: logistic_regression, prototypes, linear_svm, random_forest.",
            show_default="resnet50",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Where to start: a weights file, 'imagenet' or a model bundle.", show_default=False),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.", show_default="20")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Training processes.", show_default="one per GPU, or one")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of order, augmentation and weights.", show_default="0")] = None,
    engine: Annotated[
        Literal["ray", "local"] | None, typer.Option(help="local: one worker in this process.", show_default="ray")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a different model that is there.")] = False,
    assignments: Assignments = None,
) -> None:
    """Train a model on a manifest's images; the same command again continues where it stopped."""
    from imgbatch.runtime.train import train as run_training

    flags = {
        "input.manifest": manifest,
        "output.path": output,
        "train.arch": arch,
        "train.weights": weights,
        "train.epochs": epochs,
        "train.num_workers": num_workers,
        "train.seed": seed,
        "classify.engine": engine,
    }
    config = read_config(config_file, assignments, flags)
    if config.run.stop_after_s is not None:
        raise UsageError(
            "run.stop_after_s: training ends with its last epoch; leave it out, or --set run.stop_after_s=null where "
            "the file serves other commands too"
        )
    _report(run_training(config, messages, overwrite=overwrite))


def _report(result: TrainResult) -> None:
    bundle = result.bundle
    done = "was finished already" if result.already_finished else f"best epoch {result.metrics['best_epoch']}"
    console.print(
        f"{bundle.path}: {bundle.arch}, {bundle.num_classes} classes, model_id {bundle.model_id}, {done}", markup=False
    )
    for split in ("validation", "test"):
        if split in result.metrics:
            values = result.metrics[split]
            shown = ", ".join(f"{name} {values[name]:.4f}" for name in _SHOWN if values.get(name) is not None)
            console.print(f"{split} ({values['images']:,} images): {shown}", markup=False)
