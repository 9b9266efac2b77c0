"""Pictures of a training and of a model's robustness. matplotlib and tensorboard come with the ``report`` extra.

Legend of shape suffixes: N image, H height, W width, C channel.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imgbatch.errors import UsageError

if TYPE_CHECKING:
    from imgbatch.core.robustness import RobustnessRow

_INSTALL = "is not installed; pip install 'imgbatch[report]' brings it"
_DPI = 110
_CURVES = ("top1", "balanced_accuracy", "macro_f1", "mean_average_precision")


def training_curves(records: list[dict[str, Any]]) -> bytes:
    """Loss and validation metrics over the epochs, as PNG.

    Args:
        records: as in epochs.jsonl.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = _figure(width=9.0, height=3.6)
    loss, metrics = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    trained = [record for record in records if record["train_loss"] is not None]
    loss.plot([record["epoch"] for record in trained], [record["train_loss"] for record in trained], label="train")
    loss.plot(epochs, [record["validation"]["loss"] for record in records], label="validation")
    loss.set(xlabel="epoch", ylabel="loss, nats", title="Loss")
    for name in _CURVES:
        if name in records[0]["validation"]:
            values = [record["validation"][name] for record in records]
            metrics.plot(epochs, [math.nan if value is None else value for value in values], label=name)
    best = max(record["epoch"] for record in records if record["is_best"])
    metrics.axvline(best, color="grey", linestyle=":", label=f"best: epoch {best}")
    metrics.set(xlabel="epoch", title="Validation", ylim=(None, 1.0))
    for axes in (loss, metrics):
        axes.legend()
        axes.grid(alpha=0.3)
    return _png(figure)


def contact_sheet(images_NHWC: np.ndarray, captions: list[str]) -> bytes:
    """Images side by side, eight in a row, as PNG.

    Args:
        images_NHWC: uint8, all of one size.
        captions: one per image; shown where it differs from the one before.

    Raises:
        UsageError: matplotlib is not installed.
    """
    columns = 8
    rows = -(-len(images_NHWC) // columns)
    figure = _figure(width=1.3 * columns, height=1.45 * rows)
    for index, axes in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        axes.axis("off")
        if index < len(images_NHWC):
            axes.imshow(images_NHWC[index])
            if index == 0 or captions[index] != captions[index - 1] or index % columns == 0:
                axes.set_title(captions[index], fontsize=7, loc="left", parse_math=False)
    return _png(figure)


def robustness_curves(rows: Sequence[RobustnessRow]) -> bytes:
    """Accuracy over severity with its 95% interval, a line for each perturbation, as PNG.

    Args:
        rows: as ``core.robustness`` measures them, with one of severity 0.

    Raises:
        UsageError: matplotlib is not installed.
    """
    figure = _figure(width=8.0, height=4.2)
    axes = figure.subplots()
    clean = next(row for row in rows if row.severity == 0)
    markers = itertools.cycle("osD^vPX")
    for name in dict.fromkeys(row.perturbation for row in rows if row.severity):
        line = [clean, *(row for row in rows if row.perturbation == name)]
        severities = [row.severity for row in line]
        (drawn,) = axes.plot(severities, [row.accuracy for row in line], marker=next(markers), label=name)
        low, high = [row.low for row in line], [row.high for row in line]
        axes.fill_between(severities, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)
    axes.set(xlabel="severity", ylabel="accuracy", ylim=(0, 1.02), xticks=sorted({row.severity for row in rows}))
    axes.set_title(f"{clean.images:,} images")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    return _png(figure)


def write_tensorboard(records: list[dict[str, Any]], directory: str) -> None:
    """The records as TensorBoard's events in a local directory.

    Raises:
        UsageError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(f"TensorBoard's events are not written: tensorboard {_INSTALL}") from error
    with SummaryWriter(directory) as writer:
        for record in records:
            values = {f"validation/{name}": value for name, value in record["validation"].items()}
            values |= {"train/loss": record["train_loss"], "train/learning_rate": record["learning_rate"]}
            for name, value in values.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, record["epoch"])


def _figure(*, width: float, height: float) -> Any:
    """A figure in inches that belongs to no window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"pictures are not drawn: matplotlib {_INSTALL}") from error
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()
