from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from imgbatch.core.machine import Gpu, gpu_of_type, has_bfloat16, local_gpus, memory_bytes, num_cpus

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, CORES),
        ({"cpu.max": "max 100000\n"}, CORES),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, min(CORES, 64)),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, CORES),
        ({"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_cores_are_those_of_the_container(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert num_cpus(limits(tmp_path, files)) == cores


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_is_that_of_the_container(tmp_path: Path, name: str) -> None:
    of_the_machine = memory_bytes(tmp_path)
    assert of_the_machine > 2**28
    assert memory_bytes(limits(tmp_path, {name: "134217728\n"})) == 2**27
    assert memory_bytes(limits(tmp_path, {name: f"{2**63 - 4096}\n"})) == of_the_machine
    assert memory_bytes(limits(tmp_path, {name: "max\n"})) == of_the_machine


@pytest.mark.parametrize(
    ("line", "has_it"),
    [
        ("flags\t\t: avx512_vnni avx512_bf16 amx_tile", True),
        ("Features\t: asimd bf16 sve", True),
        ("flags\t\t: avx2 avx512_vnni", False),
    ],
)
def test_bfloat16_is_read_from_what_the_processor_can(tmp_path: Path, line: str, has_it: bool):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert has_bfloat16(tmp_path / "cpuinfo") == has_it
    assert not has_bfloat16(tmp_path / "none")


class CudaDriver:
    """What of ``libcuda`` is asked, for machines without a GPU; 0 is success."""

    def __init__(self, gpus: list[tuple[bytes, int, int]], *, starts: bool = True) -> None:
        self._gpus, self._starts = gpus, starts

    def cuInit(self, _flags: int) -> int:  # noqa: N802 - CUDA's name, as are those below
        return 0 if self._starts else 100

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self._gpus[device.value][0][: size - 1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: self._gpus[device.value][1], 76: self._gpus[device.value][2]}[attribute]
        return 0


def test_gpus_are_those_that_the_driver_shows() -> None:
    driver = CudaDriver([(b"Tesla V100-SXM2-16GB", 7, 0), (b"NVIDIA A10G", 8, 6)])
    assert local_gpus(driver) == (Gpu("Tesla V100-SXM2-16GB", (7, 0)), Gpu("NVIDIA A10G", (8, 6)))
    assert local_gpus(CudaDriver([])) == ()
    assert local_gpus(CudaDriver([(b"Tesla T4", 7, 5)], starts=False)) == ()


def test_of_a_gpu_that_is_not_known_nothing_is_said() -> None:
    assert gpu_of_type("T4") == Gpu("T4", (7, 5))
    assert gpu_of_type("T4").lacks((8, 0))
    assert not gpu_of_type("T4").lacks((7, 5))
    assert not gpu_of_type("H100").lacks((8, 0))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_used_again() -> None:
    def page_faults(first: str) -> int:
        script = (
            "import resource\n"
            "import numpy as np\n"
            "from imgbatch.core.machine import keep_freed_memory\n"
            f"{first}\n"
            "np.ones(2**23)\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(20):\n"
            "    np.ones(2**23)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        )
        return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)

    # 64 MiB, which glibc never keeps by itself: 32 large pages at the least, each of the 20 times.
    assert page_faults("keep_freed_memory()") < 20 * 32 <= page_faults("pass")
