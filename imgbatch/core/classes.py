"""Class names: what a list of them must hold, and reading one from a file."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from imgbatch.core import storage
from imgbatch.core.torchvision_models import import_models
from imgbatch.errors import UsageError

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
"""What Hive writes for a null: a class of this name would be read back as one."""

MIN_CLASSES = {"binary": 2, "multiclass": 2, "multilabel": 1}
"""Tasks, and the fewest classes that each makes sense with; ``binary`` has exactly two."""

_UNFIT_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
"""Of Unicode: control characters, lone surrogates (no UTF-8 for them), line and paragraph separators."""

IMAGENET1K = "imagenet1k"
"""The name that stands for the 1,000 classes of torchvision's published weights, in their order."""


def check_class_names(names: Any, *, task: str, where: str) -> tuple[str, ...]:
    """``names`` as a tuple, if they can be the classes of a model.

    Args:
        names: one name per class, in index order.
        task: ``binary``, ``multiclass`` or ``multilabel``.
        where: the file or option at fault, for the message.

    Raises:
        UsageError: an unknown task, too few or too many classes, a name that is not text, is blank, holds control
            characters, stands there twice or is Hive's null partition.
    """
    if task not in MIN_CLASSES:
        raise UsageError(f"{where}: unknown task {task!r}; one of {', '.join(MIN_CLASSES)}")
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise UsageError(f"{where}: class names must be a list of texts")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"{where}: class {index} has no name ({name!r}); give it one")
        if any(unicodedata.category(character) in _UNFIT_CATEGORIES for character in name):
            raise UsageError(f"{where}: class {index}, {name!r}, holds control characters or line breaks; rename it")
        if name == NULL_PARTITION:
            raise UsageError(f"{where}: class {index} is named like Hive's null partition, {name}; rename it")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(f"{where}: class {repeated[0]!r} stands there twice; every class needs a name of its own")
    if len(names) < MIN_CLASSES[task]:
        raise UsageError(f"{where}: {len(names)} classes are too few for {task}, which needs {MIN_CLASSES[task]}")
    if task == "binary" and len(names) != 2:
        raise UsageError(f"{where}: binary needs exactly two classes, not {len(names)}; multiclass takes more")
    return tuple(names)


def read_class_names(source: str) -> list[str]:
    """The names in a file of one name per line or a JSON list, or ``imagenet1k`` for ImageNet's (imports torchvision).

    Blank lines at the end are ignored, and so is white space around a name.

    Raises:
        UsageError: the file is not there or cannot be read as such a list.
    """
    if source == IMAGENET1K:
        return list(import_models().ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    try:
        text = storage.read_bytes(source).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"--classes {source}: {error.strerror or error}; a file or {IMAGENET1K}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes {source}: not UTF-8 text; one class name per line, or a JSON list") from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"--classes {source}: not a valid JSON list: {error}") from error
    return [line.strip() for line in text.rstrip().splitlines()]
