"""model.json: its keys, and what each of them must hold.

A bundle may come from anywhere, so every value is checked before anything is built from it.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Literal, get_args

from imgbatch.core import storage
from imgbatch.core.architectures import check_architecture
from imgbatch.core.classes import check_class_names
from imgbatch.core.transforms import DecodePolicy, Interpolation, PreprocessSpec, ResizeMode
from imgbatch.errors import UsageError

FORMAT_VERSION = 1

Task = Literal["binary", "multiclass", "multilabel"]

THRESHOLD_KINDS = ("accept", "labels")
"""``accept``: a probability from which a label needs no review; ``labels``: from which a multi-label class applies."""

_REQUIRED = frozenset(("arch", "task", "class_names", "preprocess", "weights_sha256"))
_OPTIONAL = frozenset(("temperature", "thresholds", "provenance"))
_DERIVED = frozenset(("format_version", "model_id"))

_MAX_CROP_PX = 4096


def read_description(uri: str) -> dict[str, Any]:
    """The object in a model.json of a known format version, unchecked.

    Raises:
        UsageError: it is not there, not JSON, or of another version.
    """
    try:
        values = json.loads(storage.read_bytes(uri))
    except FileNotFoundError as error:
        raise UsageError(f"{uri}: there is no model; make one with imgbatch model init or train") from error
    except OSError as error:
        raise UsageError(f"{uri}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{uri}: not valid JSON ({error})") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UsageError(f"{uri}: format_version {version!r} is unknown; this imgbatch reads {FORMAT_VERSION}")
    return values


def check_description(values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """The fields of a ``ModelBundle`` (all but its path) from the plain values of model.json.

    Raises:
        UsageError: one line that starts with ``where`` and names the key at fault.
    """
    if unknown := sorted(values.keys() - _REQUIRED - _OPTIONAL - _DERIVED):
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; a newer imgbatch may have written it")
    if missing := sorted(_REQUIRED - values.keys()):
        raise UsageError(f"{where}: there is no {missing[0]!r}")
    arch, task = values["arch"], values["task"]
    if not isinstance(arch, str) or not isinstance(task, str):
        raise UsageError(f"{where}: arch and task must be texts")
    try:
        check_architecture(arch)
    except UsageError as error:
        raise UsageError(f"{where}: arch {arch!r} is unknown to this imgbatch") from error
    class_names = check_class_names(values["class_names"], task=task, where=where)
    digest = values["weights_sha256"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise UsageError(f"{where}: weights_sha256 must be 64 hex digits")
    provenance = values.get("provenance") or {}
    if not isinstance(provenance, dict):
        raise UsageError(f"{where}: provenance must be an object")
    return {
        "arch": arch,
        "task": task,
        "class_names": class_names,
        "preprocess": _check_preprocess(values["preprocess"], where),
        "weights_sha256": digest,
        "temperature": _check_temperature(values.get("temperature", 1.0), len(class_names), where),
        "thresholds": _check_thresholds(values.get("thresholds"), class_names, where),
        "provenance": provenance,
    }


def _check_preprocess(values: Any, where: str) -> PreprocessSpec:
    try:
        spec = PreprocessSpec.from_dict(values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{where}: preprocess: {error}") from error
    if not all(type(size) is int and size <= _MAX_CROP_PX for size in (spec.resize_size, spec.crop_size)):
        raise UsageError(f"{where}: preprocess: resize_size and crop_size must be whole numbers up to {_MAX_CROP_PX}")
    if spec.interpolation not in get_args(Interpolation):
        raise UsageError(f"{where}: preprocess: interpolation must be one of {', '.join(get_args(Interpolation))}")
    if spec.resize_mode not in get_args(ResizeMode):
        raise UsageError(f"{where}: preprocess: resize_mode must be one of {', '.join(get_args(ResizeMode))}")
    if not all(_is_number(value) for value in spec.mean) or not all(_is_number(v) and v > 0 for v in spec.std):
        raise UsageError(f"{where}: preprocess: mean and std must be numbers, std above 0")
    if spec.num_channels != 3 and spec.bands is None:
        raise UsageError(f"{where}: preprocess: {spec.num_channels} channels, but no bands; RGB has 3")
    _check_decode_policy(spec.decode, where)
    return spec


def _check_decode_policy(policy: DecodePolicy, where: str) -> None:
    if not isinstance(policy.apply_orientation, bool):
        raise UsageError(f"{where}: preprocess: decode: apply_orientation must be true or false")
    background = policy.background
    if not (isinstance(background, tuple) and len(background) == 3 and all(v in range(256) for v in background)):
        raise UsageError(f"{where}: preprocess: decode: background must be three whole numbers from 0 to 255")
    # A model from elsewhere may narrow the formats, never open a decoder that is not on our own list.
    allowed = DecodePolicy().formats
    if not isinstance(policy.formats, tuple) or not all(name in allowed for name in policy.formats):
        raise UsageError(f"{where}: preprocess: decode: formats must be a list of some of {', '.join(allowed)}")


def _check_temperature(value: Any, num_classes: int, where: str) -> float | tuple[float, ...]:
    several = isinstance(value, list | tuple)
    numbers = value if several else [value]
    if not all(_is_number(number) and number > 0 for number in numbers) or (several and len(numbers) != num_classes):
        raise UsageError(f"{where}: temperature must be a number above 0, or one for each of {num_classes} classes")
    return tuple(float(number) for number in numbers) if several else float(value)


def _check_thresholds(value: Any, class_names: tuple[str, ...], where: str) -> dict[str, dict[str, float]] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(limits, dict) for limits in value.values()):
        raise UsageError(f"{where}: thresholds must be an object of objects: kind, class, probability")
    for kind, limits in value.items():
        if kind not in THRESHOLD_KINDS:
            raise UsageError(f"{where}: thresholds: unknown kind {kind!r}; one of {', '.join(THRESHOLD_KINDS)}")
        for name, limit in limits.items():
            if name not in class_names:
                raise UsageError(f"{where}: thresholds: {kind}: {name!r} is not one of the model's classes")
            if not _is_number(limit) or not 0 <= limit <= 1:
                raise UsageError(f"{where}: thresholds: {kind}: {name!r} needs a number from 0 to 1, not {limit!r}")
    return {kind: {name: float(limit) for name, limit in limits.items()} for kind, limits in value.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
