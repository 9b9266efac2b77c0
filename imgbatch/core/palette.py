"""The colour of a class, wherever labels are drawn on a map: by its index, so that page and rasters agree."""

from __future__ import annotations

import colorsys

_DISTINCT = (0x0072B2, 0x009E73, 0xCC79A7, 0x56B4E9, 0xF0E442, 0xE69F00)
"""Okabe and Ito (2008), told apart with any colour vision, on light and on dark; vermilion is left for failures."""
_GOLDEN_RATIO = 0.61803398875


def class_colour(index: int) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of the class with this index from 0."""
    if index < len(_DISTINCT):
        red, green, blue = _DISTINCT[index].to_bytes(3, "big")
        return red, green, blue
    # Hues a golden ratio apart, so that each differs from those just before it.
    shares = colorsys.hsv_to_rgb(index * _GOLDEN_RATIO % 1, 0.65, 0.9 if index % 2 == 0 else 0.65)
    return round(255 * shares[0]), round(255 * shares[1]), round(255 * shares[2])
