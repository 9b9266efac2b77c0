"""What runs the model: torch, or a variant of the bundle that fits the device and agrees well enough with torch.

A backend is settled when a run is planned; its name and the variant's id are part of the run's fingerprint, so
results of two backends never mix in one run. Choosing needs none of the libraries that run models.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imgbatch.config import Config
from imgbatch.core.machine import Gpu, has_bfloat16, local_gpus, num_cpus
from imgbatch.core.model import ModelBundle
from imgbatch.core.predictions import BatchedPredictor
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.core.variants import ONNX_FILE, Target, Variant, load_variants, read_files
from imgbatch.errors import UsageError

TORCH = "torch"
MAX_COMPILERS = 4
"""Processes of each model that goes through ``torch.compile``: a network has few kernels, and is compiled once."""

_NEEDED_CAPABILITY: dict[Target, tuple[tuple[int, int], str]] = {
    "torch-bf16": ((8, 0), "bfloat16 arithmetic"),  # GPUs before Ampere emulate it, slower than float32
    "torch-fp16": ((7, 0), "float16 arithmetic"),  # in tensor cores, and by way of Triton
    "torch-compile": ((7, 0), "Triton"),
    "onnx-int8": ((7, 5), "TensorRT"),  # of CUDA 13
}
"""Of a GPU, the least that runs a variant, and what of it needs that."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs the model of one run."""

    variant: Variant | None = None
    """None: the network itself, in torch, float32."""
    left_out: tuple[str, ...] = ()
    """Of better variants that the bundle holds: why they do not serve, one line each."""
    device: str = "cpu"
    """``cpu`` or ``cuda``."""

    @property
    def name(self) -> str:
        return self.variant.backend if self.variant else TORCH

    @property
    def fields(self) -> dict[str, str]:
        """For the run's fingerprint."""
        return {"backend": self.name, **({"variant": self.variant.variant_id} if self.variant else {})}

    def describe(self) -> str:
        """One line for a person."""
        if self.variant is None:
            # torch's own default (torch.backends.cudnn.allow_tf32).
            tf32 = ", convolutions in TF32 where the GPU has it" if self.device == "cuda" else ""
            return f"the model runs in torch, fp32{tf32}"
        return (
            f"the model runs as {self.variant.target} ({self.variant.variant_id}): {self.variant.agreement.describe()}"
        )


def choose_backend(
    config: Config, bundle: ModelBundle, spec: PreprocessSpec, device: str, gpus: Sequence[Gpu] | None = None
) -> Backend:
    """The backend that ``classify.backend`` means for this bundle on this device; a variant's files are checked.

    ``auto`` takes the fastest variant that fits and falls back on torch; any other name is taken or refused.

    Args:
        spec: the preprocessing after overrides.
        gpus: that the model may run on, of a cluster, as far as they are known; none: those of this machine.

    Raises:
        UsageError: the backend that was asked for does not serve, or a variant's files are damaged.
    """
    wanted = config.classify.backend
    if wanted == TORCH:
        return Backend(device=device)
    left_out: list[str] = []
    for variant in load_variants(bundle):
        if not _is_meant(wanted, variant.backend):
            continue
        reason = _why_not(variant, config, bundle, spec, device, gpus)
        if reason is None and wanted == "auto" and variant.speedup < 1:
            reason = f"where it was made it had {variant.speedup:.2f} of torch's speed"
        if reason is None:
            read_files(bundle, variant)
            return Backend(variant, tuple(left_out), device)
        left_out.append(f"{variant.target} is left out: {reason}")
    if wanted == "auto":
        return Backend(None, tuple(left_out), device)
    target = "openvino-int8" if wanted == "openvino" else wanted.replace("_", "-")
    raise UsageError(
        f"classify.backend {wanted}: {'; '.join(left_out)}"
        if left_out
        else f"classify.backend {wanted}: {bundle.path} holds no such variant; make one with "
        f"`imgbatch model optimize {bundle.path} --target {target}`"
    )


def planned_backend(fields: dict[str, Any], bundle: ModelBundle, device: str) -> Backend:
    """The backend that a run was planned with, to be used on ``device``.

    Args:
        fields: of the run's fingerprint.

    Raises:
        UsageError: the bundle does not hold that variant any more, or it is for another device.
    """
    if fields["backend"] == TORCH:
        return Backend(device=device)
    planned = f"the run was planned with variant {fields['variant']} ({fields['backend']})"
    for variant in load_variants(bundle):
        if variant.variant_id != fields["variant"]:
            continue
        if variant.device == device:
            return Backend(variant, device=device)
        raise UsageError(
            f"{bundle.path}: {planned}, which is for {variant.device} and not for {device}; give --set "
            f"resources.device={variant.device}, or classify anew with --new-run"
        )
    raise UsageError(
        f"{bundle.path}: {planned}, which is not there any more; put it back, or classify anew with --new-run"
    )


