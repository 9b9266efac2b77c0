from __future__ import annotations

import numpy as np
import pytest

from imgbatch.report.plots import contact_sheet

pytest.importorskip("matplotlib", reason="the report extra is not installed")


@pytest.mark.parametrize("name", ["price $5_$10", "$$", "100% {cotton} $x^$"])
def test_a_class_name_is_no_mathematics(name):
    assert contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), [name]).startswith(b"\x89PNG")
