"""What of the machine this process may use: cores, memory and GPUs, and what their arithmetic is."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CGROUPS = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's ``mallopt(3)``."""
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""For the environment that a process starts with in which several threads run a network: glibc otherwise gives each of
them memory in pieces of 64 MB, in which large activations leave gaps, more of them hour by hour."""

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
_CUDA_13, _CUDA_13_CAPABILITY = 13, (7, 5)
"""Which left Volta and older behind, and so have the builds of torch for it."""


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
    """GPUs that this process and those it starts may use, without a context on any; empty where CUDA does not answer.

    Args:
        driver: CUDA's library; none: that of this machine.
    """
    cuda = driver or _load_driver()
    count = ctypes.c_int()
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    gpus = tuple(_local_gpu(cuda, index) for index in range(count.value))
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # CUDA shows a process the first of several MIG instances; each actor gets one of its own.
    return gpus[:1] * len(visible) if visible and visible[0].startswith("MIG-") else gpus


def why_torch_lacks(gpus: Sequence[Gpu], driver_cuda: int | None, torch_cuda: int | None) -> str:
    """Why torch does not compute on these GPUs, and what to do about it, in a line; empty: nothing speaks against it.

    One that it does not compute on is enough, as a run takes all.

    Args:
        driver_cuda: the major version of CUDA that the driver is for, where it is known.
        torch_cuda: that which torch was built with.
    """
    if not gpus or torch_cuda is None or torch_cuda < _CUDA_13:
        return ""
    if driver_cuda is not None and driver_cuda < torch_cuda:
        newer = "driver 580 or newer" if torch_cuda == _CUDA_13 else "a newer driver"
        return f"torch is for CUDA {torch_cuda} and the GPU's driver for CUDA {driver_cuda}; install {newer}"
    lacking = sorted({gpu.name for gpu in gpus if gpu.lacks(_CUDA_13_CAPABILITY)})
    if not lacking:
        return ""
    major, minor = _CUDA_13_CAPABILITY
    return (
        f"torch for CUDA {torch_cuda} needs GPUs of compute capability {major}.{minor}, which {', '.join(lacking)} "
        f"is below; install torch from https://download.pytorch.org/whl/cu126, or keep to other GPUs "
        f"(CUDA_VISIBLE_DEVICES, on a cluster resources.classify_labels)"
    )


def cuda_of_driver(driver: Any = None) -> int | None:
    """The major version of CUDA that the driver of this machine's GPUs is for; none: there is no driver.

    Args:
        driver: CUDA's library; none: that of this machine.
    """
    cuda = driver or _load_driver()
    version = ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000


def cuda_of_torch() -> int | None:
    """The major version of CUDA that torch was built with, without importing it; none: without CUDA."""
    package = importlib.util.find_spec("torch")
    if package is None or package.origin is None:
        return None
    try:
        text = Path(package.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*['\"](\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def _load_driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


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
