"""The demo's collection: catalogue-like images of ten classes, drawn, with a few broken files among them.

Every image is a function of ``(seed, index)`` alone, so a smaller collection is the beginning of a larger one.
What makes it a task rather than a lookup: position, size, rotation, colours, backgrounds, shadows, occlusion,
light, blur, noise and compression all vary.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from imgbatch.core.drawn_objects import OBJECTS
from imgbatch.core.machine import num_cpus
from imgbatch.core.pen import Pen, random_color, shade
from imgbatch.errors import Status

CLASS_NAMES = tuple(OBJECTS)

_SPLITS = ("train", "test", "validation", "train", "train", "test", "train", "train", "test", "train")
_SUPERSAMPLING = 2
_CHUNK_IMAGES = 64
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, slots=True)
class DrawnCollection:
    """What :func:`draw_collection` left on disk.

    ``broken`` maps each broken file to the status its row should end with.
    """

    folder: Path
    num_images: int
    broken: dict[Path, Status]


def draw_collection(folder: Path, *, num_images: int, seed: int, num_broken: int = 5) -> DrawnCollection:
    """Draw ``folder/<split>/<class>/<class>-<index>.<ext>``, over all cores, and the broken files into ``test``.

    Splits are about 60% train, 10% validation and 30% test, every class equally often; images are 160 to 320 px
    a side, mostly JPEG, a few PNG and WebP, some grey, some with an EXIF orientation. ``num_broken`` files come on top
    of ``num_images``, of the five kinds in turn. Files that are there already are replaced.
    """
    for split in sorted(set(_SPLITS)):
        for class_name in CLASS_NAMES:
            (folder / split / class_name).mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + _CHUNK_IMAGES, num_images)) for start in range(0, num_images, _CHUNK_IMAGES)]
    write = partial(_write_images, folder, seed)
    num_processes = min(num_cpus(), len(chunks))
    if num_processes > 1:
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(write, chunks))
    else:
        for chunk in chunks:
            write(chunk)
    return DrawnCollection(folder, num_images, _write_broken(folder, seed, num_broken))


def image_path(seed: int, index: int) -> Path:
    """Where image ``index`` lies below the collection's folder: its split, class and format follow from it."""
    class_name = CLASS_NAMES[index % len(CLASS_NAMES)]
    split = _SPLITS[index // len(CLASS_NAMES) % len(_SPLITS)]
    extension = np.random.default_rng([seed, index, 2]).choice(["jpg", "png", "webp"], p=[0.9, 0.05, 0.05])
    return Path(split, class_name, f"{class_name}-{index:06d}.{extension}")


def draw_image(seed: int, index: int) -> Image.Image:
    """Image ``index`` of the collection, RGB; its class is ``CLASS_NAMES[index % 10]``."""
    rng = np.random.default_rng([seed, index])
    width, height = _size(rng)
    scene = _background(rng, width, height)
    draw_object = OBJECTS[CLASS_NAMES[index % len(CLASS_NAMES)]]
    matrix = _placement(rng, width, height)
    # The mask and the picture are the same strokes, so both take the object's own generator from its start.
    mask = Image.new("L", scene.size)
    draw_object(
        Pen(ImageDraw.Draw(mask), matrix, silhouette=255),
        np.random.default_rng([seed, index, 1]),
    )
    if rng.random() < 0.7:
        scene = _cast_shadow(rng, scene, mask)
    picture = scene.resize((width * _SUPERSAMPLING, height * _SUPERSAMPLING), Image.Resampling.NEAREST)
    draw_object(Pen(ImageDraw.Draw(picture), matrix * _SUPERSAMPLING), np.random.default_rng([seed, index, 1]))
    if rng.random() < 0.3:
        _occlude(rng, picture, matrix * _SUPERSAMPLING)
    return _photograph(rng, picture.reduce(_SUPERSAMPLING))


def _write_images(folder: Path, seed: int, indices: range) -> None:
    for index in indices:
        path = folder / image_path(seed, index)
        path.write_bytes(_encode(np.random.default_rng([seed, index, 3]), draw_image(seed, index), path.suffix))


def _encode(rng: np.random.Generator, image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, "PNG", compress_level=1)
    elif suffix == ".webp":
        image.save(buffer, "WEBP", quality=int(rng.integers(60, 90)), method=0)
    else:
        quality, kind = int(rng.integers(60, 95)), rng.random()
        exif = Image.Exif()
        if kind < 0.03:
            image = image.convert("L")
        elif kind < 0.06:
            # Stored on its side, as cameras do; orientation 6 turns it upright again.
            image = image.transpose(Image.Transpose.ROTATE_90)
            exif[_ORIENTATION_TAG] = 6
        image.save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, px: 160 to 320, a third of them square, the others up to 3:2 either way."""
    long = int(rng.integers(240, 321))
    short = long if rng.random() < 0.33 else int(long * rng.uniform(0.67, 1.0))
    return (long, short) if rng.random() < 0.5 else (short, long)


def _placement(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """The matrix (2 x 3) from the unit square to px: size, stretch, mirroring, rotation, shear and position."""
    radius = min(width, height) / 2 * rng.uniform(0.5, 0.92)
    angle = math.radians(rng.normal(0, 14) if rng.random() < 0.85 else rng.uniform(-180, 180))
    stretch, shear, mirror = rng.uniform(0.88, 1.14), rng.uniform(-0.12, 0.12), rng.choice([-1.0, 1.0])
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shape = np.array([[mirror * stretch, shear], [0.0, 1 / stretch]])
    slack = (min(width, height) / 2 - radius) * 1.1
    center = np.array([width / 2, height / 2]) + rng.uniform(-slack, slack, size=2)
    return np.hstack([radius * rotation @ shape, center[:, None]])


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Plain, a gradient, a wall and a floor, stripes, or soft patches."""
    base = shade(random_color(rng), rng.uniform(0.8, 4.0))
    other = shade(base, rng.uniform(0.65, 0.9)) if rng.random() < 0.6 else shade(random_color(rng), 2.0)
    kind = rng.choice(["plain", "gradient", "floor", "stripes", "patches"], p=[0.25, 0.2, 0.2, 0.15, 0.2])
    image = Image.new("RGB", (width, height), base)
    draw = ImageDraw.Draw(image)
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(int(rng.choice([0, 90, 180, 270]))).resize((width, height))
        image.paste(other, (0, 0), ramp)
    elif kind == "floor":
        horizon = int(height * rng.uniform(0.5, 0.8))
        draw.rectangle((0, horizon, width, height), fill=other)
        draw.line((0, horizon, width, horizon), fill=shade(other, 0.8), width=2)
    elif kind == "stripes":
        period, lean = int(rng.integers(10, 40)), int(rng.integers(-80, 80))
        for x in range(-160, width + 160, period):
            draw.line((x, 0, x + lean, height), fill=other, width=max(1, int(period * rng.uniform(0.1, 0.5))))
    elif kind == "patches":
        coarse = rng.integers(0, 256, size=(int(rng.integers(3, 14)), int(rng.integers(3, 14))), dtype=np.uint8)
        image.paste(other, (0, 0), Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return image


def _cast_shadow(rng: np.random.Generator, scene: Image.Image, mask: Image.Image) -> Image.Image:
    offset = (int(rng.integers(-12, 13)), int(rng.integers(2, 13)))
    shadow = Image.new("L", scene.size)
    shadow.paste(mask, offset)
    strength = rng.uniform(0.2, 0.55)
    shadow = shadow.filter(ImageFilter.BoxBlur(float(rng.uniform(3, 8)))).point(lambda v: int(v * strength))
    return Image.composite(Image.new("RGB", scene.size, (20, 20, 28)), scene, shadow)


def _occlude(rng: np.random.Generator, picture: Image.Image, matrix: np.ndarray) -> None:
    """A strip or a disc over a part of the object, never over its middle."""
    angle, color = rng.uniform(0, 2 * math.pi), random_color(rng)
    direction = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-direction[1], direction[0]])
    pen = Pen(ImageDraw.Draw(picture), matrix)
    if rng.random() < 0.5:
        near, far = direction * rng.uniform(0.3, 0.6), direction * rng.uniform(0.75, 1.0)
        pen.polygon(
            [_point(near - across * 2), _point(near + across * 2), _point(far + across * 2), _point(far - across * 2)],
            color,
        )
    else:
        radius = rng.uniform(0.2, 0.35)
        pen.ellipse(_point(direction * rng.uniform(0.6, 0.9)), (radius, radius), color)


