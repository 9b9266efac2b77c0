"""Which pixels of an image become which pixels of the crop."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from tests.core.encoding import GREY, SPEC, assert_uniform, decoded, encode, photograph


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


def test_extreme_shapes_cost_no_more_than_the_crop() -> None:
    for size in ((1, 1), (1, 30_000), (30_000, 1)):
        assert_uniform(encode(Image.new("RGB", size, GREY), "PNG"), GREY)


def test_stretching_shows_the_whole_image() -> None:
    halves = Image.new("RGB", (80, 40), GREY)
    halves.paste((0, 0, 0), (0, 0, 20, 40))
    columns = decoded(encode(halves, "PNG"), PreprocessSpec(8, 8, resize_mode="stretch")).pixels_HWC[4, :, 0]
    assert columns[0] == 0
    assert columns[7] == GREY[0]
    assert decoded(encode(halves, "PNG"), PreprocessSpec(8, 8)).pixels_HWC[4, 0, 0] > 0
