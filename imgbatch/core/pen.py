"""Strokes and colours: shapes of a unit square carried onto a canvas by one matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import ImageDraw

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

Point = tuple[float, float]
"""x to the right, y down."""

_PALETTE = np.array(
    [
        (38, 54, 96),  # navy
        (88, 128, 176),  # denim
        (150, 190, 212),  # sky
        (30, 112, 118),  # teal
        (46, 84, 64),  # forest
        (138, 160, 122),  # sage
        (122, 118, 58),  # olive
        (216, 166, 58),  # mustard
        (226, 204, 160),  # sand
        (198, 104, 68),  # terracotta
        (232, 132, 116),  # coral
        (178, 44, 52),  # red
        (108, 34, 52),  # burgundy
        (110, 72, 120),  # plum
        (222, 176, 184),  # rose
        (122, 82, 54),  # walnut
        (72, 74, 80),  # charcoal
        (164, 164, 160),  # stone
    ]
)


class Pen:
    """Draws shapes of the unit square onto a canvas through an affine ``matrix`` (2 x 3, to px).

    With ``silhouette`` every colour becomes that value: the same strokes on an ``L`` canvas make the object's mask.
    """

    def __init__(self, draw: ImageDraw.ImageDraw, matrix: np.ndarray, *, silhouette: int | None = None) -> None:
        self._draw = draw
        self._matrix = matrix
        self._silhouette = silhouette
        self._scale = math.sqrt(abs(float(np.linalg.det(matrix[:, :2]))))

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        """A filled polygon."""
        self._draw.polygon(self._to_canvas(points), fill=self._fill(color))

    def blob(self, points: Sequence[Point], color: Color) -> None:
        """A filled closed curve through ``points``."""
        self.polygon(_closed_curve(points), color)

    def ellipse(self, center: Point, radii: Point, color: Color, *, start: float = 0.0, end: float = 360.0) -> None:
        """A filled ellipse, or the segment of it from ``start`` to ``end`` (degrees, clockwise from the right)."""
        self.polygon(_arc(center, radii, start, end), color)

    def arc(
        self, center: Point, radii: Point, width: float, color: Color, *, start: float = 0.0, end: float = 360.0
    ) -> None:
        """The outline of an ellipse, or of a part of it, ``width`` thick."""
        self.line(_arc(center, radii, start, end), width, color)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        """A polyline with round joints and ends, ``width`` thick."""
        canvas_points = self._to_canvas(points)
        thickness = max(1.0, width * self._scale)
        fill = self._fill(color)
        self._draw.line(canvas_points, fill=fill, width=round(thickness), joint="curve")
        radius = thickness / 2
        for x, y in (canvas_points[0], canvas_points[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)

    def _to_canvas(self, points: Sequence[Point]) -> list[Point]:
        matrix = self._matrix
        moved = np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]
        return [(float(x), float(y)) for x, y in moved]

    def _fill(self, color: Color) -> Color | int:
        return color if self._silhouette is None else self._silhouette


def random_color(rng: np.random.Generator) -> Color:
    """One of the catalogue's colours, each channel up to 14 off."""
    red, green, blue = np.clip(rng.choice(_PALETTE) + rng.integers(-14, 15, size=3), 0, 255).tolist()
    return red, green, blue


def shade(color: Color, factor: float) -> Color:
    """``color`` darkened (``factor`` below 1) or lightened towards white (above 1)."""
    if factor <= 1:
        red, green, blue = (round(channel * factor) for channel in color)
    else:
        red, green, blue = (round(255 - (255 - channel) / factor) for channel in color)
    return red, green, blue


def rounded(points: Sequence[Point]) -> list[Point]:
    """``points`` as a polygon with its corners cut twice (Chaikin)."""
    corners = np.asarray(points, dtype=np.float64)
    for _ in range(2):
        following = np.roll(corners, -1, axis=0)
        corners = np.stack([corners * 0.8 + following * 0.2, corners * 0.2 + following * 0.8], axis=1).reshape(-1, 2)
    return [(float(x), float(y)) for x, y in corners]


def _arc(center: Point, radii: Point, start: float, end: float) -> list[Point]:
    angles = np.radians(np.linspace(start, end, max(8, int(abs(end - start) / 8))))
    return [(center[0] + radii[0] * math.cos(a), center[1] + radii[1] * math.sin(a)) for a in angles]


def _closed_curve(points: Sequence[Point]) -> list[Point]:
    """The closed Catmull-Rom curve through ``points``, eight points from each to the next."""
    p1 = np.asarray(points, dtype=np.float64)[:, None, :]
    p0, p2, p3 = np.roll(p1, 1, axis=0), np.roll(p1, -1, axis=0), np.roll(p1, -2, axis=0)
    t = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    return [(float(x), float(y)) for x, y in curve.reshape(-1, 2)]
