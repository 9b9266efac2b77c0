"""What the job takes of a machine's memory, by arithmetic: stated before a run, and held to what actors take by a test.

Private memory of each process, as psutil's USS has it, at its peak; what processes share (units on their way, in Ray's
object store and in the decoders' memory) is counted once. The constants were measured on Linux, x86-64, with Python
3.11, Ray 2.60, torch 2.15, OpenVINO 2026.4 and MNN 3.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from imgbatch.core.backends import MAX_COMPILERS, Backend, is_compiled
from imgbatch.core.gpu_share import MAX_ENCODED_BYTES
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.runtime.pools import Pools

_MB = 10**6
_OWN_RAY_BYTES, _CLUSTER_RAY_BYTES = 600 * _MB, 900 * _MB
"""Ray's own processes of a machine and the driver; in a cluster, Ray Data's three actors too."""
_ACTOR_BYTES = 180 * _MB
"""An actor of Ray Data with Arrow and pandas, before it does anything."""
_CHILD_BYTES = 75 * _MB
"""A decoding child before its first image."""
_DECODED_PIXEL_BYTES = 8
"""Of a source image's pixel: RGBX from the decoder, what Pillow makes of it, and the file."""
_ENCODED_PIXEL_BYTES = 0.5
"""JPEG has less, PNG more."""
_CUDA_BYTES = 1500 * _MB
"""Of a process with a CUDA context, on the host: CUDA's libraries, and the kernels of cuDNN and cuBLAS that it loads.
An estimate, not measured yet."""
_COMPILER_BYTES = 250 * _MB
"""Of each process at work for ``torch.compile``, before the first image: g++ measured, Triton not yet."""
_PINNED_BATCHES = 2
"""Of each stream: one on its way to the GPU while the next is staged."""
_STAGE_SHARE = 0.75
"""Of a limit on the object store, what Ray Data lets one of two stages have: half of it is reserved, in equal parts."""


@dataclass(frozen=True, slots=True)
class _Library:
    """What runs the model, measured with ResNet-18 at batches of 8 and 32."""

    base: int
    weight_copies: int
    """Of the parameters, once: the contents of the file, the network, and what the library packs of it."""
    runner: int
    """Of each thread that runs the model."""
    runner_weight_copies: int
    """Of each of these."""
    pixel: int
    """Of each input pixel of a batch: activations."""


_TORCH = _Library(base=400 * _MB, weight_copies=4, runner=300 * _MB, runner_weight_copies=0, pixel=192)
_OPENVINO = _Library(base=150 * _MB, weight_copies=4, runner=20 * _MB, runner_weight_copies=0, pixel=48)
_MNN = _Library(base=50 * _MB, weight_copies=1, runner=10 * _MB, runner_weight_copies=4, pixel=100)
"""Winograd's form of a 3 x 3 convolution has four times as many weights."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes at the peak."""

    decode_actor: int
    """Each, without what it shares."""
    decode_child: int
    """Each; a poison image may take it up to ``decode.memory_mb`` more before it is ended."""
    classify_actor: int
    """Each, on the host, with what compiles for it."""
    units: int
    """Units on their way, in all."""
    ray: int
    """What is there beside the pools."""
    total: int
    """Of everything, where all of it is on one machine."""

    def describe(self, pools: Pools) -> str:
        """One line for a person."""
        parts = (
            f"{pools.decode_actors} x {self.decode_actor / _MB:,.0f} MB decode actors",
            f"{pools.decoders} x {self.decode_child / _MB:,.0f} their children",
            f"{pools.classify_actors} x {self.classify_actor / _MB:,.0f} classify actors",
            f"{self.units / _MB:,.0f} units on their way",
            f"{self.ray / _MB:,.0f} Ray",
        )
        return f"{self.total / _MB:,.0f} MB: {', '.join(parts)}"


def max_stored_units(pools: Pools) -> int:
    """Decoded units that the object store is to hold at once, over the cluster: Ray Data stops decoding beyond.

    Those under way in every call of a decode and of a classify actor: with fewer, decoders would wait for room; more,
    such as half of the store, which Ray Data would fill, make nothing faster.
    """
    under_way = pools.decode_actors * pools.decode_calls + pools.classify_actors * pools.classify_calls
    return math.ceil(under_way / _STAGE_SHARE)


def stored_unit_bytes(unit_rows: int, spec: PreprocessSpec, gpu_share: float) -> int:
    """Of a decoded unit, at most: its pixels, and the encoded images beside them that are left to the GPU."""
    return unit_rows * spec.pixel_bytes + (MAX_ENCODED_BYTES if gpu_share else 0)


def memory_budget(
    pools: Pools,
    spec: PreprocessSpec,
    backend: Backend,
    *,
    unit_rows: int,
    batch_size: int,
    weight_bytes: int,
    in_flight: int,
    image_pixels: int,
    gpu_share: float = 0.0,
    on_cluster: bool = False,
) -> MemoryBudget:
    """The budget of a job.

    Args:
        weight_bytes: of the model's parameters in float32.
        in_flight: ``fetch.in_flight``.
        image_pixels: of a source image, width x height.
        gpu_share: ``decode.gpu_share``.
        on_cluster: not in a Ray of the job's own.
    """
    unit_bytes = stored_unit_bytes(unit_rows, spec, gpu_share)
    child = _CHILD_BYTES + image_pixels * _DECODED_PIXEL_BYTES
    library = _OPENVINO if backend.name.startswith("openvino") else _MNN if backend.name == "mnn_fp32" else _TORCH
    runner = library.runner + library.runner_weight_copies * weight_bytes
    if pools.classify_gpus:  # which have their activations in memory of their own
        runner += _PINNED_BATCHES * _pinned_bytes(batch_size * spec.pixel_bytes)
    else:
        runner += batch_size * spec.crop_size**2 * library.pixel
    # Only with MNN does each of a stream's threads run the model over a batch of its own.
    runners = pools.classify_streams * (pools.classify_threads if library is _MNN else 1)
    classify = _ACTOR_BYTES + library.base + library.weight_copies * weight_bytes + runners * runner
    classify += _CUDA_BYTES if pools.classify_gpus else 0
    if backend.variant is not None and is_compiled(backend.variant.target, backend.device):
        classify += MAX_COMPILERS * _COMPILER_BYTES
    # Beside those in the object store, of each decoder the unit that it fills and the one before, which goes there.
    units = (max_stored_units(pools) + 2 * pools.decoders) * unit_bytes
    # Each call has files of its own ahead.
    decode = _ACTOR_BYTES + pools.decode_calls * in_flight * int(image_pixels * _ENCODED_PIXEL_BYTES)
    ray = _CLUSTER_RAY_BYTES if on_cluster else _OWN_RAY_BYTES
    total = ray + pools.decode_actors * decode + pools.decoders * child + pools.classify_actors * classify + units
    return MemoryBudget(decode, child, classify, units, ray, total)


def _pinned_bytes(num_bytes: int) -> int:
    """What torch's allocator of pinned memory takes for a block: the next power of two."""
    return 1 << (num_bytes - 1).bit_length()
