from __future__ import annotations

import io
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from imgbatch.errors import RowError, Stage, Status
from tests.core.bad_inputs import png, png_chunk

SPEC = PreprocessSpec(resize_size=8, crop_size=8)
MAX_PIXELS = 1_000_000
GREY = (90, 120, 150)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes, spec: PreprocessSpec = SPEC) -> Decoded:
    outcome = decode_image(data, spec, max_pixels=MAX_PIXELS)
    assert isinstance(outcome, Decoded), outcome
    assert outcome.pixels_HWC.shape == (spec.crop_size, spec.crop_size, 3)
    assert outcome.pixels_HWC.dtype == np.uint8
    return outcome


def status(data: bytes, spec: PreprocessSpec = SPEC, max_pixels: int = MAX_PIXELS) -> Status:
    outcome = decode_image(data, spec, max_pixels=max_pixels)
    assert isinstance(outcome, RowError)
    assert outcome.stage is Stage.DECODE
    assert outcome.message
    return outcome.status


def assert_uniform(data: bytes, rgb: tuple[int, int, int], tolerance: int = 1) -> None:
    difference = decoded(data).pixels_HWC.astype(int) - rgb
    assert np.abs(difference).max() <= tolerance


def photograph(width: int = 64, height: int = 48) -> Image.Image:
    """Noise on a gradient, so that any shift or flip shows."""
    rng = np.random.default_rng(0)
    ramp_HW = np.linspace(0, 200, width)[None, :] + np.linspace(0, 40, height)[:, None]
    noise_HWC = rng.integers(0, 15, (height, width, 3))
    return Image.fromarray((ramp_HW[..., None] * (1.0, 0.7, 0.4) + noise_HWC).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_keeps_its_colour_and_size(kind: str) -> None:
    data = encode(Image.new("RGB", (20, 10), GREY), kind)
    assert_uniform(data, GREY, tolerance=3)
    assert (decoded(data).width, decoded(data).height) == (20, 10)


@pytest.mark.parametrize("size", [(640, 480), (301, 533), (224, 224), (100, 80), (17, 900)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_torchvisions_pil_transform(size: tuple[int, int], interpolation: Any) -> None:
    from torchvision import transforms

    spec = PreprocessSpec(interpolation=interpolation)
    data = encode(photograph(*size), "PNG")
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(256, interpolation=mode), transforms.CenterCrop(224)])
    expected_HWC = np.asarray(reference(photograph(*size))).astype(int)
    assert np.abs(decoded(data, spec).pixels_HWC - expected_HWC).max() <= 1


def test_jpeg_pixels_are_pillows() -> None:
    data = encode(photograph(), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as image:
        expected_HWC = np.asarray(image.resize((10, 8), Image.Resampling.BILINEAR).crop((1, 0, 9, 8))).astype(int)
    assert np.abs(decoded(data).pixels_HWC - expected_HWC).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_shows_the_corners_where_they_belong(orientation: int, kind: str) -> None:
    # Corner colours of the upright 24 x 16 image, and the EXIF specification's words for where row 0 and column 0 of
    # the stored pixels lie: 1 top-left, 2 top-right, 3 bottom-right, 4 bottom-left, 5 left-top, 6 right-top,
    # 7 right-bottom, 8 left-bottom.
    upright_HWC = np.zeros((16, 24, 3), np.uint8)
    upright_HWC[:8, :12], upright_HWC[:8, 12:] = (250, 0, 0), (0, 250, 0)
    upright_HWC[8:, :12], upright_HWC[8:, 12:] = (0, 0, 250), (250, 250, 250)
    row_0, column_0 = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    stored_HWC = upright_HWC
    if "bottom" in (row_0, column_0):
        stored_HWC = stored_HWC[::-1]
    if "right" in (row_0, column_0):
        stored_HWC = stored_HWC[:, ::-1]
    if row_0 in ("left", "right"):
        stored_HWC = stored_HWC.transpose(1, 0, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored_HWC)), kind, exif=exif, **options)

    outcome = decoded(data, PreprocessSpec(resize_size=16, crop_size=16))

    assert (outcome.width, outcome.height) == (24, 16)
    assert np.abs(outcome.pixels_HWC.astype(int) - upright_HWC[:, 4:20]).max() <= 40
    assert np.abs(outcome.pixels_HWC[1:6, 1:6].astype(int) - (250, 0, 0)).max() <= 10
    assert np.abs(outcome.pixels_HWC[10:15, 10:15].astype(int) - 250).max() <= 10


