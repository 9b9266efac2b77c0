"""``imgbatch model optimize``: a variant of a bundle, measured against the original before anyone uses it.

Shape suffixes: N image, H height, W width, C channel, K class.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from imgbatch import __version__
from imgbatch.config import Config
from imgbatch.core import mnn_build, onnx_build, openvino_build, storage
from imgbatch.core.backends import is_compiled, variant_predictor, without_bfloat16
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import DESCRIPTION_FILE, ModelBundle, load_bundle, load_metrics, recalibrate_bundle
from imgbatch.core.openvino_build import Calibration
from imgbatch.core.pictures import Pictures, load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.core.predictions import BatchedPredictor, require_predictions
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.units import choose_unit_rows
from imgbatch.core.variants import ONNX_FILE, Agreement, Target, Variant, load_variants, read_files, save_variant
from imgbatch.errors import UsageError

MIN_IMAGES = 50
"""Fewer say too little about how often labels agree."""
_CPU_BATCH_SIZES, _COMPILED_BATCH_SIZES, _GPU_BATCH_SIZES = (1, 4, 8, 16, 32), (8,), (64, 128, 256, 512)
"""To choose from by measurement; compiling takes a minute on a CPU, for each."""
_TENSORRT_BATCH_SIZES = (256,)
"""One, because TensorRT takes minutes to build its engine for each."""
_ROUNDS, _MEASURE_S = 5, 0.1
"""In turns, because the speed of a shared machine drifts."""
_NEARLY = 0.97
"""Of the best rate: a smaller batch that reaches it is taken."""
_ORIGINAL_BATCH_SIZES = {"cpu": 8, "cuda": 256}

_ON_CPU, _ON_GPU = ("openvino", "mnn"), ("torch-fp16",)
"""Targets that run nowhere else, by how they begin; float16 is slower than float32 on most processors."""


@dataclass(frozen=True)
class _Built:
    """A variant before it was measured."""

    bundle: ModelBundle
    target: Target
    device: str
    contents: dict[str, bytes]
    how: dict[str, str]

    def build(self, batch_size: int, num_threads: int | None) -> BatchedPredictor:
        return variant_predictor(
            self.bundle,
            self.target,
            self.contents,
            device=self.device,
            batch_size=batch_size,
            num_threads=num_threads,
        )


def optimize_bundle(
    model: str,
    *,
    target: Target,
    calibration: str,
    output: str | None = None,
    limit: int = 1000,
    config: Config | None = None,
) -> tuple[ModelBundle, Variant]:
    """Make a variant and measure it: every second image calibrates, the others are held out to measure with.

    Images of the split that training takes do neither, where there are enough others.

    Args:
        calibration: a manifest of images like those that will be classified; with targets, the accuracy is measured
            too, and int8 is made with accuracy control.
        output: a copy of the bundle that gets the variant; none: the bundle itself.
        limit: at most so many images, spread over the manifest.
        config: how images are fetched and decoded, and the device; none: the defaults.

    Raises:
        UsageError: too few images, a network that cannot be converted, a package or a device that is not there, or
            another model at ``output``.
    """
    config = config or Config()
    bundle = load_bundle(model)
    there = bundle if output is None else _copied_before(bundle, output)
    device = _device(target, config.resources.device)
    if part := without_bfloat16(target, device):
        raise UsageError(f"{target}: this {part} has no bfloat16 arithmetic; make the variant on one that has")
    manifest = open_manifest(calibration)
    pictures = load_pictures(manifest, bundle.preprocess, config, limit=limit, min_unseen=MIN_IMAGES)
    num_images = len(pictures.images_NHWC)
    if num_images < MIN_IMAGES:
        others = f" (the others: {pictures.reasons})" if pictures.failed else ""
        raise UsageError(
            f"manifest {calibration}: {num_images} images could be decoded, and at least {MIN_IMAGES} are needed"
            f"{others}"
        )
    class_index_N = _class_indices(pictures, bundle)
    built = _build(bundle, target, device, Calibration(pictures.images_NHWC[::2], class_index_N[::2]))
    held_out_NHWC = pictures.images_NHWC[1::2]
    batch_size, images_per_s = _measure(bundle, built, held_out_NHWC)
    original = Predictor(bundle, device=built.device, batch_size=_ORIGINAL_BATCH_SIZES[built.device])
    agreement = _compare(original, built.build(batch_size, None), held_out_NHWC, class_index_N[1::2])
    variant = Variant(
        target=target,
        device=built.device,
        weights_sha256=bundle.weights_sha256,
        crop_size=bundle.preprocess.crop_size,
        mean=bundle.preprocess.mean,
        std=bundle.preprocess.std,
        files={name: hashlib.sha256(data).hexdigest() for name, data in built.contents.items()},
        batch_size=batch_size,
        images_per_s=images_per_s,
        agreement=agreement,
        provenance={
            "made_by": "imgbatch model optimize",
            "calibration": calibration.rstrip("/").rpartition("/")[2],
            "calibration_images": len(pictures.images_NHWC[::2]),
            "measured_of_train_split": int(pictures.of_train_N[1::2].sum()),
            **built.how,
            "versions": _versions(),
        },
    )
    bundle = there or _copy(bundle, str(output))
    save_variant(bundle, variant, built.contents)
    return bundle, variant


def _copied_before(bundle: ModelBundle, output: str) -> ModelBundle | None:
    """The bundle as it is at ``output``, with what was added to it there; raises :class:`UsageError` for another."""
    if not storage.exists(storage.join(storage.absolute(output), DESCRIPTION_FILE)):
        return None
    there = load_bundle(output)
    if there.model_id != bundle.model_id:
        raise UsageError(f"{there.path}: holds another model ({there.model_id}); choose another place")
    return there


def _device(target: Target, wanted: str) -> str:
    """``cpu`` or ``cuda``: what ``resources.device`` asks for, where the target leaves a choice."""
    if wanted == "cpu" and target.startswith(_ON_GPU):
        raise UsageError(f"{target}: is for GPUs only, and resources.device is cpu")
    if wanted == "cpu" or target.startswith(_ON_CPU):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise UsageError(f"{target}: resources.device is cuda, and torch finds no GPU here")
    if target.startswith(_ON_GPU):
        raise UsageError(f"{target}: is for GPUs only, and torch finds none here; make the variant where there is one")
    return "cpu"


def _build(bundle: ModelBundle, target: Target, device: str, calibration: Calibration) -> _Built:
    contents: dict[str, bytes] = {}
    how: dict[str, str] = {}
    if target in ("openvino-fp32", "openvino-bf16"):
        contents = openvino_build.network_files(openvino_build.convert_network(bundle))
    elif target == "openvino-int8":
        network = openvino_build.convert_network(bundle)
        network, how["quantised"] = openvino_build.quantize_network(network, bundle, calibration)
        contents = openvino_build.network_files(network)
    elif target == "mnn-fp32":
        contents = mnn_build.convert_network(bundle)
    elif target == "onnx-int8":
        network = onnx_build.convert_network(bundle, output="logits")
        contents = {ONNX_FILE: onnx_build.quantize_network(network, calibration.images_NHWC)}
        how["quantised"] = "post-training, symmetric, the accuracy measured but not controlled"
    return _Built(bundle, target, device, contents, how)


def _class_indices(pictures: Pictures, bundle: ModelBundle) -> np.ndarray:
    """int64, the true class of each image; -1 where it is not known, and for tasks that have no single one."""
    index = {name: k for k, name in enumerate(bundle.class_names)}
    single = bundle.task != "multilabel"
    known = [names[0] if single and names and len(names) == 1 else None for names in pictures.targets]
    return np.array([index.get(name, -1) if name is not None else -1 for name in known], np.int64)


def _compare(
    original: BatchedPredictor, variant: BatchedPredictor, images_NHWC: np.ndarray, class_index_N: np.ndarray
) -> Agreement:
    bundle = original.bundle
    expected, given = original.predict(images_NHWC), variant.predict(images_NHWC)
    require_predictions(expected, f"{bundle.path}: the original")
    require_predictions(given, f"{bundle.path}: the variant")
    expected_N = _labels(bundle, expected.probs_NK)
    given_N = _labels(bundle, given.probs_NK)
    difference_NK = np.abs(expected.probs_NK - given.probs_NK)
    known_N = class_index_N >= 0
    accuracies = [
        float((labels[known_N, 0] == class_index_N[known_N]).mean()) if known_N.any() else None
        for labels in (expected_N, given_N)
    ]
    return Agreement(
        images=len(images_NHWC),
        labels=float((expected_N == given_N).all(axis=1).mean()),
        largest_difference=float(difference_NK.max()),
        mean_difference=float(difference_NK.mean()),
        images_with_target=int(known_N.sum()),
        original_accuracy=accuracies[0],
        variant_accuracy=accuracies[1],
    )


def _labels(bundle: ModelBundle, probs_NK: np.ndarray) -> np.ndarray:
    """The label's index, [N, 1]; multilabel: which labels apply, [N, K]."""
    if bundle.task != "multilabel":
        return probs_NK.argmax(axis=1)[:, None]
    stated = (bundle.thresholds or {}).get("labels", {})
    return probs_NK >= np.array([stated.get(name, DEFAULT_LABEL_THRESHOLD) for name in bundle.class_names])


