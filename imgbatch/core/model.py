"""The model bundle: a directory that holds all it takes to label an image, and says where it came from.

    MODEL/model.safetensors   weights
    MODEL/model.json          everything else that decides a label, and provenance; written last
    MODEL/metrics.json        what was measured
    MODEL/README.md           the model card

Nothing in a bundle is ever unpickled, model.json names no other file, and the weights' sha256 is checked before use.
Reading and writing descriptions needs no torch; only ``load_network`` and what makes weights do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgbatch.core import storage
from imgbatch.core.architectures import check_architecture, default_preprocess, published_weights
from imgbatch.core.bands import BandSpec
from imgbatch.core.classes import check_class_names, read_class_names
from imgbatch.core.description import FORMAT_VERSION, Task, check_description, read_description
from imgbatch.core.model_card import build_model_card
from imgbatch.core.transforms import PreprocessSpec, ResizeMode
from imgbatch.core.weights import (
    adapt_channels,
    count_parameters,
    expand_binary_head,
    fit_network,
    load_safetensors,
    num_head_inputs,
    num_head_outputs,
    num_image_channels,
    published_name,
    read_header,
    read_state_dict,
)
from imgbatch.errors import UsageError, normalise_message

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE, DESCRIPTION_FILE, METRICS_FILE, CARD_FILE = (
    "model.safetensors",
    "model.json",
    "metrics.json",
    "README.md",
)


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """What model.json says, checked; the weights stay in their file until :func:`load_network`."""

    path: str
    """The directory, absolute, or its URI."""
    arch: str
    """One of ``architectures.ARCHITECTURES``."""
    task: Task
    class_names: tuple[str, ...]
    """In the order of the logits."""
    preprocess: PreprocessSpec
    weights_sha256: str
    """Hex digest of model.safetensors."""
    temperature: float | tuple[float, ...] = 1.0
    """What logits are divided by before the softmax or sigmoid: one number, or one per class; above 0."""
    thresholds: dict[str, dict[str, float]] | None = None
    """``{"accept" | "labels": {class name: probability, 0 to 1}}``; see ``description.THRESHOLD_KINDS``."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights came from; plain values."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def model_id(self) -> str:
        """``m`` and 12 hex digits: equal for models that give equal results. Metrics and provenance do not count."""
        decisive = {
            "arch": self.arch,
            "task": self.task,
            "class_names": self.class_names,
            "preprocess": self.preprocess.to_dict(),
            "temperature": self.temperature,
            "thresholds": self.thresholds,
            "weights_sha256": self.weights_sha256,
        }
        return "m" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as model.json holds them."""
        return {
            "format_version": FORMAT_VERSION,
            "model_id": self.model_id,
            "arch": self.arch,
            "task": self.task,
            "class_names": list(self.class_names),
            "preprocess": self.preprocess.to_dict(),
            "temperature": self.temperature,
            "thresholds": self.thresholds,
            "weights_sha256": self.weights_sha256,
            "provenance": self.provenance,
        }


def load_bundle(path: str) -> ModelBundle:
    """Read and check a bundle's description, and that its head has one output per class. No torch, no weights.

    Args:
        path: the directory, a local path or a URI.

    Raises:
        UsageError: there is no bundle, or something in it is missing, odd or contradictory.
    """
    path = storage.absolute(str(path))
    where = storage.join(path, DESCRIPTION_FILE)
    bundle = ModelBundle(path=path, **check_description(read_description(where), where=where))
    shapes = read_header(storage.join(path, WEIGHTS_FILE))
    num_outputs = num_head_outputs(bundle.arch, shapes, where=storage.join(path, WEIGHTS_FILE))
    if num_outputs != bundle.num_classes:
        raise UsageError(f"{where}: {bundle.num_classes} class names, but the weights' head has {num_outputs} outputs")
    _check_channels(bundle.arch, shapes, bundle.preprocess, where)
    return bundle


def _check_channels(arch: str, shapes: Mapping[str, tuple[int, ...]], preprocess: PreprocessSpec, where: str) -> None:
    num_channels = num_image_channels(arch, shapes)
    if num_channels != preprocess.num_channels:
        raise UsageError(
            f"{where}: the weights take {num_channels} channels, but preprocessing gives {preprocess.num_channels}"
        )


def load_metrics(path: str) -> dict[str, Any]:
    """What metrics.json holds; empty where there is none."""
    try:
        return storage.read_json(storage.join(str(path), METRICS_FILE))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{storage.join(str(path), METRICS_FILE)}: not valid JSON ({error})") from error


def load_network(bundle: ModelBundle) -> nn.Module:
    """The bundle's network on the CPU, float32, in evaluation mode.

    Raises:
        UsageError: the weights are not those that model.json describes, or do not fit the architecture.
    """
    uri = storage.join(bundle.path, WEIGHTS_FILE)
    try:
        digest = storage.sha256(uri)
    except OSError as error:
        raise UsageError(f"{uri}: {error.strerror or error}") from error
    if digest != bundle.weights_sha256:
        raise UsageError(f"{uri}: not the weights that model.json describes (sha256 differs); make the bundle again")
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_safetensors(uri).items()
    }
    return fit_network(bundle.arch, state_dict, crop_size=bundle.preprocess.crop_size, where=uri)


def count_features(bundle: ModelBundle) -> int:
    """Length of an embedding: how many features the head sees. From the header of the weights; no torch."""
    return num_head_inputs(bundle.arch, read_header(storage.join(bundle.path, WEIGHTS_FILE)))


def float32_bytes(bundle: ModelBundle) -> int:
    """Of the network's parameters as it runs, whatever type the file has them in. From its header; no torch."""
    return 4 * count_parameters(read_header(storage.join(bundle.path, WEIGHTS_FILE)))


