"""Pixels to probabilities in OpenVINO, without torch.

Shape suffixes: B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from imgbatch.core.failpoints import failpoint
from imgbatch.core.model import ModelBundle
from imgbatch.core.predictions import BatchedPredictor, BatchOutput, probabilities
from imgbatch.core.variants import CONSTANTS_FILE, GRAPH_FILE
from imgbatch.errors import UsageError

_setting_up = threading.Lock()


class OpenVinoPredictor(BatchedPredictor):
    """A variant of a bundle on the CPU.

    The network is compiled for batches of exactly ``batch_size``; smaller ones are filled up.

    Args:
        network: from :func:`parse_network`; uint8 ``images_BHWC`` in, ``logits_BK`` out.
        num_threads: of one forward pass, or none for as many as OpenVINO likes.
        streams: threads that may call it at once; each has a place for its batch.
        reduced: as for :func:`compile_network`.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        network: Any,
        *,
        batch_size: int,
        num_threads: int | None,
        streams: int = 1,
        reduced: bool = False,
    ) -> None:
        super().__init__(bundle, batch_size=batch_size)
        spec = bundle.preprocess
        self._shape = (batch_size, spec.crop_size, spec.crop_size, spec.num_channels)
        network.reshape(self._shape)
        self._compiled = compile_network(network, num_threads=num_threads, streams=streams, reduced=reduced)
        self._of_thread = threading.local()
        # OpenVINO's bindings finish setting themselves up with the first batch. Of two threads that come first at once,
        # one holds Python's lock and the other what is being set up, and both wait for ever.
        with _setting_up:
            _infer(self._compiled.create_infer_request(), np.zeros(self._shape, np.uint8))

    def _forward(self, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        num_images = len(images_BHWC)
        mine = self._of_thread
        if not hasattr(mine, "request"):
            mine.request, mine.batch_BHWC = self._compiled.create_infer_request(), np.zeros(self._shape, np.uint8)
        mine.batch_BHWC[:num_images] = images_BHWC
        failpoint("classify.forward")
        return _infer(mine.request, mine.batch_BHWC)[:num_images]

    def _collect(self, output: npt.NDArray[np.float32]) -> BatchOutput:
        return probabilities(output, self.bundle.task, self.bundle.temperature)


def _infer(request: Any, images_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    request.infer([images_BHWC], share_inputs=True)
    # A copy, because the next batch is written to the same place.
    logits_BK: npt.NDArray[np.float32] = request.get_output_tensor(0).data.copy()
    return logits_BK


def parse_network(contents: Mapping[str, bytes]) -> Any:
    """An ``openvino.Model`` from the two files of its format; raises :class:`UsageError` without OpenVINO."""
    openvino = import_openvino()
    return openvino.Core().read_model(model=contents[GRAPH_FILE], weights=contents[CONSTANTS_FILE])


def compile_network(network: Any, *, num_threads: int | None, streams: int = 1, reduced: bool = False) -> Any:
    """An ``openvino.CompiledModel`` for the CPU, for ``streams`` batches at once of ``num_threads`` each.

    Args:
        reduced: in bfloat16, but for the logits; in float32 on a processor that has no such arithmetic.
    """
    openvino = import_openvino()
    settings: dict[str, Any] = {
        # Left to itself OpenVINO takes bfloat16 where the processor has it, and labels change.
        "INFERENCE_PRECISION_HINT": "bf16" if reduced else "f32",
        "NUM_STREAMS": streams,
        # Every actor of a machine would pin its threads to the same first cores.
        "ENABLE_CPU_PINNING": False,
    }
    if num_threads is not None:
        settings["INFERENCE_NUM_THREADS"] = num_threads * streams
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
