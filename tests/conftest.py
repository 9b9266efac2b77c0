"""Shared fixtures: the real data where it is there, and tiny real images otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real images and weights that ``IMGBATCH_TEST_DATA`` names; skips where it is not set."""
    folder = os.environ.get("IMGBATCH_TEST_DATA")
    if not folder:
        pytest.skip("IMGBATCH_TEST_DATA is not set")
    return Path(folder)