def begun_backend(
    config: Config, bundle: ModelBundle, spec: PreprocessSpec, fields: dict[str, Any], device: str
) -> Backend | None:
    """As :func:`planned_backend`; none where ``config`` rules it out, whatever the machines are.

    What machines have it, they tell when they load the model.
    """
    try:
        backend = planned_backend(fields, bundle, device)
    except UsageError:
        return None
    is_ruled_out = backend.variant is not None and _why_unfit(backend.variant, config, bundle, spec, device) is not None
    return None if is_ruled_out or not _is_meant(config.classify.backend, backend.name) else backend


def _is_meant(wanted: str, name: str) -> bool:
    """Whether ``classify.backend`` allows the backend of that name."""
    return wanted in ("auto", name) or (wanted != TORCH and name.startswith(wanted))


def build_predictor(
    bundle: ModelBundle,
    backend: Backend,
    *,
    device: str,
    batch_size: int,
    num_threads: int | None,
    features: bool = False,
    streams: int = 1,
) -> BatchedPredictor:
    """The loaded model; only now is what runs it imported.

    Args:
        num_threads: of each stream on a CPU, or none for as many as the library likes.
        streams: threads that may run it at once.

    Raises:
        UsageError: weights or variant are not what the bundle describes, or this machine lacks its arithmetic.
        ValueError: features of a variant, which gives none.
    """
    variant = backend.variant
    if variant is not None:
        if features:
            raise ValueError("a variant gives no features")
        # The machines of a cluster differ, and a run must not mix what they would give.
        if part := without_bfloat16(variant.target, device):
            raise UsageError(
                f"this machine's {part} has no bfloat16 arithmetic, and the run was planned with {variant.target}; "
                f"keep the model to machines that have it (resources.classify_labels), or classify anew with another "
                f"classify.backend and --set run.on_unfinished=abandon"
            )
        return variant_predictor(
            bundle,
            variant.target,
            read_files(bundle, variant),
            device=device,
            batch_size=batch_size,
            num_threads=num_threads,
            streams=streams,
        )
    from imgbatch.core.predict import Predictor

    return Predictor(bundle, device=device, batch_size=batch_size, features=features, num_threads=num_threads)


