"""The labelled images of a manifest: which rows are in which split, and what they show.

Legend of shape suffixes: N image, K class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.core.classes import check_class_names
from imgbatch.core.description import Task
from imgbatch.core.manifest import Manifest
from imgbatch.errors import UsageError
from imgbatch.schema import SPLIT, TARGET, TARGETS

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLITS = (TRAIN, VALIDATION, TEST)

SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "validation": VALIDATION,
    "val": VALIDATION,
    "valid": VALIDATION,
    "test": TEST,
}
"""What a manifest may call the splits."""


def names_of_split(name: str) -> tuple[str, ...]:
    """All that a manifest may call the split of this name; the name alone where training knows no such split."""
    split = SPLIT_NAMES.get(name)
    return tuple(other for other, meant in SPLIT_NAMES.items() if meant == split) or (name,)


@dataclass(frozen=True)
class LabelledSplit:
    """The images of one split, in the manifest's order."""

    row_ids_N: np.ndarray
    """int64, rows of the manifest."""
    truth: np.ndarray
    """int64 [N], the class index; multilabel: bool [N, K], whether the class is there."""

    def __len__(self) -> int:
        return len(self.row_ids_N)

    def dense_truth(self, num_classes: int) -> np.ndarray:
        """float32, 1 where an image shows the class."""
        if self.truth.ndim == 2:
            return self.truth.astype(np.float32)
        truth_NK = np.zeros((len(self), num_classes), np.float32)
        truth_NK[np.arange(len(self)), self.truth] = 1
        return truth_NK

    def class_counts(self, num_classes: int) -> np.ndarray:
        """Images of each class, int64 (K,)."""
        if self.truth.ndim == 2:
            return self.truth.sum(axis=0)
        return np.bincount(self.truth, minlength=num_classes)

    def take(self, keep_N: np.ndarray) -> LabelledSplit:
        """The images chosen by a mask or by indices."""
        return LabelledSplit(self.row_ids_N[keep_N], self.truth[keep_N])

    def in_order(self, order_K: np.ndarray) -> LabelledSplit:
        """With the classes in another order: ``order_K`` are their indices in this one."""
        place_K = np.argsort(order_K)
        return LabelledSplit(self.row_ids_N, self.truth[:, order_K] if self.truth.ndim == 2 else place_K[self.truth])


@dataclass(frozen=True)
class Labelled:
    """What a manifest teaches."""

    task: Task
    class_names: tuple[str, ...]
    """The order of the logits: by name, or that of the model that training starts from."""
    splits: dict[str, LabelledSplit]
    """``train``, ``validation`` and, where the manifest has one, ``test``."""
    num_unused: int
    """Rows in no split that training knows."""

    def in_order(self, class_names: tuple[str, ...]) -> Labelled:
        """With the same classes in another order."""
        order_K = np.array([self.class_names.index(name) for name in class_names])
        splits = {split: images.in_order(order_K) for split, images in self.splits.items()}
        return replace(self, class_names=class_names, splits=splits)


def read_labelled(manifest: Manifest, *, task: str, limit: int | None = None) -> Labelled:
    """Targets and splits of a manifest, checked.

    Args:
        task: ``binary``, ``multiclass``, ``multilabel``, or ``auto``: multilabel where there is a ``targets``
            column, binary where there are two classes.
        limit: only the first so many rows.

    Raises:
        UsageError: one line: no targets, no splits, a null target or one in a list, a single class, or a class that
            is missing in the train split.
    """
    where = f"manifest {manifest.path}"
    column = _target_column(manifest, task, where)
    table = pa.concat_tables(manifest.iter_batches([column, SPLIT], limit=limit))
    split_names = [SPLIT_NAMES.get(name or "", "") for name in table[SPLIT].to_pylist()]
    split_N = np.array(split_names)
    for split in (TRAIN, VALIDATION):
        if not (split_N == split).any():
            raise UsageError(
                f"{where}: no rows of split {split!r}; 'imgbatch manifest build {manifest.path} "
                "--split train=0.8,validation=0.1,test=0.1 -o NEW' draws the splits"
            )
    used_rows = np.flatnonzero(split_N != "")
    _require_targets(table[column], used_rows, column, where)
    targets = table[column].take(pa.array(used_rows)).to_pylist()
    multilabel = column == TARGETS
    if multilabel:
        _require_names(targets, used_rows, where)
    class_names = _class_names(targets, multilabel)
    resolved = task if task != "auto" else "multilabel" if multilabel else "binary" if len(class_names) == 2 else ""
    resolved = resolved or "multiclass"
    if len(class_names) < 2 and not multilabel:
        raise UsageError(f"{where}: a single class, {class_names[0]!r}; there is nothing to tell apart")
    names = check_class_names(class_names, task=resolved, where=where)
    truth = _encode(targets, names, multilabel)
    splits = {}
    for split in SPLITS:
        chosen = split_N[used_rows] == split
        if chosen.any():
            splits[split] = LabelledSplit(used_rows[chosen].astype(np.int64), truth[chosen])
    labelled = Labelled(resolved, names, splits, int((split_N == "").sum()))  # type: ignore[arg-type]
    check_class_counts(labelled, where=where)
    return labelled


