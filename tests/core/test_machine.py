from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imgbatch.core import machine
from imgbatch.core.machine import (
    Gpu,
    cuda_of_driver,
    cuda_of_torch,
    gpu_of_type,
    has_bfloat16,
    local_gpus,
    memory_bytes,
    num_cpus,
    why_torch_lacks,
)
from tests.core.cuda_driver import CudaDriver

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


def test_gpus_are_those_that_the_driver_shows() -> None:
    driver = CudaDriver([(b"Tesla V100-SXM2-16GB", 7, 0), (b"NVIDIA A10G", 8, 6)])
    assert local_gpus(driver) == (Gpu("Tesla V100-SXM2-16GB", (7, 0)), Gpu("NVIDIA A10G", (8, 6)))
    assert local_gpus(CudaDriver([])) == ()
    assert local_gpus(CudaDriver([(b"Tesla T4", 7, 5)], starts=False)) == ()


@pytest.mark.parametrize(("visible", "count"), [("MIG-a", 1), ("MIG-a,MIG-b,MIG-c", 3), ("GPU-a,GPU-b", 1), ("0", 1)])
def test_each_mig_instance_that_is_listed_is_one(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpu = (b"NVIDIA A100 MIG 1g.5gb", 8, 0)
    assert local_gpus(CudaDriver([gpu])) == (Gpu("NVIDIA A100 MIG 1g.5gb", (8, 0)),) * count
    assert local_gpus(CudaDriver([])) == ()


@pytest.mark.parametrize("visible", [None, "0", "NoDevFiles", "MIG-a,MIG-b"])
def test_without_cudas_library_there_are_no_gpus(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_load_driver", lambda: None)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert (local_gpus(), cuda_of_driver()) == ((), None)


V100, T4, A100 = Gpu("V100", (7, 0)), Gpu("T4", (7, 5)), Gpu("A100", None)


@pytest.mark.parametrize(
    ("gpus", "driver", "torch", "why"),
    [
        ([], 12, 13, None),
        ([T4, A100], 13, 13, None),
        ([T4], None, 13, None),
        ([T4], 14, 13, None),
        ([V100], 12, 12, None),
        ([V100], 12, None, None),
        ([T4], 12, 13, "torch is for CUDA 13 and the GPU's driver for CUDA 12; install driver 580 or newer"),
        ([T4, V100, V100], 13, 13, "needs GPUs of compute capability 7.5, which V100 is below; install torch from"),
    ],
)
def test_what_torch_does_not_compute_on(
    gpus: list[Gpu], driver: int | None, torch: int | None, why: str | None
) -> None:
    told = why_torch_lacks(gpus, driver, torch)
    assert why in told if why else told == ""


def test_the_driver_says_what_cuda_it_is_for() -> None:
    assert cuda_of_driver(CudaDriver([], version=12080)) == 12
    assert cuda_of_driver(CudaDriver([], version=13020)) == 13


def test_torchs_cuda_is_read_without_importing_it() -> None:
    script = (
        "import sys\n"
        "from imgbatch.core.machine import cuda_of_torch\n"
        "found = cuda_of_torch()\n"
        "assert 'torch' not in sys.modules\n"
        "import torch\n"
        "assert found == (int(torch.version.cuda.split('.')[0]) if torch.version.cuda else None), found\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("text", "cuda"),
    [("cuda: Optional[str] = '13.2'", 13), ("cuda = '12.6'", 12), ("cuda: Optional[str] = None", None), ("", None)],
)
def test_torchs_version_names_its_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cuda: int | None
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(f"debug = False\n{text}\nhip = None\n")
    assert cuda_of_torch() == cuda


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
