from __future__ import annotations

import os
from pathlib import Path

import pytest

from imgbatch.core.machine import has_bfloat16, memory_bytes, num_cpus

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
