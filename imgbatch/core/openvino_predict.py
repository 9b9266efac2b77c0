"""Pixels to probabilities in OpenVINO, without torch.

Shape suffixes: B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.failpoints import failpoint
from imgbatch.core.model import ModelBundle
from imgbatch.core.predictions import BatchedPredictor, BatchOutput, probabilities
from imgbatch.core.variants import CONSTANTS_FILE, GRAPH_FILE
from imgbatch.errors import UsageError


class OpenVinoPredictor(BatchedPredictor):
    """A variant of a bundle on the CPU.

    The network is compiled for batches of exactly ``batch_size``; smaller ones are filled up.

    Args:
        network: from :func:`parse_network`; uint8 ``images_BHWC`` in, ``logits_BK`` out.
        num_threads: of one forward pass, or none for as many as OpenVINO likes.
    """

    def __init__(self, bundle: ModelBundle, network: Any, *, batch_size: int, num_threads: int | None) -> None:
        super().__init__(bundle, batch_size=batch_size)
        spec = bundle.preprocess
        self._batch_BHWC = np.zeros((batch_size, spec.crop_size, spec.crop_size, spec.num_channels), np.uint8)
        network.reshape(self._batch_BHWC.shape)
        self._request = compile_network(network, num_threads=num_threads).create_infer_request()

    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        num_images = len(images_BHWC)
        self._batch_BHWC[:num_images] = images_BHWC
        failpoint("classify.forward")
        self._request.infer([self._batch_BHWC], share_inputs=True)
        # A copy, because the next batch is written to the same place.
        return self._request.get_output_tensor(0).data[:num_images].copy()

    def _collect(self, output: npt.NDArray[np.float32]) -> BatchOutput:
        return probabilities(output, self.bundle.task, self.bundle.temperature)


def parse_network(contents: Mapping[str, bytes]) -> Any:
    """An ``openvino.Model`` from the two files of its format; raises :class:`UsageError` without OpenVINO."""
    openvino = import_openvino()
    return openvino.Core().read_model(model=contents[GRAPH_FILE], weights=contents[CONSTANTS_FILE])


def compile_network(network: Any, *, num_threads: int | None) -> Any:
    """An ``openvino.CompiledModel`` for the CPU.

    One stream: the actor hands over one batch after the other.
    """
    openvino = import_openvino()
    settings: dict[str, Any] = {
        # On processors that have bfloat16 it would be taken for what is float32, and labels would change.
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
        # Every actor of a machine would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads
    return openvino.Core().compile_model(network, "CPU", settings)


def import_openvino() -> Any:
    """The package; raises :class:`UsageError` where it is not installed."""
    # Importing OpenVINO or NNCF would report to their makers, with an identifier kept in the home directory.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise UsageError("openvino is not installed; pip install 'imgbatch[openvino]'") from error
    return openvino
