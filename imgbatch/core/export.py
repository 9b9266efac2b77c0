"""``imgbatch model export``: a bundle as one file for people who deploy elsewhere, checked on real images.

The exported graph is the whole model: uint8 images ``[N, H, W, C]`` in, as ``preprocess`` decodes and crops them,
probabilities ``[N, K]`` out; batches of any size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from imgbatch.config import Config
from imgbatch.core import onnx_build, openvino_build, storage
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_bundle
from imgbatch.core.openvino_predict import compile_network, import_openvino
from imgbatch.core.pictures import load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.core.predictions import require_predictions
from imgbatch.core.variants import ONNX_INPUT
from imgbatch.errors import CheckFailed, UsageError

Format = Literal["onnx", "openvino"]

MAX_DIFFERENCE = 1e-3
"""Of a probability, between the exported file and torch."""
OUTPUT = "probabilities"
_SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml"}


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how it compares with torch."""

    files: list[str]
    images: int
    """Looked at by both."""
    same_labels: int
    """Of those."""
    largest_difference: float
    """Of a probability."""


def export_bundle(
    model: str, *, file_format: Format, output: str, manifest: str, limit: int = 64, config: Config | None = None
) -> ExportResult:
    """Write a bundle's model as ONNX or OpenVINO, after what it says of real images was compared with torch.

    Args:
        output: ends in ``.onnx``, or in ``.xml``, beside which a ``.bin`` is written.
        manifest: of the images to compare on.
        limit: at most so many of them, spread over the manifest.
        config: how images are fetched and decoded; none: the defaults.

    Raises:
        UsageError: another suffix, no image to compare on, one of which the model says nothing, a package that is not
            installed, or a network that cannot be converted.
        CheckFailed: a probability differs by more than :data:`MAX_DIFFERENCE`; nothing was written.
    """
    suffix = _SUFFIXES[file_format]
    if not output.endswith(suffix):
        raise UsageError(f"-o {output}: a file of format {file_format} must end in {suffix}")
    bundle = load_bundle(model)
    pictures = load_pictures(open_manifest(manifest), bundle.preprocess, config or Config(), limit=limit)
    images_NHWC = pictures.images_NHWC
    if not len(images_NHWC):
        raise UsageError(f"manifest {manifest}: not one image to compare on could be decoded ({pictures.reasons})")
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name, f"model{suffix}")
        write = _write_onnx if file_format == "onnx" else _write_openvino
        write(bundle, staged)
        result = _compare(bundle, staged, images_NHWC)
        if not result.largest_difference <= MAX_DIFFERENCE:  # it may be NaN
            raise CheckFailed(
                f"{model}: as {file_format} a probability differs by {result.largest_difference:.2g} from torch's, "
                f"more than {MAX_DIFFERENCE:g}; nothing was written"
            )
        # The graph comes last: where it is, its constants are too.
        for path in sorted(Path(name).iterdir()):
            uri = output.removesuffix(suffix) + path.suffix
            with storage.staged_file(uri) as target:
                shutil.copyfile(path, target)
            result.files.append(uri)
    return result


def _write_onnx(bundle: ModelBundle, path: Path) -> None:
    proto = onnx_build.convert_network(bundle, output=OUTPUT, probabilities=True)
    for key, value in describe(bundle).items():
        proto.metadata_props.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def _write_openvino(bundle: ModelBundle, path: Path) -> None:
    openvino = import_openvino()
    network = openvino_build.convert_network(bundle, probabilities=True)
    network.input(0).set_names({ONNX_INPUT})
    network.output(0).set_names({OUTPUT})
    for key, value in describe(bundle).items():
        network.set_rt_info(value, ["imgbatch", key])
    # Constants would otherwise be rounded to float16.
    openvino.save_model(network, str(path), compress_to_fp16=False)


def describe(bundle: ModelBundle) -> dict[str, str]:
    """What whoever runs the file must know, as texts."""
    return {
        "model_id": bundle.model_id,
        "arch": bundle.arch,
        "task": bundle.task,
        "class_names": json.dumps(bundle.class_names, ensure_ascii=False),
        "preprocess": json.dumps(bundle.preprocess.to_dict()),
        "input": f"{ONNX_INPUT}: uint8 [N, H, W, C], decoded, resized and cropped as preprocess says, not normalised",
    }


def _compare(bundle: ModelBundle, path: Path, images_NHWC: np.ndarray) -> ExportResult:
    """OpenVINO reads both formats."""
    expected = Predictor(bundle, batch_size=8).predict(images_NHWC)
    require_predictions(expected, f"{bundle.path}: the model")
    expected_NK = expected.probs_NK
    compiled = compile_network(import_openvino().Core().read_model(str(path)), num_threads=None)
    batches: list[Any] = [compiled(images_NHWC[start : start + 8])[0] for start in range(0, len(images_NHWC), 8)]
    given_NK = np.concatenate(batches)
    return ExportResult(
        files=[],
        images=len(images_NHWC),
        same_labels=int((expected_NK.argmax(axis=1) == given_NK.argmax(axis=1)).sum()),
        largest_difference=float(np.abs(expected_NK - given_NK).max()),
    )