def test_orientation_is_ignored_where_the_policy_says_so() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph(20, 10), "JPEG", exif=exif)
    spec = PreprocessSpec(resize_size=8, crop_size=8, decode=DecodePolicy(apply_orientation=False))
    assert decoded(data, spec).width == 20
    assert decoded(data).width == 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(65, 48), (48, 65), (90, 200)])
def test_a_turned_file_gives_the_pixels_of_the_upright_one(orientation: int, size: tuple[int, int]) -> None:
    # 65 px beside a crop of 48: the crop cannot lie exactly in the middle, so a mirrored offset would show.
    spec = PreprocessSpec(resize_size=48, crop_size=48)
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = photograph(*size)
    stored = upright.transpose(to_stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decoded(encode(stored, "PNG", exif=exif), spec)
    expected = decoded(encode(upright, "PNG"), spec)
    assert (turned.width, turned.height) == size
    assert np.abs(turned.pixels_HWC.astype(int) - expected.pixels_HWC).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (32768, 128), (40000, 156), (65535, 255)])
def test_16_bit_grey_is_scaled(kind: str, value: int, expected: int) -> None:
    samples_HW = np.full((10, 10), value, np.uint16)
    assert_uniform(encode(Image.fromarray(samples_HW), kind), (expected,) * 3)


def test_16_bit_grey_png_with_a_transparent_value_shows_the_background() -> None:
    samples_HW = np.full((10, 10), 1000, np.uint16)
    data = encode(Image.fromarray(samples_HW), "PNG", transparency=1000)
    assert_uniform(data, (255, 255, 255))
    assert_uniform(encode(Image.fromarray(samples_HW), "PNG", transparency=1001), (4, 4, 4))


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
        ([0.0, 1e9, 2e9], [0, 128, 255]),
        ([-5.0, float("nan"), 1.0], [0, 0, 255]),
        ([0.0, 0.5, float("inf")], [0, 128, 255]),
    ],
)
def test_float_tiff_is_scaled_by_the_range_it_fits(samples: list[float], expected: list[int]) -> None:
    samples_HW = np.repeat(np.array(samples, np.float32), 10)[None, :].repeat(30, axis=0)
    data = encode(Image.fromarray(samples_HW), "TIFF")
    middle_C = decoded(data, PreprocessSpec(resize_size=30, crop_size=30)).pixels_HWC[15, 5::10, 0]
    assert np.abs(middle_C.astype(int) - expected).max() <= 1


def test_float_tiff_of_nothing_but_nan_is_corrupt() -> None:
    data = encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    assert status(data) is Status.CORRUPT


def test_32_bit_integers_are_read_as_16_bit_ones() -> None:
    data = encode(Image.fromarray(np.full((9, 9), 32768, np.int32)), "TIFF")
    assert_uniform(data, (128, 128, 128))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("alpha", [0, 64, 200, 255])
def test_alpha_is_composited_on_the_background(kind: str, alpha: int) -> None:
    background = (255, 0, 128)
    spec = PreprocessSpec(resize_size=8, crop_size=8, decode=DecodePolicy(background=background))
    data = encode(Image.new("RGBA", (10, 10), (*GREY, alpha)), kind, **({"lossless": True} if kind == "WEBP" else {}))
    share = alpha / 255
    expected = [c * share + b * (1 - share) for c, b in zip(GREY, background, strict=True)]
    assert np.abs(decoded(data, spec).pixels_HWC - np.array(expected)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "LA"])
def test_transparent_values_of_every_mode_show_the_background(mode: str) -> None:
    image = Image.new("RGB", (10, 10), 0).convert(mode)
    if mode == "LA":
        image.putalpha(0)
    options = {} if mode == "LA" else {"transparency": (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))}
    assert_uniform(encode(image, "PNG", **options), (255, 255, 255))


@pytest.mark.parametrize(("bits", "value", "grey"), [(1, 1, 255), (2, 2, 170), (4, 8, 136), (8, 99, 99)])
def test_a_transparent_value_of_few_bits_shows_the_background(bits: int, value: int, grey: int) -> None:
    line = b"\0" + bytes([sum(value << shift for shift in range(0, 8, bits))]) * (2 * bits)
    for transparent, expected in ((value, (255, 255, 255)), (value - 1, (grey,) * 3)):
        chunk = png_chunk(b"tRNS", struct.pack(">H", transparent))
        assert_uniform(png(16, 16, bits, 0, line * 16, chunk), expected)


def test_palette_and_bilevel_become_colours() -> None:
    assert_uniform(encode(Image.new("RGB", (10, 10), GREY).quantize(4), "PNG"), GREY)
    assert_uniform(encode(Image.new("1", (10, 10), 1), "PNG"), (255, 255, 255))


