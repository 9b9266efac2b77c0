"""A bundle's network as an MNN network in float32."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from imgbatch.core import onnx_build
from imgbatch.core.mnn_predict import import_mnn
from imgbatch.core.model import ModelBundle
from imgbatch.core.variants import MNN_FILE, MNN_WEIGHTS_FILE
from imgbatch.errors import UsageError, normalise_message

_CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"
"""Not the command ``mnnconvert``, which reports to MNN's makers after it has installed what it needs for that."""


def convert_network(bundle: ModelBundle) -> dict[str, bytes]:
    """The files of MNN's format: uint8 ``images_NHWC`` in, logits out; any batch size.

    Raises:
        UsageError: MNN or onnx is not installed, or the network cannot be converted.
    """
    import_mnn()
    network = onnx_build.convert_network(bundle, output="logits")
    with tempfile.TemporaryDirectory() as name:
        graph, converted = Path(name, "model.onnx"), Path(name, MNN_FILE)
        graph.write_bytes(network.SerializeToString())
        # In a process of its own, because it prints, and ends the process over some networks.
        arguments = ["--framework", "ONNX", "--modelFile", str(graph), "--MNNModel", str(converted)]
        command = [sys.executable, "-P", "-c", _CONVERT, *arguments, "--bizCode", "imgbatch", "--keepInputFormat", "1"]
        # Weights in the file itself would be kept in memory, beside what MNN makes of them.
        command += ["--saveExternalData", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not converted.exists():
            ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            said = [text.strip().splitlines()[-1] for text in (done.stdout, done.stderr) if text.strip()]
            reason = normalise_message("; ".join([ended, *said[-1:]]))
            raise UsageError(f"{bundle.path}: MNN cannot convert {bundle.arch} ({reason}); use another target")
        return {path.name: path.read_bytes() for path in (converted, Path(name, MNN_WEIGHTS_FILE)) if path.exists()}
