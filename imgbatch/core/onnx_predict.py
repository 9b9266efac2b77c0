"""An ONNX graph that takes images as they were decoded, run by ONNX Runtime: by TensorRT on a GPU, or on the CPU.

Shape suffixes: B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgbatch.core.variants import ONNX_BATCH, ONNX_INPUT
from imgbatch.errors import UsageError

_TENSORRT = "TensorrtExecutionProvider"


class OnnxGraph:
    """uint8 ``images_BHWC`` on the device in, float32 ``logits_BK`` there out; several threads may call at once.

    For batches of exactly ``batch_size``. On a GPU TensorRT builds its engine for them when the graph is loaded first,
    which takes minutes; it is kept for the next process on that machine (see :func:`load_with_engines`).

    Args:
        model: the serialised graph.
        device: ``cpu`` or ``cuda`` (``cuda:1`` for another than the first).
        num_threads: of one call on a CPU, or none for as many as ONNX Runtime likes.

    Raises:
        UsageError: ONNX Runtime is not installed, or on a GPU not with TensorRT.
    """

    def __init__(self, model: bytes, *, device: str, batch_size: int, num_threads: int | None) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        # Threads that wait for the next batch would take the cores from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_free_dimension_override_by_name(ONNX_BATCH, batch_size)
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        self._device = torch.device(device)
        if self._device.type == "cuda":
            versions = _load_tensorrt(runtime)
            index = self._device.index or 0
            major, minor = torch.cuda.get_device_capability(index)
            # ONNX Runtime names an engine after the graph alone, and would load one that was built for other batches.
            name = f"{hashlib.sha256(model).hexdigest()[:16]}-{batch_size}-{versions}-sm{major}{minor}"
            self._session = load_with_engines(name, partial(_on_gpu, model, options, index))
        else:
            self._session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (output,) = self._session.get_outputs()
        self._output, self._num_classes = output.name, output.shape[1]

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        if images_BHWC.device.type == "cpu":
            (logits_BK,) = self._session.run(None, {ONNX_INPUT: images_BHWC.numpy()})
            return torch.from_numpy(logits_BK)
        index = images_BHWC.device.index
        on_device = torch.empty((len(images_BHWC), self._num_classes), device=images_BHWC.device)
        # ONNX Runtime has a stream of its own, which does not wait for torch's.
        torch.cuda.current_stream(images_BHWC.device).synchronize()
        binding = self._session.io_binding()
        binding.bind_input(ONNX_INPUT, "cuda", index, np.uint8, tuple(images_BHWC.shape), images_BHWC.data_ptr())
        binding.bind_output(self._output, "cuda", index, np.float32, tuple(on_device.shape), on_device.data_ptr())
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return on_device


def import_onnxruntime() -> Any:
    """The package; raises :class:`UsageError` where it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "onnxruntime is not installed; pip install 'imgbatch[onnxruntime]', or 'imgbatch[tensorrt]' for GPUs"
        ) from error
    return onnxruntime


def _load_tensorrt(runtime: Any) -> str:
    """CUDA's libraries come from the packages that torch has brought, TensorRT's from its own.

    Gives the versions of what builds engines and loads them, of which neither loads another's.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise UsageError("tensorrt is not installed; pip install 'imgbatch[tensorrt]'") from error
    runtime.preload_dlls()
    return f"trt{tensorrt.__version__}-ort{runtime.__version__}"


def _on_gpu(model: bytes, options: Any, index: int, engines: Mapping[str, Any]) -> Any:
    """A session in which TensorRT leaves to CUDA what it cannot do."""
    tensorrt = {"device_id": index, "trt_int8_enable": True, "trt_fp16_enable": True, **engines}
    providers = [(_TENSORRT, tensorrt), ("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]
    session = import_onnxruntime().InferenceSession(model, options, providers=providers)
    if _TENSORRT not in session.get_providers():
        raise UsageError("TensorRT could not be loaded; pip install 'imgbatch[tensorrt]', in place of onnxruntime")
    return session


def load_with_engines(name: str, load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What ``load`` makes with TensorRT's options for engines, which are kept for the next process on this machine.

    They come whole to ``$XDG_CACHE_HOME/imgbatch/tensorrt/NAME``, whoever is killed. Of processes that start at the
    same time one builds them and the others wait: that takes minutes, and TensorRT chooses by timing, so engines of two
    builds need not agree. Those that do not serve are built once more. Where nothing can be written there are no
    options, and nothing is kept.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "imgbatch", "tensorrt")
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # there may be no home directory
        return load({})
    kept = cache / name
    with _locked(cache / f"{name}.lock"):
        if (loaded := _load_kept(kept, load)) is not None:
            return loaded
        try:
            building = tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache)
        except OSError:
            return load({})
        with building:
            loaded = load(_engine_options(Path(building.name)))
            with contextlib.suppress(OSError):  # where there are no locks, another process may have been first
                Path(building.name).rename(kept)
        return loaded


def _load_kept(kept: Path, load: Callable[[Mapping[str, Any]], Any]) -> Any:
    """With the engines that are kept; none where there are none, or those that do not serve, which are removed."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    if not any(kept.glob("*")):
        return None
    try:
        return load(_engine_options(kept))
    except EPFail as error:
        if "could not deserialize engine" not in str(error):
            raise
    shutil.rmtree(kept, ignore_errors=True)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process of this machine is in such a block meanwhile, where the file system has locks.

    A lock ends with its process. The file stays: another process may be about to lock it.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield


def _engine_options(engines: Path) -> dict[str, Any]:
    # No timing cache: ONNX Runtime writes it in place, and where TensorRT does not take it, builds nothing any more.
    return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(engines)}