def test_cmyk_follows_the_ink_formula() -> None:
    cyan, magenta, yellow, black = 30, 100, 180, 60
    expected = tuple(round((255 - ink) * (255 - black) / 255) for ink in (cyan, magenta, yellow))
    image = Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black))
    assert_uniform(encode(image, "TIFF"), expected, tolerance=2)  # type: ignore[arg-type]
    assert_uniform(encode(image, "JPEG", quality=100), expected, tolerance=4)  # type: ignore[arg-type]


def test_lab_and_ycbcr_become_rgb() -> None:
    assert_uniform(encode(Image.new("LAB", (10, 10), (136, 128, 128)), "TIFF"), (128, 128, 128), tolerance=3)
    assert_uniform(encode(Image.new("RGB", (16, 16), GREY), "TIFF", compression="jpeg", quality=100), GREY, 4)


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in (GREY, (255, 0, 0))]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert_uniform(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options), GREY, 3)


def test_colour_profiles_are_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert_uniform(encode(Image.new("RGB", (10, 10), GREY), "PNG", icc_profile=profile), GREY)


def test_extreme_shapes_cost_no_more_than_the_crop() -> None:
    for size in ((1, 1), (1, 30_000), (30_000, 1)):
        assert_uniform(encode(Image.new("RGB", size, GREY), "PNG"), GREY)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_anywhere_is_truncated(kind: str) -> None:
    data = encode(photograph(), kind)
    for share in (0.3, 0.6, 0.9):
        assert status(data[: int(len(data) * share)]) is Status.TRUNCATED


def test_damaged_jpeg_data_is_corrupt_rather_than_grey_stripes() -> None:
    data = encode(photograph(256, 256), "JPEG", quality=95)
    middle = len(data) // 2
    assert status(data[:middle] + bytes(200) + data[middle + 3000 :]) is Status.CORRUPT


def test_damaged_png_data_is_corrupt() -> None:
    data = bytearray(encode(photograph(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert status(bytes(data)) is Status.CORRUPT


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html></html>", b"{}", b"\0" * 100, b"x", b"%PDF-1.7\n"])
def test_what_is_no_image_says_so(data: bytes) -> None:
    assert status(data) is Status.NOT_AN_IMAGE


def test_no_bytes_is_empty() -> None:
    assert status(b"") is Status.EMPTY


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "JPEG2000", "DDS", "SGI", "PCX"])
def test_an_image_of_another_format_is_never_decoded(kind: str) -> None:
    data = encode(Image.new("RGB", (32, 32), GREY), kind)
    expected = Status.NOT_AN_IMAGE if kind == "PCX" else Status.UNSUPPORTED_FORMAT
    assert status(data) is expected


def test_the_allow_list_is_the_policys() -> None:
    spec = PreprocessSpec(decode=DecodePolicy(formats=("PNG",)))
    assert status(encode(photograph(), "JPEG"), spec) is Status.UNSUPPORTED_FORMAT


def test_pixels_are_counted_before_anything_is_decoded() -> None:
    data = encode(Image.new("1", (2000, 1000)), "PNG")
    assert status(data, max_pixels=1_999_999) is Status.TOO_LARGE
    assert isinstance(decode_image(data, SPEC, max_pixels=2_000_000), Decoded)


def test_a_header_that_claims_billions_of_pixels_is_too_large() -> None:
    data = bytearray(encode(Image.new("RGB", (4, 4)), "BMP"))
    data[18:26] = struct.pack("<ii", 2_000_000, 2_000_000)
    assert status(bytes(data)) is Status.TOO_LARGE


def test_broken_exif_spoils_nothing() -> None:
    data = encode(Image.new("RGB", (16, 16), GREY), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40)
    assert_uniform(data, GREY, tolerance=3)


def test_other_than_three_channels_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="1 channels"):
        decode_image(b"x", PreprocessSpec(mean=(0.5,), std=(0.5,)), max_pixels=1)


