"""Preprocessing as a value: what happens to an image between its bytes and the model.

It belongs to the weights, is stored in the model bundle and prints as one line.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from imgbatch.core.bands import BandSpec

Interpolation = Literal["bilinear", "bicubic"]
ResizeMode = Literal["shorter_side", "stretch"]

MEDIAN_SIZES = (0, 3, 5, 7)
_JPEG_SCALES = (8, 4, 2)
"""Others, such as three eighths, are slower to decode than the whole (libjpeg-turbo has no SIMD code for them)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class DecodePolicy:
    """How bytes become RGB; one policy for training, evaluation and classification."""

    apply_orientation: bool = True
    """Turn and mirror as the EXIF orientation says."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB, 0 to 255, that transparency is composited on."""
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
    """Allowed formats, by Pillow's names; anything else is ``UNSUPPORTED_FORMAT``."""


@dataclass(frozen=True, slots=True)
class CropGeometry:
    """Sizes in px: the whole image is resized to ``resized``, and the crop starts at ``left``, ``top`` in it."""

    resized_width: int
    resized_height: int
    left: int
    top: int


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """``decode | median(median_size) | resize(resize_size) | center_crop(crop_size) | normalise(mean, std)``."""

    resize_size: int = 256
    """Length of the shorter side after resizing, px; not less than ``crop_size``."""
    crop_size: int = 224
    """Side of the square that the model sees, px."""
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, of values scaled to 0 to 1."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per channel, of values scaled to 0 to 1."""
    decode: DecodePolicy = field(default_factory=DecodePolicy)
    resize_mode: ResizeMode = "shorter_side"
    """``stretch``: both sides become ``resize_size``, so that a crop of that size cuts nothing away; else proportions
    are kept."""
    median_size: int = 0
    """Side of the median filter that takes noise out of the decoded image, px, one of ``MEDIAN_SIZES``; 0: none."""
    reducing_gap: float = 0.0
    """JPEGs are decoded at a half, a quarter or an eighth of their size, which is faster, as long as that is so many
    times the size after resizing; at least 1, or 0: never. As in Pillow's ``Image.thumbnail``."""
    bands: BandSpec | None = None
    """Of a model of rasters: its channels, one per band. None: RGB."""

    def __post_init__(self) -> None:
        if self.crop_size < 1 or self.resize_size < self.crop_size:
            raise ValueError(
                f"resize_size {self.resize_size} must be at least crop_size {self.crop_size}, both at least 1"
            )
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError("mean and std need one value per channel each")
        if self.median_size not in MEDIAN_SIZES:
            raise ValueError(f"median_size must be one of {', '.join(map(str, MEDIAN_SIZES))}, not {self.median_size}")
        if self.reducing_gap != 0 and not self.reducing_gap >= 1:
            raise ValueError(f"reducing_gap must be 0 or at least 1, not {self.reducing_gap:g}")
        if self.reducing_gap and self.median_size:
            raise ValueError("reducing_gap and median_size exclude each other: the filter needs the image in full")
        if self.bands is not None and len(self.bands.indices) != len(self.mean):
            raise ValueError(f"{len(self.bands.indices)} bands, but mean and std of {len(self.mean)}")

    @property
    def num_channels(self) -> int:
        return len(self.mean)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of one decoded image: ``crop_size`` squared times channels, uint8."""
        return self.crop_size * self.crop_size * self.num_channels

    def geometry(self, width: int, height: int) -> CropGeometry:
        """Where the crop lies for an image of ``width`` x ``height`` px, with torchvision's integer rounding.

        ``Resize(resize_size)`` truncates the longer side, ``CenterCrop`` rounds the offset half to even
        (torchvision/transforms/functional.py: ``_compute_resized_output_size``, ``center_crop``).
        """
        short, long = min(width, height), max(width, height)
        resized_long = int(self.resize_size * long / short)
        resized = (self.resize_size, resized_long) if width <= height else (resized_long, self.resize_size)
        if self.resize_mode == "stretch":
            resized = (self.resize_size, self.resize_size)
        left = round((resized[0] - self.crop_size) / 2.0)
        top = round((resized[1] - self.crop_size) / 2.0)
        return CropGeometry(resized[0], resized[1], left, top)

    def jpeg_scale(self, width: int, height: int) -> int:
        """What the sides of a JPEG of ``width`` x ``height`` px are divided by while it is decoded: 1, 2, 4 or 8."""
        if not self.reducing_gap:
            return 1
        geometry = self.geometry(width, height)
        spare = min(width / geometry.resized_width, height / geometry.resized_height) / self.reducing_gap
        return next((scale for scale in _JPEG_SCALES if scale <= spare), 1)

    def with_sizes(self, resize_size: int | None = None, crop_size: int | None = None) -> PreprocessSpec:
        """A copy with other sizes; a ``crop_size`` alone keeps the ratio of the two."""
        if resize_size is None and crop_size is None:
            return self
        new_crop = crop_size or min(self.crop_size, resize_size or self.crop_size)
        new_resize = resize_size or max(new_crop, round(new_crop * self.resize_size / self.crop_size))
        return replace(self, resize_size=new_resize, crop_size=new_crop)

    def overridden(
        self,
        *,
        resize_size: int | None = None,
        crop_size: int | None = None,
        resize_mode: ResizeMode | None = None,
        median_size: int | None = None,
        reducing_gap: float | None = None,
    ) -> PreprocessSpec:
        """A copy with what the configuration's section ``preprocess`` gives; see :meth:`with_sizes`."""
        given = {"resize_mode": resize_mode, "median_size": median_size, "reducing_gap": reducing_gap}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        return replace(self.with_sizes(resize_size, crop_size), **changes)

    def describe(self) -> str:
        """One line, as ``model inspect`` prints it."""
        median = f"median({self.median_size}) | " if self.median_size else ""
        resize = "resize" if self.resize_mode == "shorter_side" else self.resize_mode
        decode = "decode" if not self.reducing_gap else f"decode(reducing_gap {self.reducing_gap:g})"
        if self.bands:
            decode = self.bands.describe()
        return (
            f"{decode} | {median}{resize}({self.resize_size}, {self.interpolation}) | center_crop({self.crop_size}) "
            f"| normalise({_numbers(self.mean)}; {_numbers(self.std)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as model.json holds them."""
        values = asdict(self)
        # Left out where they do nothing, so that models from before these keys keep their model_id.
        for key in ("resize_mode", "median_size", "reducing_gap", "bands"):
            if values[key] == PreprocessSpec.__dataclass_fields__[key].default:
                del values[key]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreprocessSpec:
        """The inverse of :meth:`to_dict`; unknown keys raise ``TypeError``."""
        values = dict(values)
        decode: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.pop("decode", {}).items()
        }
        if values.get("bands") is not None:
            values["bands"] = BandSpec.from_dict(values["bands"])
        values["mean"], values["std"] = tuple(values["mean"]), tuple(values["std"])
        return cls(**values, decode=DecodePolicy(**decode))


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