def variant_predictor(
    bundle: ModelBundle,
    target: Target,
    contents: Mapping[str, bytes],
    *,
    device: str,
    batch_size: int,
    num_threads: int | None,
    streams: int = 1,
) -> BatchedPredictor:
    """What :func:`build_predictor` gives, of a variant whose files need not be in the bundle yet."""
    if target.startswith("openvino"):
        from imgbatch.core.openvino_predict import OpenVinoPredictor, parse_network

        network = parse_network(contents)
        return OpenVinoPredictor(
            bundle,
            network,
            batch_size=batch_size,
            num_threads=num_threads,
            streams=streams,
            reduced=target == "openvino-bf16",
        )
    if target == "mnn-fp32":
        from imgbatch.core.mnn_predict import MnnPredictor

        return MnnPredictor(bundle, contents, batch_size=batch_size, num_threads=num_threads, streams=streams)
    import torch

    from imgbatch.core.predict import Predictor

    reduced: dict[Target, torch.dtype] = {"torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}
    graph = None
    if target == "onnx-int8":
        from imgbatch.core.onnx_predict import OnnxGraph

        graph = OnnxGraph(contents[ONNX_FILE], device=device, batch_size=batch_size, num_threads=num_threads)
    compiled = is_compiled(target, device)
    if compiled:
        _limit_compilers()
    return Predictor(
        bundle,
        device=device,
        batch_size=batch_size,
        num_threads=num_threads,
        compiled=compiled,
        reduced=reduced.get(target),
        graph=graph,
    )


def _limit_compilers() -> None:
    """Otherwise Inductor starts a process for each core, up to 32, and each actor of a machine has its own."""
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config  # torchvision may have loaded it, which reads the variable then

        config.compile_threads = min(MAX_COMPILERS, num_cpus())


def is_compiled(target: Target, device: str) -> bool:
    """Whether the network of a torch variant goes through ``torch.compile``."""
    return target == "torch-compile" or (target in ("torch-bf16", "torch-fp16") and device != "cpu")


def without_bfloat16(target: Target, device: str) -> Literal["processor", "GPU"] | None:
    """What of this machine lacks the arithmetic of a variant, so that it would give something else; none: it has it.

    OpenVINO then computes in float32; torch rounds to bfloat16 on any processor.
    """
    if target == "openvino-bf16":
        return None if has_bfloat16() else "processor"
    if target == "torch-bf16" and device != "cpu":
        import torch

        return None if torch.cuda.is_bf16_supported(including_emulation=False) else "GPU"
    return None


def lacking_gpus(target: Target, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those that are known not to run a variant; what is not known tells when it loads the model."""
    needed, _ = _NEEDED_CAPABILITY.get(target, ((0, 0), ""))
    return [gpu for gpu in gpus if gpu.lacks(needed)]


def _why_not(
    variant: Variant,
    config: Config,
    bundle: ModelBundle,
    spec: PreprocessSpec,
    device: str,
    gpus: Sequence[Gpu] | None,
) -> str | None:
    """Why a variant does not serve, and what to do about it; none if it does."""
    if reason := _why_unfit(variant, config, bundle, spec, device):
        return reason
    # A cluster's machines may have what it takes, and tell when they load the model.
    is_named = config.on_cluster and config.classify.backend == variant.backend
    return (None if is_named else _missing_arithmetic(variant, device, gpus, config)) or _missing_tool(variant)


def _why_unfit(variant: Variant, config: Config, bundle: ModelBundle, spec: PreprocessSpec, device: str) -> str | None:
    """As :func:`_why_not`, whatever the machines have."""
    again = f"make it again with `imgbatch model optimize {bundle.path} --target {variant.target}`"
    if variant.weights_sha256 != bundle.weights_sha256:
        return f"it was made from other weights; {again}"
    if (variant.mean, variant.std) != (spec.mean, spec.std):
        return f"it normalises otherwise than model.json says; {again}"
    if variant.crop_size != spec.crop_size:
        return f"it takes images of {variant.crop_size} px, and this run has {spec.crop_size}"
    if variant.device != device:
        return f"it is for {variant.device}, and this run is on {device}"
    if config.output.embeddings:
        return "embeddings come from torch only"
    min_agreement = config.classify.min_agreement
    if variant.agreement.labels < min_agreement:
        return (
            f"its labels agree with torch on {variant.agreement.labels:.2%} of {variant.agreement.images:,} images, "
            f"below classify.min_agreement {min_agreement:g}"
        )
    return None


def _missing_arithmetic(variant: Variant, device: str, gpus: Sequence[Gpu] | None, config: Config) -> str | None:
    """What the machines that may run a variant lack; one that lacks it is enough, as all of a run take the same."""
    if device == "cpu":
        needs_bfloat16 = variant.target in ("openvino-bf16", "torch-bf16")
        return "this processor has no bfloat16 arithmetic" if needs_bfloat16 and not has_bfloat16() else None
    if variant.target not in _NEEDED_CAPABILITY:
        return None
    if gpus is None:
        gpus = () if config.on_cluster else local_gpus()
    lacking = lacking_gpus(variant.target, gpus)
    if not lacking:
        return None
    (major, minor), what = _NEEDED_CAPABILITY[variant.target]
    found = sorted({f"{gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}" for gpu in lacking if gpu.capability})
    advice = "; resources.classify_labels can keep the model to others"
    return (
        f"{what} needs a GPU of compute capability {major}.{minor}, and {', '.join(found)}"
        f"{advice if config.on_cluster and len(lacking) < len(gpus) else ''}"
    )


def _missing_tool(variant: Variant) -> str | None:
    if variant.backend.startswith("openvino"):
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed here; pip install 'imgbatch[openvino]'"
    elif variant.backend.startswith("mnn"):
        if importlib.util.find_spec("MNN") is None:
            return "MNN is not installed here; pip install 'imgbatch[mnn]'"
    elif variant.backend.startswith("onnx"):
        extra, packages = "onnxruntime", ["onnxruntime"]
        if variant.device == "cuda":
            extra, packages = "tensorrt", ["onnxruntime", "tensorrt"]
        for name in packages:
            if importlib.util.find_spec(name) is None:
                return f"{name} is not installed here; pip install 'imgbatch[{extra}]'"
    elif variant.device == "cuda":
        return _missing_for_triton()
    elif variant.target == "torch-compile" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler; install g++ or name one in CXX"
    return None


def _missing_for_triton() -> str | None:
    """What this machine, if it has a GPU, lacks to compile what Triton launches kernels with; none: nothing.

    Of the nodes behind a head without a GPU nothing is known here: they tell when they load the model.
    """
    if not local_gpus():
        return None
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        return "torch.compile needs a C compiler; install gcc or name one in CC"
    scheme = sysconfig.get_default_scheme()
    # As Triton has it, for Debian's own Python.
    headers = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not Path(headers, "Python.h").exists():
        return f"torch.compile needs Python's headers in {headers}; install them (Debian: python3-dev)"
    return None
