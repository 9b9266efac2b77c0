"""The long run under fire, at the size that ``IMGBATCH_SOAK_IMAGES`` and ``IMGBATCH_SOAK_KILLS`` give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = os.environ.get("IMGBATCH_SOAK_IMAGES", "100000")
KILLS = os.environ.get("IMGBATCH_SOAK_KILLS", "100")
MINUTES = 180
"""A hundred kills took 60."""


@pytest.mark.ray
@pytest.mark.soak
def test_every_row_comes_out_once_whatever_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.bench.random_kills", "--images", IMAGES, "--kills", KILLS, "--pace", "2.5"]
    # It ends itself and what it started before the time is up.
    command += ["--minutes", str(MINUTES - 10), "--folder", str(tmp_path)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=60 * MINUTES
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| kills | {KILLS}: " in done.stdout
    assert "| rows missing | 0 |" in done.stdout