def _measure(bundle: ModelBundle, built: _Built, images_NHWC: np.ndarray) -> tuple[int, dict[str, float]]:
    """The smallest batch size that is nearly as fast as the best, and images/s in one thread of original and variant.

    Medians of rounds in which every batch size and the original have their turn.
    """
    threads_before = torch.get_num_threads()
    try:
        original = Predictor(bundle, device=built.device, batch_size=_ORIGINAL_BATCH_SIZES[built.device], num_threads=1)
        variants = _candidates(built)
        turns = [
            (each, np.resize(images_NHWC, (each.batch_size, *images_NHWC.shape[1:]))) for each in (original, *variants)
        ]
        rounds = [[measure_rate(*turn, _MEASURE_S) for turn in turns] for _ in range(_ROUNDS)]
    finally:
        torch.set_num_threads(threads_before)
    original_rate, *rates = [round(statistics.median(each), 1) for each in zip(*rounds, strict=True)]
    chosen = next(k for k, rate in enumerate(rates) if rate >= _NEARLY * max(rates))
    return variants[chosen].batch_size, {"original": original_rate, "variant": rates[chosen]}


def _candidates(built: _Built) -> list[BatchedPredictor]:
    """One for each batch size to choose from, as far as the device has room for them, and one in any case."""
    found: list[BatchedPredictor] = []
    for batch_size in batch_sizes(built.target, built.device, built.bundle.preprocess):
        try:
            candidate = built.build(batch_size, 1)
        except (UsageError, torch.OutOfMemoryError):  # the latter of another copy of the weights
            if not found:
                raise
            break
        if found and candidate.batch_size < batch_size:
            break
        found.append(candidate)
    return found


