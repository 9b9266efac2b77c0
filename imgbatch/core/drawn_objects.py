"""Ten catalogue objects, drawn from polygons: what the demo's images show.

Objects live in a unit square: x to the right, y down, both -1 to 1, upright, seen from the front. Every function
draws with a :class:`~imgbatch.core.pen.Pen` and varies its object's build and colours through the generator it is
given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from imgbatch.core.pen import Color, Pen, Point, random_color, rounded, shade

_INK: Color = (38, 36, 40)
_STEEL: Color = (150, 154, 160)
_PAPER: Color = (244, 240, 230)
_SECOND_HAND: Color = (190, 44, 40)
_DRINK: Color = (150, 96, 48)


def draw_book(pen: Pen, rng: np.random.Generator) -> None:
    """A closed book, standing, with its spine, the edge of its pages and a title."""
    cover, title = random_color(rng), _contrast(rng)
    half_width, depth = rng.uniform(0.5, 0.62), rng.uniform(0.1, 0.2)
    left, right, top, bottom = -half_width, half_width, -0.85, 0.75
    pen.polygon([(left, top), (left + depth, top - 0.12), (right + depth, top - 0.12), (right, top)], _PAPER)
    pen.polygon([(right, top), (right + depth, top - 0.12), (right + depth, bottom - 0.12), (right, bottom)], _PAPER)
    for step in np.linspace(0.2, 0.8, 4):
        x = right + depth * step
        pen.line([(x, top - 0.12 * step), (x, bottom - 0.12 * step)], 0.012, shade(_PAPER, 0.75))
    pen.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], cover)
    pen.polygon([(left, top), (left + 0.14, top), (left + 0.14, bottom), (left, bottom)], shade(cover, 0.7))
    middle = (left + 0.14 + right) / 2
    for row, length in enumerate(rng.uniform(0.16, 0.36, size=rng.integers(1, 4))):
        y = -0.5 + 0.16 * row
        pen.line([(middle - length, y), (middle + length, y)], 0.07, title)
    if rng.random() < 0.6:
        pen.ellipse((middle, 0.3), (0.2, rng.uniform(0.12, 0.24)), shade(cover, rng.choice([0.6, 1.8])))


def draw_bottle(pen: Pen, rng: np.random.Generator) -> None:
    """A bottle with neck, cap, highlight and mostly a label."""
    glass, cap = random_color(rng), _contrast(rng)
    half_body, half_neck = rng.uniform(0.26, 0.38), rng.uniform(0.09, 0.14)
    shoulder = rng.uniform(-0.35, -0.1)
    neck = shoulder - rng.uniform(0.2, 0.3)
    side = [(half_neck, -0.82), (half_neck, neck), (half_body, shoulder), (half_body, 0.88), (half_body - 0.07, 0.95)]
    outline = [*side, *((-x, y) for x, y in reversed(side))]
    pen.polygon(outline, glass)
    pen.line([(-half_body * 0.65, shoulder + 0.12), (-half_body * 0.65, 0.8)], 0.07, shade(glass, 1.6))
    pen.polygon(
        [(half_body * 0.6, shoulder), (half_body, shoulder), (half_body, 0.9), (half_body * 0.6, 0.9)],
        shade(glass, 0.75),
    )
    pen.polygon(
        [(-half_neck - 0.03, -0.95), (half_neck + 0.03, -0.95), (half_neck + 0.03, -0.78), (-half_neck - 0.03, -0.78)],
        cap,
    )
    if rng.random() < 0.8:
        top, bottom = rng.uniform(0.0, 0.15), rng.uniform(0.5, 0.7)
        pen.polygon([(-half_body, top), (half_body, top), (half_body, bottom), (-half_body, bottom)], _PAPER)
        pen.line([(-half_body * 0.5, (top + bottom) / 2), (half_body * 0.5, (top + bottom) / 2)], 0.08, cap)


def draw_chair(pen: Pen, rng: np.random.Generator) -> None:
    """A four-legged chair, half turned, its back either slatted or closed."""
    wood = random_color(rng)
    cushion = random_color(rng) if rng.random() < 0.5 else shade(wood, 1.25)
    thickness, slant = rng.uniform(0.08, 0.12), rng.uniform(0.12, 0.3)
    top, seat = rng.uniform(-0.95, -0.8), rng.uniform(0.05, 0.15)
    far, near = shade(wood, 0.65), wood
    back_left, back_right, front_left, front_right = -0.38, 0.5, -0.38 - slant, 0.5 - slant
    pen.line([(back_left, seat), (back_left, 0.78)], thickness, far)
    pen.line([(back_right, seat), (back_right, 0.78)], thickness, far)
    for x in (back_left, back_right):
        pen.line([(x, seat), (x, top)], thickness, near)
    if rng.random() < 0.5:
        for y in np.linspace(top + 0.06, seat - 0.3, int(rng.integers(2, 5))):
            pen.line([(back_left, y), (back_right, y)], thickness, near)
    else:
        pen.polygon([(back_left, top), (back_right, top), (back_right, seat - 0.28), (back_left, seat - 0.28)], cushion)
    pen.polygon(
        [(back_left, seat - 0.06), (back_right, seat - 0.06), (front_right, seat + 0.18), (front_left, seat + 0.18)],
        cushion,
    )
    pen.line([(front_left, seat + 0.19), (front_right, seat + 0.19)], thickness, near)
    for x in (front_left, front_right):
        pen.line([(x, seat + 0.19), (x, 0.95)], thickness, near)


def draw_clock(pen: Pen, rng: np.random.Generator) -> None:
    """A round clock with hour marks and three hands at any time of day."""
    rim, face = random_color(rng), _PAPER if rng.random() < 0.7 else shade(random_color(rng), 2.5)
    radius = rng.uniform(0.76, 0.88)
    pen.ellipse((0, 0), (radius + 0.1, radius + 0.1), rim)
    pen.ellipse((0, 0), (radius, radius), shade(rim, 0.7))
    pen.ellipse((0, 0), (radius - 0.04, radius - 0.04), face)
    for hour in range(12):
        outer, inner = radius - 0.1, radius - (0.26 if hour % 3 == 0 else 0.18)
        pen.line([_polar(hour * 30, inner), _polar(hour * 30, outer)], 0.06 if hour % 3 == 0 else 0.03, _INK)
    minutes = rng.uniform(0, 720)
    pen.line([(0, 0), _polar(minutes / 2, 0.42)], 0.1, _INK)
    pen.line([(0, 0), _polar(minutes * 6, 0.62)], 0.07, _INK)
    pen.line([_polar(rng.uniform(0, 360), 0.6), (0, 0)], 0.025, _SECOND_HAND)
    pen.ellipse((0, 0), (0.08, 0.08), rim)


def draw_key(pen: Pen, rng: np.random.Generator) -> None:
    """A key: a bow with a hole, a shaft and two to four teeth."""
    metal = random_color(rng)
    width = rng.uniform(0.12, 0.17)
    radius = rng.uniform(0.25, 0.32)
    pen.line([(0, -0.3), (0, 0.9)], width, metal)
    for y in np.linspace(0.86, rng.uniform(0.35, 0.55), int(rng.integers(2, 5))):
        length = rng.uniform(0.18, 0.34)
        pen.polygon([(0, y - 0.05), (length, y - 0.05), (length, y + 0.05), (0, y + 0.05)], metal)
    if rng.random() < 0.6:
        pen.arc((0, -0.6), (radius, radius), 0.15, metal)
    else:
        for angle in (0, 120, 240):
            x, y = _polar(angle, radius * 0.6)
            pen.arc((x, y - 0.6), (radius * 0.55, radius * 0.55), 0.11, metal)
    pen.line([(-width * 0.25, -0.2), (-width * 0.25, 0.8)], 0.03, shade(metal, 1.7))


def draw_lamp(pen: Pen, rng: np.random.Generator) -> None:
    """A table lamp: a conical shade on a stem with a round foot."""
    cover, stem = random_color(rng), random_color(rng)
    upper, lower, rim = rng.uniform(0.22, 0.38), rng.uniform(0.6, 0.75), rng.uniform(-0.1, 0.1)
    if rng.random() < 0.5:
        pen.line([(0, rim), (0, 0.85)], rng.uniform(0.07, 0.12), stem)
    else:
        belly = rng.uniform(0.2, 0.3)
        pen.blob([(-0.05, rim), (-belly, 0.5), (-0.1, 0.85), (0.1, 0.85), (belly, 0.5), (0.05, rim)], stem)
    pen.ellipse((0, 0.86), (rng.uniform(0.32, 0.45), 0.1), shade(stem, 0.8))
    pen.ellipse((0, rim), (lower, 0.1), shade(cover, 1.8))
    pen.polygon([(-upper, -0.92), (upper, -0.92), (lower, rim), (-lower, rim)], cover)
    pen.ellipse((0, rim), (lower, 0.1), cover, start=180, end=360)
    pen.polygon([(upper * 0.4, -0.92), (upper, -0.92), (lower, rim), (lower * 0.4, rim + 0.02)], shade(cover, 0.85))
    pen.line([(-lower, rim), (lower, rim)], 0.05, shade(cover, 0.6))
    pen.line([(-upper, -0.92), (upper, -0.92)], 0.05, shade(cover, 0.6))


def draw_mug(pen: Pen, rng: np.random.Generator) -> None:
    """A mug seen from slightly above, with a handle, a drink and sometimes a band."""
    glaze = random_color(rng)
    half_width, taper, side = rng.uniform(0.5, 0.62), rng.uniform(0.78, 1.0), rng.choice([-1, 1])
    foot = half_width * taper
    pen.arc((side * half_width * 0.95, 0.05), (0.34, rng.uniform(0.3, 0.4)), 0.15, shade(glaze, 0.8))
    pen.ellipse((0, 0.72), (foot, 0.15), glaze)
    pen.polygon([(-half_width, -0.6), (half_width, -0.6), (foot, 0.72), (-foot, 0.72)], glaze)
    pen.polygon(
        [(-half_width, -0.6), (-half_width * 0.55, -0.5), (-foot * 0.55, 0.84), (-foot, 0.72)], shade(glaze, 0.8)
    )
    if rng.random() < 0.5:
        band, y = _contrast(rng), rng.uniform(-0.1, 0.25)
        at = half_width + (foot - half_width) * (y + 0.6) / 1.32
        pen.polygon([(-at, y), (0, y + 0.1), (at, y), (at, y + 0.18), (0, y + 0.28), (-at, y + 0.18)], band)
    pen.ellipse((0, -0.6), (half_width, 0.17), shade(glaze, 1.4))
    pen.ellipse((0, -0.57), (half_width * 0.88, 0.12), shade(_DRINK, rng.uniform(0.35, 1.0)))


def draw_shirt(pen: Pen, rng: np.random.Generator) -> None:
    """A T-shirt laid flat, plain, striped or with a print."""
    cloth, accent = random_color(rng), _contrast(rng)
    sleeve, hem = rng.uniform(-0.25, 0.1), rng.uniform(0.8, 0.92)
    waist = rng.uniform(0.44, 0.54)
    half = [(0.2, -0.8), (0.5, -0.72), (0.95, sleeve), (0.7, sleeve + 0.2), (0.5, -0.2), (waist, hem)]
    outline = [*half, *((-x, y) for x, y in reversed(half))]
    pen.polygon(outline, cloth)
    pen.line([(0.7, sleeve + 0.2), (0.95, sleeve)], 0.05, shade(cloth, 0.7))
    pen.line([(-0.7, sleeve + 0.2), (-0.95, sleeve)], 0.05, shade(cloth, 0.7))
    pattern = rng.choice(["plain", "stripes", "print"])
    if pattern == "stripes":
        for y in np.linspace(-0.12, hem - 0.12, int(rng.integers(3, 6))):
            pen.polygon([(-0.48, y), (0.48, y), (0.48, y + 0.09), (-0.48, y + 0.09)], accent)
    elif pattern == "print":
        pen.ellipse((0, 0.05), (0.24, 0.24), accent)
    for side in (-1, 1):
        pen.line([(side * 0.5, -0.2), (side * waist, hem)], 0.03, shade(cloth, 0.75))
    pen.ellipse((0, -0.8), (0.22, 0.2), shade(cloth, 0.55), start=0, end=180)
    pen.arc((0, -0.8), (0.22, 0.2), 0.06, shade(cloth, 0.8), start=0, end=180)


def draw_shoe(pen: Pen, rng: np.random.Generator) -> None:
    """A laced sports shoe from the side."""
    upper, accent = random_color(rng), _contrast(rng)
    sole = _PAPER if rng.random() < 0.6 else shade(upper, 0.5)
    ankle, thickness = rng.uniform(-0.62, -0.42), rng.uniform(0.14, 0.22)
    body = [
        (-0.88, ankle),
        (-0.35, ankle - 0.06),
        (-0.12, ankle + 0.22),
        (0.35, -0.02),
        (0.8, 0.1),
        (0.96, 0.38),
        (0.94, 0.5),
        (-0.9, 0.5),
        (-0.92, 0.1),
    ]
    pen.polygon(rounded(body), upper)
    pen.blob([(0.42, 0.06), (0.78, 0.12), (0.95, 0.36), (0.9, 0.5), (0.5, 0.5)], shade(upper, 1.4))
    pen.polygon([(-0.88, ankle + 0.02), (-0.66, ankle), (-0.62, 0.48), (-0.9, 0.48)], accent)
    pen.ellipse((-0.61, ankle), (0.25, 0.08), shade(upper, 0.45))
    pen.blob([(-0.3, 0.38), (0.1, 0.1), (0.2, 0.16), (-0.14, 0.42)], accent)
    for step in np.linspace(0.1, 0.9, 4):
        x, y = -0.12 + 0.42 * step, ankle + 0.2 + (-0.24 - ankle) * step
        pen.line([(x, y), (x - 0.14, y + 0.16)], 0.05, _PAPER)
    pen.polygon(
        rounded(
            [
                (-0.97, 0.46),
                (0.97, 0.46),
                (1.0, 0.46 + thickness * 0.6),
                (0.9, 0.46 + thickness),
                (-0.93, 0.46 + thickness),
            ]
        ),
        sole,
    )
    pen.line([(-0.93, 0.47), (0.95, 0.47)], 0.03, shade(upper, 0.5))


def draw_umbrella(pen: Pen, rng: np.random.Generator) -> None:
    """An open umbrella with panels in one or two colours and a hooked handle."""
    canopy = random_color(rng)
    other = shade(canopy, 0.8) if rng.random() < 0.6 else _contrast(rng)
    height, panels = rng.uniform(0.62, 0.85), int(rng.integers(4, 7))
    handle = random_color(rng)
    pen.line([(0, -0.9), (0, 0.78)], 0.05, _STEEL)
    pen.line([(0, 0.45), (0, 0.78)], 0.09, handle)
    pen.arc((0.16, 0.78), (0.16, 0.16), 0.09, handle, start=0, end=180)
    edges = -0.95 * np.cos(np.linspace(0, math.pi, panels + 1))
    for panel in range(panels):
        left, right = float(edges[panel]), float(edges[panel + 1])
        sag = [(left + (right - left) * t, -0.3 * t * (1 - t)) for t in np.linspace(0, 1, 8)]
        outline = [*_rib(left, height), *sag, *reversed(_rib(right, height))]
        pen.polygon(outline, canopy if panel % 2 == 0 else other)
    for edge in edges:
        pen.line(_rib(float(edge), height), 0.018, shade(canopy, 0.6))
    pen.line([(0, -height), (0, -height - 0.12)], 0.05, _STEEL)


OBJECTS: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "book": draw_book,
    "bottle": draw_bottle,
    "chair": draw_chair,
    "clock": draw_clock,
    "key": draw_key,
    "lamp": draw_lamp,
    "mug": draw_mug,
    "shirt": draw_shirt,
    "shoe": draw_shoe,
    "umbrella": draw_umbrella,
}
"""Class name to the function that draws it, in class order."""


def _contrast(rng: np.random.Generator) -> Color:
    """A colour for a detail: paper, ink, or a light or dark one."""
    if rng.random() < 0.4:
        return _PAPER if rng.random() < 0.6 else _INK
    return shade(random_color(rng), 2.2 if rng.random() < 0.5 else 0.5)


def _polar(angle: float, radius: float) -> Point:
    """The point at ``angle`` degrees, clockwise from twelve o'clock."""
    return radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle))


def _rib(edge: float, height: float) -> list[Point]:
    """From the umbrella's top to ``edge`` on its rim, along an ellipse."""
    return [(edge * math.sin(t), -height * math.cos(t)) for t in np.linspace(0, math.pi / 2, 10)]
