"""The long run under fire, at the size that ``IMGBATCH_SOAK_IMAGES`` and ``IMGBATCH_SOAK_KILLS`` give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = os.environ.get("IMGBATCH_SOAK_IMAGES", "100000")
KILLS = os.environ.get("IMGBATCH_SOAK_KILLS", "100")


@pytest.mark.ray
@pytest.mark.soak
def test_every_row_comes_out_once_whatever_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.bench.random_kills", "--images", IMAGES, "--kills", KILLS]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| rows missing | 0 |" in done.stdout