def save_bundle(
    path: str,
    *,
    arch: str,
    task: Task,
    class_names: tuple[str, ...] | list[str],
    preprocess: PreprocessSpec,
    state_dict: Mapping[str, Tensor],
    temperature: float | tuple[float, ...] = 1.0,
    thresholds: dict[str, dict[str, float]] | None = None,
    provenance: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    overwrite: bool = True,
) -> ModelBundle:
    """Write a bundle; equal input gives equal bytes.

    Args:
        path: the directory or its URI.
        state_dict: the weights of ``arch``, as its ``state_dict()`` names them, in any floating type.
        temperature: see :class:`ModelBundle`, as for the other descriptions.
        metrics: what was measured; plain values.
        overwrite: replace a different model that is there.

    Raises:
        UsageError: the parts do not make a model (see :func:`load_bundle`), or another model is there.
    """
    import safetensors.torch

    path = storage.absolute(str(path))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    num_outputs = num_head_outputs(arch, shapes, where=path)
    if num_outputs != len(class_names):
        raise UsageError(f"{path}: {len(class_names)} class names, but the weights' head has {num_outputs} outputs")
    _check_channels(arch, shapes, preprocess, path)
    weights = safetensors.torch.save(tensors)
    values = {
        "arch": arch,
        "task": task,
        "class_names": class_names,
        "preprocess": preprocess.to_dict(),
        "temperature": temperature,
        "thresholds": thresholds,
        "provenance": provenance or {},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    bundle = ModelBundle(path=path, **check_description(values, where=path))
    if not overwrite:
        _refuse_other_model(bundle)
    storage.replace(storage.join(path, WEIGHTS_FILE), weights)
    storage.write_json(storage.join(path, METRICS_FILE), metrics or {})
    storage.replace(storage.join(path, CARD_FILE), build_model_card(bundle, shapes, metrics or {}).encode())
    storage.write_json(storage.join(path, DESCRIPTION_FILE), bundle.to_dict())
    return bundle


def recalibrate_bundle(
    bundle: ModelBundle,
    path: str,
    *,
    temperature: float | tuple[float, ...],
    thresholds: dict[str, dict[str, float]] | None,
    provenance: dict[str, Any],
    metrics: dict[str, Any],
) -> ModelBundle:
    """Write ``bundle`` to ``path`` with another calibration and the same weights, byte for byte; needs no torch.

    Raises:
        UsageError: ``path`` is the bundle's own or holds another model, or temperature or thresholds do not fit its
            classes.
    """
    path = storage.absolute(str(path))
    if path == bundle.path or (storage.is_local(path) and Path(path).resolve() == Path(bundle.path).resolve()):
        raise UsageError(f"{path}: that is the model itself; name another directory for the calibrated one")
    if (
        storage.exists(storage.join(path, DESCRIPTION_FILE))
        and load_bundle(path).weights_sha256 != bundle.weights_sha256
    ):
        raise UsageError(f"{path}: holds a model of other weights; choose another place")
    changed = {"temperature": temperature, "thresholds": thresholds, "provenance": provenance}
    values = {key: value for key, value in bundle.to_dict().items() if key not in ("format_version", "model_id")}
    calibrated = ModelBundle(path=path, **check_description(values | changed, where=path))
    weights = storage.join(bundle.path, WEIGHTS_FILE)
    shapes = read_header(weights)
    storage.replace(storage.join(path, WEIGHTS_FILE), storage.read_bytes(weights))
    storage.write_json(storage.join(path, METRICS_FILE), metrics)
    storage.replace(storage.join(path, CARD_FILE), build_model_card(calibrated, shapes, metrics).encode())
    storage.write_json(storage.join(path, DESCRIPTION_FILE), calibrated.to_dict())
    return calibrated


def init_bundle(
    path: str,
    *,
    arch: str,
    weights: str,
    classes: str,
    task: Task = "multiclass",
    resize_size: int | None = None,
    crop_size: int | None = None,
    resize_mode: ResizeMode | None = None,
    median_size: int | None = None,
    reducing_gap: float | None = None,
    num_bands: int | None = None,
    value_range: tuple[float, float] | None = None,
    overwrite: bool = False,
) -> ModelBundle:
    """Make a bundle from weights that somebody trained.

    Args:
        path: the directory to write.
        weights: see ``weights.read_state_dict``; stored in the type they have, used as float32.
        classes: ``imagenet1k``, or a file: see ``classes.read_class_names``.
        resize_size: px, in place of what the architecture is published with; see ``PreprocessSpec.overridden``.
        crop_size: px, likewise.
        resize_mode: likewise, as are the next two.
        num_bands: for rasters, bands 1 to this; weights for RGB are adapted (see ``weights.adapt_channels``), and
            every band is normalised by the mean of what red, green and blue are.
        value_range: of a raster's values: what becomes 0 and what becomes 255; goes with ``num_bands``.
        overwrite: replace a different model that is there.

    Raises:
        UsageError: the parts do not fit together, or another model is there.
    """
    check_architecture(arch)
    class_names = check_class_names(read_class_names(classes), task=task, where=f"--classes {classes}")
    try:
        preprocess = default_preprocess(arch, published_name(weights) or "DEFAULT").overridden(
            resize_size=resize_size,
            crop_size=crop_size,
            resize_mode=resize_mode,
            median_size=median_size,
            reducing_gap=reducing_gap,
        )
    except ValueError as error:
        raise UsageError(f"preprocess: {error}") from error
    state_dict = read_state_dict(weights, arch)
    if num_bands is not None or value_range is not None:
        preprocess = _with_bands(preprocess, num_bands, value_range)
        state_dict = adapt_channels(arch, state_dict, preprocess.num_channels)
    where = f"--weights {weights}"
    num_outputs = num_head_outputs(arch, {n: tuple(t.shape) for n, t in state_dict.items()}, where=where)
    if task == "binary" and num_outputs == 1:
        state_dict = expand_binary_head(arch, state_dict)
    elif num_outputs != len(class_names):
        raise UsageError(
            f"{where}: its head has {num_outputs} outputs, but --classes {classes} names {len(class_names)}"
        )
    network = fit_network(arch, state_dict, crop_size=preprocess.crop_size, where=where)
    return save_bundle(
        path,
        arch=arch,
        task=task,
        class_names=class_names,
        preprocess=preprocess,
        state_dict=network.state_dict(),
        provenance={
            "made_by": "imgbatch model init",
            "weights": _origin(weights, arch),
            "classes": _file_name(classes),
        },
        overwrite=overwrite,
    )


def _with_bands(
    preprocess: PreprocessSpec, num_bands: int | None, value_range: tuple[float, float] | None
) -> PreprocessSpec:
    if num_bands is None or value_range is None:
        raise UsageError("--bands and --value-range belong together: how many bands, and which values become 0 and 255")
    low, high = value_range
    mean, std = (sum(per_channel) / len(per_channel) for per_channel in (preprocess.mean, preprocess.std))
    try:
        bands = BandSpec(tuple(range(1, num_bands + 1)), (low,) * num_bands, (high,) * num_bands)
    except ValueError as error:
        raise UsageError(f"--bands {num_bands} --value-range {low:g},{high:g}: {error}") from error
    return replace(preprocess, mean=(mean,) * num_bands, std=(std,) * num_bands, bands=bands)


def _origin(weights: str, arch: str) -> str:
    name = published_name(weights)
    return f"torchvision {arch} {published_weights(arch, name).name}" if name else _file_name(weights)


def _file_name(source: str) -> str:
    """Neither a person's folders nor a presigned query belong in a file that travels."""
    return normalise_message(source).rsplit("/", 1)[-1]


def _refuse_other_model(bundle: ModelBundle) -> None:
    if not storage.exists(storage.join(bundle.path, DESCRIPTION_FILE)):
        return
    there = load_bundle(bundle.path).model_id
    if there != bundle.model_id:
        raise UsageError(f"{bundle.path}: holds another model ({there}); choose another place, or --overwrite it")
