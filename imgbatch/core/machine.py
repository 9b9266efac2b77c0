"""What of the machine this process may use: cores, memory and GPUs, and what their arithmetic is."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CGROUPS = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's ``mallopt(3)``."""

_CAPABILITIES = {
    "P100": (6, 0),
    **dict.fromkeys(("P4", "P6", "P40"), (6, 1)),
    **dict.fromkeys(("V100", "V100S"), (7, 0)),
    **dict.fromkeys(("T4", "T4G"), (7, 5)),
}
"""By the name that Ray gives a type, of those before Ampere (https://developer.nvidia.com/cuda-legacy-gpus): later ones
can all that is asked for."""
_CAPABILITY_ATTRIBUTES = (75, 76)
"""Major and minor: ``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`` and ``_MINOR`` of cuda.h."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or several of one type."""

    name: str
    capability: tuple[int, int] | None
    """CUDA's compute capability, major and minor; none: not known."""

    def lacks(self, needed: tuple[int, int]) -> bool:
        """Whether it is known to be of a lower capability than is needed."""
        return self.capability is not None and self.capability < needed


def num_cpus(cgroups: Path = _CGROUPS) -> int:
    """Cores; a container's quota is rounded down, and at least one.

    Args:
        cgroups: where Linux has the limits of this process, of version 2 or 1.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _numbers(cgroups / "cpu.max") or [
        *_numbers(cgroups / "cpu" / "cpu.cfs_quota_us"),
        *_numbers(cgroups / "cpu" / "cpu.cfs_period_us"),
    ]
    if len(quota) == 2 and quota[0] > 0:
        cores = min(cores, quota[0] // quota[1])
    return max(1, cores)


def memory_bytes(cgroups: Path = _CGROUPS) -> int:
    """Of the machine, or what a container has of it."""
    limits = _numbers(cgroups / "memory.max") or _numbers(cgroups / "memory" / "memory.limit_in_bytes")
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def has_bfloat16(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether the processor multiplies in bfloat16.

    Without it torch computes in float32 and rounds, which is slower than float32 alone.

    Args:
        cpu_info: where Linux lists what the processor can.
    """
    return cpu_info.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu_info.read_text()) is not None


def keep_freed_memory() -> None:
    """From now on what this process frees stays its own: the next large array finds it mapped.

    glibc otherwise gives large blocks back to the kernel, which clears each page that it hands out again. A network's
    activations are such blocks, and in torch are allocated anew in every layer of every batch. Other allocators are
    left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, 2**30) or mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)


def gpu_of_type(name: str) -> Gpu:
    """The GPU that Ray calls ``name`` in its resources and labels, as ``T4``."""
    return Gpu(name, _CAPABILITIES.get(name))


def local_gpus(driver: Any = None) -> tuple[Gpu, ...]:
    """GPUs that CUDA shows this process, without a context on any; empty where its driver does not answer.

    Args:
        driver: CUDA's library; none: that of this machine.
    """
    try:
        cuda = driver or ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_local_gpu(cuda, index) for index in range(count.value))


def _local_gpu(cuda: Any, index: int) -> Gpu:
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    capability = [ctypes.c_int() for _ in _CAPABILITY_ATTRIBUTES]
    failed = cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetName(name, len(name), device)
    for value, attribute in zip(capability, _CAPABILITY_ATTRIBUTES, strict=True):
        failed = failed or cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    major, minor = (value.value for value in capability)
    return Gpu(name.value.decode(errors="replace") or f"GPU {index}", None if failed else (major, minor))


def _numbers(path: Path) -> list[int]:
    """What the file says, where it is there and sets a limit."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):  # "max"
        return []