def test_no_byte_string_raises_or_warns() -> None:
    rng = np.random.default_rng(1)
    originals = [encode(photograph(40, 30), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in originals:
            for _ in range(60):
                damaged = np.frombuffer(data, np.uint8).copy()
                damaged[rng.integers(0, len(damaged), 4)] = rng.integers(0, 256, 4)
                assert isinstance(decode_image(damaged.tobytes(), SPEC, max_pixels=MAX_PIXELS), Decoded | RowError)


def test_labels_of_a_resnet_agree_with_the_reference_pixels(test_data: Path) -> None:
    import torch
    import torchvision
    from safetensors.torch import load_file

    every = sorted((test_data / "catalog" / "test").glob("*/*"))
    files = [file for index, file in enumerate(every) if index % 3]
    torch.set_num_threads(2)
    reference = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224)]
    )
    ours, theirs = [], []
    for file in files:
        ours.append(decoded(file.read_bytes(), PreprocessSpec()).pixels_HWC)
        with Image.open(file) as image:
            theirs.append(np.asarray(reference(image.convert("RGB"))))
    assert np.abs(np.stack(ours).astype(int) - np.stack(theirs)).max() <= 1

    weights = load_file(next((test_data / "weights").glob("resnet18-*.safetensors")))
    network = torchvision.models.resnet18()
    network.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    network.eval()
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (SPEC.mean, SPEC.std))

    def labels(images: list[np.ndarray]) -> torch.Tensor:
        indices = []
        with torch.inference_mode():
            for start in range(0, len(images), 32):
                images_BCHW = torch.from_numpy(np.stack(images[start : start + 32])).permute(0, 3, 1, 2).float() / 255
                indices.append(network((images_BCHW - mean_C11) / std_C11).argmax(1))
        return torch.cat(indices)

    agreement = (labels(ours) == labels(theirs)).float().mean().item()
    assert len(files) > 200
    assert agreement >= 0.995


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "scale"), [((517, 389), 4), ((389, 1029), 4), ((267, 273), 2)])
def test_a_reduced_jpeg_shows_the_same_crop(orientation: int, size: tuple[int, int], scale: int) -> None:
    """Sizes that the scale does not divide, turned and mirrored in every way: a shift of half a pixel would show."""
    spec = PreprocessSpec(73, 64, reducing_gap=1.25)
    upright = size[::-1] if orientation >= 5 else size
    assert spec.jpeg_scale(*upright) == scale
    y, x = np.mgrid[: size[1], : size[0]]
    waves_HWC = np.stack([np.sin(x / 17 + k) * np.cos(y / 13 - k) for k in range(3)], axis=2)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(Image.fromarray(np.uint8(128 + 100 * waves_HWC)), "JPEG", exif=exif, quality=98)
    reduced, whole = decoded(data, spec), decoded(data, replace(spec, reducing_gap=0))
    assert (reduced.width, reduced.height) == (whole.width, whole.height) == upright
    difference = np.abs(reduced.pixels_HWC.astype(int) - whole.pixels_HWC)
    assert difference.mean() < 1
    assert difference.max() <= 5


def test_only_jpegs_are_reduced() -> None:
    spec = PreprocessSpec(64, 64, reducing_gap=1)
    image = photograph(640, 512)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(image, kind, **options)
        np.testing.assert_array_equal(
            decoded(data, spec).pixels_HWC, decoded(data, replace(spec, reducing_gap=0)).pixels_HWC
        )
    jpeg = encode(image, "JPEG")
    assert (decoded(jpeg, spec).pixels_HWC != decoded(jpeg, replace(spec, reducing_gap=0)).pixels_HWC).any()


def test_a_cut_jpeg_is_truncated_when_reduced_too() -> None:
    data = encode(photograph(640, 512), "JPEG")
    outcome = decode_image(data[: len(data) // 2], PreprocessSpec(64, 64, reducing_gap=1), max_pixels=MAX_PIXELS)
    assert isinstance(outcome, RowError)
    assert outcome.status == Status.TRUNCATED


def test_stretching_shows_the_whole_image() -> None:
    halves = Image.new("RGB", (80, 40), GREY)
    halves.paste((0, 0, 0), (0, 0, 20, 40))
    columns = decoded(encode(halves, "PNG"), PreprocessSpec(8, 8, resize_mode="stretch")).pixels_HWC[4, :, 0]
    assert columns[0] == 0
    assert columns[7] == GREY[0]
    assert decoded(encode(halves, "PNG"), PreprocessSpec(8, 8)).pixels_HWC[4, 0, 0] > 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_median_filter_takes_single_pixels_out(kind: str) -> None:
    speckled = Image.new("RGB", (16, 16), GREY)
    speckled.putpixel((6, 9), (255, 255, 255))
    data = encode(speckled, kind, **({"quality": 100} if kind == "JPEG" else {}))
    clean, plain = (decoded(data, PreprocessSpec(16, 16, median_size=size)).pixels_HWC for size in (3, 0))
    assert np.abs(clean.astype(int) - GREY).max() <= 6
    assert plain.max() > 200
