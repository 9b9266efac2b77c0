"""A bundle's network as an ONNX graph, in float32 or quantised to int8 as TensorRT wants it."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from imgbatch.core.graph import trace_graph
from imgbatch.core.model import ModelBundle
from imgbatch.core.onnx_predict import import_onnxruntime
from imgbatch.core.variants import ONNX_BATCH, ONNX_INPUT
from imgbatch.errors import UsageError, normalise_message

_MAX_CALIBRATION_IMAGES = 300
_CALIBRATION_BATCH = 5
_QUANTISED = ["Conv", "Gemm", "MatMul", "Add"]
"""Operators; Add for the sake of residual connections, which would go through float32 between two int8 layers."""


def convert_network(bundle: ModelBundle, *, output: str, probabilities: bool = False) -> Any:
    """An ``onnx.ModelProto`` in float32: uint8 ``images`` ``[N, H, W, C]`` in, logits (or probabilities) out.

    Args:
        output: its name.

    Raises:
        UsageError: onnx is not installed, or the network cannot be converted.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise UsageError("onnx and onnxscript are not installed; pip install 'imgbatch[onnx]'") from error
    program = trace_graph(bundle, probabilities=probabilities)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program, input_names=[ONNX_INPUT], output_names=[output], dynamo=True, verbose=False
            )
    except Exception as error:  # whatever the exporter stumbles over
        raise UsageError(
            f"{bundle.path}: {bundle.arch} cannot be exported to ONNX ({normalise_message(error)})"
        ) from error
    assert exported is not None
    model = exported.model_proto  # another one each time
    graph = model.graph
    # torch calls it s0 or s17.
    traced = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == traced:
                dimension.dim_param = ONNX_BATCH
    return model


def quantize_network(network: Any, images_NHWC: npt.NDArray[np.uint8]) -> bytes:
    """``network`` with its convolutions and products of matrices in int8, as a serialised ONNX graph.

    Explicit quantisation as in TensorRT's guide: symmetric, weights by output channel, activations by tensor, pairs of
    QuantizeLinear and DequantizeLinear in front of both.

    Args:
        images_NHWC: that the ranges of activations are taken from, of which the first 300 are looked at.

    Raises:
        UsageError: ONNX Runtime is not installed.
    """
    import_onnxruntime()
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = self._cut()

        def _cut(self) -> Iterator[npt.NDArray[np.uint8]]:
            for start in range(0, min(len(images_NHWC), _MAX_CALIBRATION_IMAGES), _CALIBRATION_BATCH):
                yield images_NHWC[start : start + _CALIBRATION_BATCH]

        def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:
            batch = next(self._batches, None)
            return None if batch is None else {ONNX_INPUT: batch}

    # It tells its progress by print.
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        written, prepared, quantised = (
            str(Path(name, f"{step}.onnx")) for step in ("written", "prepared", "quantised")
        )
        Path(written).write_bytes(network.SerializeToString())
        # Folds batch norms into the convolutions before them.
        quant_pre_process(written, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            quantised,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            # Methods with histograms hold every activation of every image: 25 MB each for ResNet-18.
            calibrate_method=quantization.CalibrationMethod.MinMax,
            extra_options={
                "CalibMovingAverage": True,
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
            },
        )
        return Path(quantised).read_bytes()