def check_class_counts(labelled: Labelled, *, min_images: int = 1, where: str) -> None:
    """Raise :class:`UsageError` if a class has fewer than ``min_images`` train images.

    A multilabel class must also be absent from as many of them.
    """
    num_classes = len(labelled.class_names)
    train = labelled.splits[TRAIN]
    counts_K = train.class_counts(num_classes)
    for name, count in zip(labelled.class_names, counts_K, strict=True):
        if count == 0:
            elsewhere = [
                split
                for split, images in labelled.splits.items()
                if images.class_counts(num_classes)[labelled.class_names.index(name)]
            ]
            found = f", but split {elsewhere[0]!r} has some" if elsewhere else ""
            raise UsageError(f"{where}: class {name!r} has no images in split 'train'{found}; move some there")
        if count < min_images:
            raise UsageError(
                f"{where}: class {name!r} has {count} train images, fewer than {min_images}; add some or leave it out"
            )
        if labelled.task == "multilabel" and len(train) - count < min_images:
            raise UsageError(f"{where}: class {name!r} is in all train images but {len(train) - count}; leave it out")


def describe_counts(labelled: Labelled) -> dict[str, Any]:
    """Images by split and by class of the train split, as plain values."""
    counts_K = labelled.splits[TRAIN].class_counts(len(labelled.class_names))
    return {
        "images": {split: len(images) for split, images in labelled.splits.items()},
        "train_images_by_class": dict(zip(labelled.class_names, counts_K.tolist(), strict=True)),
    }


def _target_column(manifest: Manifest, task: str, where: str) -> str:
    names = manifest.schema.names
    wanted = {"auto": (TARGETS, TARGET), "multilabel": (TARGETS,)}.get(task, (TARGET,))
    column = next((name for name in wanted if name in names), None)
    if column is None:
        raise UsageError(
            f"{where}: targets missing: no column {' or '.join(map(repr, wanted))} (columns: {', '.join(names)}); "
            "'imgbatch manifest build --targets-from folder' takes them from the folders' names"
        )
    if SPLIT not in names:
        raise UsageError(f"{where}: no column 'split'; 'imgbatch manifest build --split train=0.8,...' draws one")
    return column


def _require_targets(column: pa.ChunkedArray, used_rows: np.ndarray, name: str, where: str) -> None:
    missing = np.flatnonzero(pc.is_null(column.take(pa.array(used_rows))).to_numpy())
    if len(missing):
        row = int(used_rows[missing[0]])
        more = f" ({len(missing)} such rows)" if len(missing) > 1 else ""
        raise UsageError(
            f"{where}: row {row} (from 0): {name} is null{more}; fill it in or take the row out of its split"
        )


def _require_names(targets: Sequence[Sequence[str | None]], used_rows: np.ndarray, where: str) -> None:
    for row, names in zip(used_rows, targets, strict=True):
        if None in names:
            raise UsageError(f"{where}: row {row} (from 0): {TARGETS} holds a null; take it out of the list")


def _class_names(targets: Sequence[Any], multilabel: bool) -> list[str]:
    counts = Counter(name for listed in targets for name in listed) if multilabel else Counter(targets)
    return sorted(counts)


def _encode(targets: Sequence[Any], class_names: tuple[str, ...], multilabel: bool) -> np.ndarray:
    index = {name: k for k, name in enumerate(class_names)}
    if not multilabel:
        return np.array([index[name] for name in targets], np.int64)
    truth_NK = np.zeros((len(targets), len(class_names)), bool)
    for row, listed in enumerate(targets):
        truth_NK[row, [index[name] for name in listed]] = True
    return truth_NK
