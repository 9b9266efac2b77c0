"""Variants: other forms of a bundle's network, each with what it was measured to agree with the original.

    MODEL/variants/openvino-int8/{model.xml, model.bin, variant.json}
    MODEL/variants/openvino-fp32/{model.xml, model.bin, variant.json}
    MODEL/variants/openvino-bf16/{model.xml, model.bin, variant.json}
    MODEL/variants/mnn-fp32/{model.mnn, model.mnn.weight, variant.json}
    MODEL/variants/torch-compile/variant.json
    MODEL/variants/torch-bf16/variant.json
    MODEL/variants/torch-fp16/variant.json
    MODEL/variants/onnx-int8/{model.onnx, variant.json}

A variant gives logits; temperature, thresholds and class names stay those of model.json, and so does ``model_id``.
variant.json names every other file with its sha256 and is written last. Needs none of the libraries that run them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from imgbatch.core import storage
from imgbatch.core.metrics.intervals import wilson_interval
from imgbatch.core.model import ModelBundle
from imgbatch.errors import UsageError

VARIANTS_DIRECTORY, VARIANT_FILE = "variants", "variant.json"

Target = Literal[
    "openvino-int8",
    "openvino-bf16",
    "openvino-fp32",
    "mnn-fp32",
    "torch-bf16",
    "torch-fp16",
    "torch-compile",
    "onnx-int8",
]
TARGETS: tuple[Target, ...] = get_args(Target)

GRAPH_FILE, CONSTANTS_FILE = "model.xml", "model.bin"
"""An OpenVINO network."""
MNN_FILE, MNN_WEIGHTS_FILE = "model.mnn", "model.mnn.weight"
ONNX_FILE, ONNX_INPUT, ONNX_BATCH = "model.onnx", "images", "batch"
"""An ONNX graph, the name of its input, and that of the dimension which is the number of images."""


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Agreement(_Plain):
    """A variant beside the original network in torch, float32, on images that it was not calibrated with."""

    images: int = Field(ge=1)
    labels: float = Field(ge=0, le=1)
    """Share of the images with the same label; multilabel: with the same set of labels."""
    largest_difference: float = Field(ge=0, le=1)
    """Of a probability."""
    mean_difference: float = Field(ge=0, le=1)
    """Of a probability, absolute."""
    images_with_target: int = Field(ge=0)
    original_accuracy: float | None = Field(None, ge=0, le=1)
    """Of the images with a target that the model knows; single-label tasks only."""
    variant_accuracy: float | None = Field(None, ge=0, le=1)
    """Of the same images."""

    def describe(self) -> str:
        """One line for a person."""
        text = (
            f"the same labels as torch fp32 on {self.labels:.2%} of {self.images:,} images, probabilities within "
            f"{self.largest_difference:.2g} (mean {self.mean_difference:.2g})"
        )
        if self.original_accuracy is None or self.variant_accuracy is None:
            return text
        return (
            f"{text}, accuracy {self.variant_accuracy:.2%} instead of {self.original_accuracy:.2%} "
            f"on {self.images_with_target:,}"
        )


class Variant(_Plain):
    """What variant.json says."""

    format_version: Literal[1] = 1
    target: Target
    device: Literal["cpu", "cuda"]
    """What it is for, and was measured on."""
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the model.safetensors that it was made from."""
    crop_size: int = Field(ge=1)
    """px."""
    mean: tuple[float, ...]
    """What it takes off each channel, as ``PreprocessSpec.mean``."""
    std: tuple[float, ...]
    files: dict[Literal["model.xml", "model.bin", "model.mnn", "model.mnn.weight", "model.onnx"], str]
    """sha256, hex."""
    batch_size: int = Field(ge=1)
    """Images per forward pass that were the fastest."""
    images_per_s: dict[str, float]
    """Of one thread on the machine that made it, ``original`` and ``variant``, without decoding."""
    agreement: Agreement
    provenance: dict[str, Any]

    @property
    def backend(self) -> str:
        """As ``classify.backend`` names it."""
        return backend_name(self.target)

    @property
    def speedup(self) -> float:
        """Its images/s divided by the original's, where it was made."""
        return self.images_per_s["variant"] / self.images_per_s["original"]

    def doubt(self, min_agreement: float) -> str | None:
        """Why it may agree less than is asked for, though it did on the few images that it was measured with.

        None where they were enough, or where it computes in float32 as the original does.
        """
        agreement = self.agreement
        low, high = wilson_interval(round(agreement.labels * agreement.images), agreement.images)
        if self.target.endswith(("fp32", "torch-compile")) or not low < min_agreement <= agreement.labels:
            return None
        return (
            f"{agreement.images:,} images say between {low:.1%} and {high:.1%} (95%), and classify asks for "
            f"{100 * min_agreement:g}%; calibrate with more to be sure"
        )

    @property
    def variant_id(self) -> str:
        """``v`` and 12 hex digits: equal for variants that give equal logits."""
        decisive = [self.target, self.weights_sha256, self.crop_size, self.mean, self.std, sorted(self.files.items())]
        return "v" + hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]


def backend_name(target: Target) -> str:
    """``openvino_int8`` for ``openvino-int8``: commands have hyphens, the configuration underscores."""
    return target.replace("-", "_")


def directory_of(bundle_path: str, target: Target) -> str:
    """Where a bundle keeps the variant."""
    return storage.join(bundle_path, VARIANTS_DIRECTORY, target)


def load_variants(bundle: ModelBundle) -> list[Variant]:
    """The variants that a bundle holds, fastest where they were made first; their files are not looked at.

    Raises:
        UsageError: a variant.json is not what this imgbatch writes.
    """
    found = (_load_variant(bundle, target) for target in TARGETS)
    return sorted((variant for variant in found if variant is not None), key=lambda variant: -variant.speedup)


def _load_variant(bundle: ModelBundle, target: Target) -> Variant | None:
    where = storage.join(directory_of(bundle.path, target), VARIANT_FILE)
    try:
        variant = Variant.model_validate_json(storage.read_bytes(where))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{where}: {key or 'its text'}: {first['msg']}; {_again(target)}") from error
    if variant.target != target:
        raise UsageError(f"{where}: describes {variant.target}; {_again(target)}")
    return variant


def read_files(bundle: ModelBundle, variant: Variant) -> dict[str, bytes]:
    """The variant's files by name.

    Raises:
        UsageError: one is missing, or is not what variant.json describes.
    """
    contents = {}
    for name, digest in variant.files.items():
        uri = storage.join(directory_of(bundle.path, variant.target), name)
        try:
            contents[str(name)] = storage.read_bytes(uri)
        except OSError as error:
            raise UsageError(f"{uri}: {error.strerror or error}; {_again(variant.target)}") from error
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise UsageError(
                f"{uri}: not the file that {VARIANT_FILE} describes (sha256 differs); {_again(variant.target)}"
            )
    return contents


def save_variant(bundle: ModelBundle, variant: Variant, contents: Mapping[str, bytes]) -> None:
    """Write a variant into its bundle, in place of one of the same target."""
    directory = directory_of(bundle.path, variant.target)
    for name, data in contents.items():
        storage.replace(storage.join(directory, name), data)
    storage.write_json(storage.join(directory, VARIANT_FILE), variant.model_dump(mode="json"))


def _again(target: Target) -> str:
    return f"make it again with `imgbatch model optimize MODEL --target {target}`, or remove its directory"