def batch_sizes(target: Target, device: str, spec: PreprocessSpec) -> tuple[int, ...]:
    """To choose from; none is larger than the largest unit, which would never fill it."""
    sizes: tuple[int, ...] = _COMPILED_BATCH_SIZES if is_compiled(target, device) else _CPU_BATCH_SIZES
    if device == "cuda":
        sizes = _TENSORRT_BATCH_SIZES if target == "onnx-int8" else _GPU_BATCH_SIZES
    # Of a manifest of any length, and with results that are small.
    largest = choose_unit_rows(spec.pixel_bytes, 1, 10**9)
    return tuple(size for size in sizes if size <= largest) or (largest,)


def measure_rate(predictor: BatchedPredictor, batch_NHWC: np.ndarray, seconds: float) -> float:
    """Images per second that got through the forward pass, for about ``seconds`` after a first batch."""
    predictor.predict(batch_NHWC)
    started, num_images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        num_images += predictor.predict(batch_NHWC).errors.count(None)
    return num_images / (time.perf_counter() - started)


def _copy(bundle: ModelBundle, output: str) -> ModelBundle:
    """The bundle and its variants in another place."""
    copied = recalibrate_bundle(
        bundle,
        output,
        temperature=bundle.temperature,
        thresholds=bundle.thresholds,
        provenance=bundle.provenance,
        metrics=load_metrics(bundle.path),
    )
    for variant in load_variants(bundle):
        save_variant(copied, variant, read_files(bundle, variant))
    return copied


def _versions() -> dict[str, Any]:
    found = {"imgbatch": __version__, "torch": version("torch")}
    for name in ("openvino", "nncf", "mnn", "onnxruntime", "onnxruntime-gpu", "tensorrt"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
