"""How much of a model's accuracy is left when images are attacked or corrupted.

Legend of the shape suffixes: ``N`` images, ``B`` batch, ``H`` height, ``W`` width, ``C`` channel, ``K`` class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.attacks import Loss, fgsm, pgd
from imgbatch.core.corruptions import (
    BLUR_SIGMA,
    BRIGHTNESS_ADDED,
    CONTRAST_LEFT,
    CORRUPTIONS,
    JPEG_QUALITY,
    NOISE_STD,
    SEVERITIES,
    corrupt,
)
from imgbatch.core.forest import refuse_forest
from imgbatch.core.manifest import open_manifest
from imgbatch.core.metrics.intervals import wilson_interval
from imgbatch.core.model import ModelBundle, load_bundle, load_network
from imgbatch.core.pictures import load_pictures
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD
from imgbatch.core.training.images import Normaliser
from imgbatch.errors import UsageError

TABLE_FILE = "robustness.parquet"
CLEAN = "clean"
ATTACKS = ("fgsm", "pgd")
EPSILONS = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)
"""Largest change of a value scaled to 0 to 1, per severity."""
_BATCH_SIZE = 16
STRENGTHS = {
    **dict.fromkeys(ATTACKS, EPSILONS),
    **dict(zip(CORRUPTIONS, (NOISE_STD, BLUR_SIGMA, JPEG_QUALITY, BRIGHTNESS_ADDED, CONTRAST_LEFT), strict=True)),
}
"""What each severity, from 1, means: see ``corruptions`` for the units."""


@dataclass(frozen=True, slots=True)
class RobustnessRow:
    """Accuracy under one perturbation at one severity."""

    perturbation: str
    severity: int
    """1 to 5; 0 for the images as they are."""
    strength: float | None
    images: int
    accuracy: float
    """Share labelled right; multi-label: with every label right."""
    low: float
    """Of the 95% interval of the accuracy."""
    high: float


@dataclass(frozen=True, slots=True)
class RobustnessResult:
    """What :func:`measure_robustness` found."""

    rows: list[RobustnessRow]
    num_failed: int
    """Images that could not be decoded; they are left out."""
    of_train_split: int
    """Images that training may have seen; 0 where the manifest has others."""


def measure_robustness(
    model: str,
    manifest: str,
    directory: str,
    *,
    limit: int,
    seed: int = 0,
    config: Config | None = None,
) -> RobustnessResult:
    """Label images with a known target as they are, attacked and corrupted, and write the table to ``directory``.

    Images of the split that training takes are left out, where there are others.

    Args:
        limit: at most so many images, spread over the manifest.
        seed: of the noise and of where PGD begins.
        config: how images are fetched and decoded; none: the defaults.

    Raises:
        UsageError: no image with a target that the model knows, or none of them could be decoded.
    """
    bundle = load_bundle(model)
    if bundle.preprocess.num_channels != 3:
        raise UsageError(
            f"model {model}: its images have {bundle.preprocess.num_channels} bands; the corruptions are of RGB images"
        )
    pictures = load_pictures(
        open_manifest(manifest),
        bundle.preprocess,
        config or Config(),
        limit=limit,
        known_targets=set(bundle.class_names),
        min_unseen=1,
    )
    if not pictures.image_ids:
        raise UsageError(f"manifest {manifest}: none of the images could be decoded ({pictures.reasons})")
    truth_NK = np.array(
        [[name in (names or ()) for name in bundle.class_names] for names in pictures.targets], np.float32
    ).reshape(-1, bundle.num_classes)
    subject = Subject(bundle, batch_size=_BATCH_SIZE)
    rows = list(_iter_rows(subject, pictures.images_NHWC, truth_NK, seed))
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_SCHEMA)
    with storage.staged_file(storage.join(directory, TABLE_FILE)) as staged:
        pq.write_table(table, staged)
    return RobustnessResult(rows, len(pictures.failed), int(pictures.of_train_N.sum()))


_SCHEMA = pa.schema(
    [
        ("perturbation", pa.string()),
        ("severity", pa.int32()),
        ("strength", pa.float64()),
        ("images", pa.int64()),
        ("accuracy", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def _iter_rows(subject: Subject, images_NHWC: np.ndarray, truth_NK: np.ndarray, seed: int) -> Iterator[RobustnessRow]:
    def row(name: str, severity: int, right_N: np.ndarray) -> RobustnessRow:
        strength = STRENGTHS[name][severity - 1] if severity else None
        right, total = int(right_N.sum()), len(right_N)
        accuracy = right / total if total else math.nan
        return RobustnessRow(name, severity, strength, total, accuracy, *wilson_interval(right, total))

    yield row(CLEAN, 0, subject.is_right(images_NHWC, truth_NK))
    for name in ATTACKS:
        for severity in SEVERITIES:
            epsilon = EPSILONS[severity - 1]
            yield row(name, severity, subject.withstands(name, epsilon, images_NHWC, truth_NK, seed))
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            yield row(name, severity, subject.is_right(corrupt(images_NHWC, name, severity, seed=seed), truth_NK))


class Subject:
    """A loaded model whose gradient can be taken down to the pixels."""

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 16) -> None:
        self._bundle = bundle
        self._batch_size = batch_size
        self._network = load_network(bundle).requires_grad_(False)
        refuse_forest(self._network, bundle.arch, where=f"model {bundle.path}")
        self._normalise = Normaliser(bundle.preprocess, torch.device("cpu"))
        stated = (bundle.thresholds or {}).get("labels", {})
        self._threshold_K = torch.tensor([stated.get(name, DEFAULT_LABEL_THRESHOLD) for name in bundle.class_names])

    def logits(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, K] for pixels from 0 to 1, after the temperature."""
        return self._network(self._normalise(pixels_BCHW * 255)) / torch.tensor(self._bundle.temperature)

    def loss(self, truth_BK: Tensor) -> Loss:
        """The training loss against a truth of 0 and 1, as attacks climb it."""
        if self._bundle.task == "multilabel":
            return lambda pixels: functional.binary_cross_entropy_with_logits(
                self.logits(pixels), truth_BK, reduction="sum"
            )
        return lambda pixels: functional.cross_entropy(self.logits(pixels), truth_BK.argmax(dim=1), reduction="sum")

    def is_right(self, images_NHWC: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
        """bool [N], for uint8 images."""
        batches = self._batches(images_NHWC, truth_NK)
        return self._joined([self._right(pixels, truth) for pixels, truth in batches])

    def withstands(
        self, name: str, epsilon: float, images_NHWC: np.ndarray, truth_NK: np.ndarray, seed: int
    ) -> np.ndarray:
        """bool [N]: whether the label is right as it is and stays right under the attack.

        The attacks may lead back to the truth an image that was labelled wrong; that is no robustness.
        """
        generator = torch.Generator().manual_seed(seed)
        right = []
        for pixels_BCHW, truth_BK in self._batches(images_NHWC, truth_NK):
            loss = self.loss(truth_BK)
            if name == "fgsm":
                attacked_BCHW = fgsm(loss, pixels_BCHW, epsilon)
            else:
                attacked_BCHW = pgd(loss, pixels_BCHW, epsilon, generator=generator)
            right.append(self._right(pixels_BCHW, truth_BK) & self._right(attacked_BCHW, truth_BK))
        return self._joined(right)

    def _right(self, pixels_BCHW: Tensor, truth_BK: Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits_BK = self.logits(pixels_BCHW)
            if self._bundle.task == "multilabel":
                return ((logits_BK.sigmoid() >= self._threshold_K) == (truth_BK > 0)).all(dim=1).numpy()
            return (logits_BK.argmax(dim=1) == truth_BK.argmax(dim=1)).numpy()

    def _batches(self, images_NHWC: np.ndarray, truth_NK: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images_NHWC), self._batch_size):
            images_BHWC = torch.tensor(images_NHWC[start : start + self._batch_size])
            truth_BK = torch.tensor(truth_NK[start : start + self._batch_size])
            yield images_BHWC.permute(0, 3, 1, 2).float() / 255, truth_BK

    def _joined(self, right: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, bool), *right])
