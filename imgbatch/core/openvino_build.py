"""A bundle's network as an OpenVINO network, in float32 or quantised to int8.

Shape suffixes: N image, H height, W width, C channel, K class.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.graph import trace_graph
from imgbatch.core.model import ModelBundle
from imgbatch.core.openvino_predict import import_openvino
from imgbatch.core.variants import CONSTANTS_FILE, GRAPH_FILE
from imgbatch.errors import UsageError, normalise_message

MAX_ACCURACY_DROP = 0.005
"""Of int8 on the calibration images, as a share of them, beyond which layers go back to float32."""
_CHANGED_LABELS = 0.01
"""Of int8: what ``classify.min_agreement`` lets pass."""
_MAX_CALIBRATION_IMAGES = 300
_TRANSFORMERS = ("vit_", "swin_", "maxvit_")


@dataclass(frozen=True)
class Calibration:
    """Images that int8 ranges are taken from."""

    images_NHWC: npt.NDArray[np.uint8]
    class_index_N: npt.NDArray[np.int64]
    """The true class, -1 where it is not known."""


def convert_network(bundle: ModelBundle, *, probabilities: bool = False) -> Any:
    """An ``openvino.Model`` in float32: uint8 ``images_NHWC`` in, logits (or probabilities) out; any batch size.

    Raises:
        UsageError: OpenVINO is not installed, or the network cannot be converted.
    """
    openvino = import_openvino()
    program = trace_graph(bundle, probabilities=probabilities)
    try:
        return openvino.convert_model(program)
    except Exception as error:  # its converter has exceptions of its own
        raise UsageError(
            f"{bundle.path}: OpenVINO cannot convert {bundle.arch} ({normalise_message(error)}); it runs in torch only"
        ) from error


def allowed_drop(num_images: int) -> float:
    """:data:`MAX_ACCURACY_DROP`, or what chance alone takes off where that is more, as it is with few images.

    Where a share p of the labels changes, for better or worse alike, the accuracy over n images changes with a standard
    deviation of sqrt(p / n): 95% of the time it drops by no more than 1.64 of that.
    """
    return max(MAX_ACCURACY_DROP, 1.64 * math.sqrt(_CHANGED_LABELS / num_images))


def quantize_network(network: Any, bundle: ModelBundle, calibration: Calibration) -> tuple[Any, str]:
    """``network`` in int8, and how it was quantised, for a person.

    With accuracy control where targets are known: layers whose quantisation costs most go back to float32 until the
    accuracy on the calibration images has dropped by at most :func:`allowed_drop`.

    Raises:
        UsageError: nncf is not installed.
    """
    try:
        import nncf
    except ImportError as error:
        raise UsageError("nncf is not installed; pip install 'imgbatch[openvino]'") from error
    nncf.set_log_level(logging.ERROR)
    known_N = calibration.class_index_N >= 0
    images_NHWC = calibration.images_NHWC[:_MAX_CALIBRATION_IMAGES]
    items = nncf.Dataset([image_HWC[None] for image_HWC in images_NHWC])
    options: dict[str, Any] = {"target_device": nncf.TargetDevice.CPU, "subset_size": len(images_NHWC)}
    # NNCF's fast correction takes layers for independent. Of two ResNet-18s, probabilities came a third closer with the
    # exact one, and a sixth further away.
    options["fast_bias_correction"] = False
    if bundle.arch.startswith(_TRANSFORMERS):
        options["model_type"] = nncf.ModelType.TRANSFORMER
    if not known_N.any():
        return nncf.quantize(network, items, **options), "post-training, no targets to control the accuracy with"
    targets = [
        (image_HWC[None], int(index))
        for image_HWC, index in zip(calibration.images_NHWC[known_N], calibration.class_index_N[known_N], strict=True)
    ]

    def accuracy(compiled: Any, pairs: Iterable[tuple[np.ndarray, int]]) -> tuple[float, list[float]]:
        right = [float(compiled(image_1HWC)[0].argmax() == index) for image_1HWC, index in pairs]
        return sum(right) / len(right), right

    max_drop = allowed_drop(len(targets))
    quantised = nncf.quantize_with_accuracy_control(
        network,
        calibration_dataset=items,
        validation_dataset=nncf.Dataset(targets),
        validation_fn=accuracy,
        max_drop=max_drop,
        drop_type=nncf.DropType.ABSOLUTE,
        **options,
    )
    return quantised, f"post-training, accuracy drop at most {max_drop:.2g} on {len(targets)} images"


def network_files(network: Any) -> dict[str, bytes]:
    """The two files of OpenVINO's format."""
    openvino = import_openvino()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, GRAPH_FILE)
        # Constants would otherwise be rounded to float16.
        openvino.save_model(network, str(path), compress_to_fp16=False)
        return {file: Path(name, file).read_bytes() for file in (GRAPH_FILE, CONSTANTS_FILE)}
