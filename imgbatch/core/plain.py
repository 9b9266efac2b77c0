"""Arrays, decimals and NumPy's numbers as the plain values that JSON has."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np


def to_plain(value: Any) -> Any:
    """``value`` with arrays and tuples as lists, NumPy's numbers and decimals as Python's, keys as strings or whole
    numbers, and NaN and infinities as null."""
    if isinstance(value, dict):
        return {key if isinstance(key, str | int) else str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