def _photograph(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Blur, uneven light, exposure, a colour cast and noise."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.8))))
    pixels_HWC = np.asarray(image, dtype=np.float32)
    height, width, _ = pixels_HWC.shape
    fall_x, fall_y = rng.uniform(-0.25, 0.25, size=2)
    light_HW = 1 + np.linspace(-fall_y, fall_y, height)[:, None] + np.linspace(-fall_x, fall_x, width)[None, :]
    exposure_C = rng.uniform(0.65, 1.2) * rng.uniform(0.94, 1.06, size=3)
    pixels_HWC = pixels_HWC * light_HW[:, :, None].astype(np.float32) * exposure_C.astype(np.float32)
    sigma = rng.choice([0.0, 4.0, 12.0], p=[0.4, 0.4, 0.2])
    if sigma:
        pixels_HWC += rng.standard_normal(pixels_HWC.shape, dtype=np.float32) * np.float32(sigma)
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def _point(vector: np.ndarray) -> tuple[float, float]:
    return float(vector[0]), float(vector[1])


def _write_broken(folder: Path, seed: int, num_broken: int) -> dict[Path, Status]:
    written = {}
    for number in range(num_broken):
        name, status, build = _BROKEN[number % len(_BROKEN)]
        class_name = CLASS_NAMES[number % len(CLASS_NAMES)]
        stem, dot, extension = name.rpartition(".")
        path = folder / "test" / class_name / f"{stem}-{number}{dot}{extension}"
        path.write_bytes(build(seed, number))
        written[path] = status
    return written


def _truncated_jpeg(seed: int, number: int) -> bytes:
    data = _encode(np.random.default_rng(seed), draw_image(seed, number), ".png")
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()[: buffer.tell() // 3]


def _huge_png(_seed: int, _number: int) -> bytes:
    """A valid PNG header that promises 60,000 x 60,000 px, and next to nothing behind it."""

    def chunk(kind: bytes, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


_HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
_TEXT = b"This is no picture, whatever its name says.\n"

_BROKEN: list[tuple[str, Status, Callable[[int, int], bytes]]] = [
    ("half-a-download.jpg", Status.TRUNCATED, _truncated_jpeg),
    ("error-page.jpg", Status.NOT_AN_IMAGE, lambda _seed, _number: _HTML),
    ("empty.jpg", Status.EMPTY, lambda _seed, _number: b""),
    ("too-large.png", Status.TOO_LARGE, _huge_png),
    ("notes.png", Status.NOT_AN_IMAGE, lambda _seed, _number: _TEXT),
]
