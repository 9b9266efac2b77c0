"""Everything but nvJPEG itself: on a CPU, libjpeg takes its place."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, JpegImagePlugin

from imgbatch.config import Config, DecodeConfig
from imgbatch.core import gpu_decode
from imgbatch.core.decoder import DecodedUnit
from imgbatch.core.gpu_decode import GpuDecoder, crop
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.jpeg_header import JpegHeader, read_plain_header
from imgbatch.core.plan import plan_run
from imgbatch.core.stages import ENCODED, PIXELS, ClassifyStage, DecodeStage
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import Stage, Status, UsageError
from tests.conftest import changed
from tests.core.test_jpeg_header import jpeg

if importlib.util.find_spec("torchcodec") is None:
    pytest.skip("torchcodec is not installed (extra nvjpeg)", allow_module_level=True)

SPECS = [
    PreprocessSpec(),
    PreprocessSpec(interpolation="bicubic"),
    PreprocessSpec(resize_size=100, crop_size=96, resize_mode="stretch"),
]


def on_cpu(data: bytes, spec: PreprocessSpec) -> Decoded:
    decoded = decode_image(data, spec, max_pixels=10**8)
    assert isinstance(decoded, Decoded), decoded
    return decoded


def sizes_of(images: list[bytes]) -> list[tuple[int, int]]:
    headers = [read_plain_header(data) for data in images]
    return [(header.width, header.height) for header in headers if header is not None]


@pytest.mark.parametrize("spec", SPECS, ids=PreprocessSpec.describe)
def test_crops_are_those_of_the_cpu(test_data: Path, spec: PreprocessSpec) -> None:
    paths = sorted((test_data / "catalog" / "test").rglob("*.jpg"))[::12]
    images = [path.read_bytes() for path in paths]
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")
    unit = decoder.decode(images, sizes_of(images))
    expected = [on_cpu(data, spec) for data in images]
    difference = np.abs(unit.pixels_NHWC.astype(int) - np.stack([image.pixels_HWC for image in expected]))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
    assert unit.widths.tolist() == [image.width for image in expected]
    assert unit.heights.tolist() == [image.height for image in expected]
    assert unit.errors == [None] * len(images)


@pytest.mark.parametrize("size", [(640, 480), (48, 300), (33, 32), (7, 5)])
def test_crop_of_any_shape(size: tuple[int, int]) -> None:
    data, spec = jpeg(size=size), PreprocessSpec(resize_size=36, crop_size=32)
    expected = on_cpu(data, spec).pixels_HWC
    pixels_CHW = gpu_decode.GpuDecoder(spec, DecodeConfig(), device="cpu")._decode_jpeg(data, mode="RGB", device="cpu")
    given = crop(pixels_CHW, spec)
    assert (given.dtype, given.shape) == (torch.uint8, (32, 32, 3))
    assert np.abs(given.numpy().astype(int) - expected).max() <= 2


def test_grey_images_become_rgb() -> None:
    data, spec = jpeg("L"), PreprocessSpec(resize_size=20, crop_size=16)
    unit = GpuDecoder(spec, DecodeConfig(), device="cpu").decode([data], [(37, 21)])
    assert np.abs(unit.pixels_NHWC[0].astype(int) - on_cpu(data, spec).pixels_HWC).max() <= 1


def test_what_the_device_cannot_decode_costs_its_own_row_only() -> None:
    whole, spec = jpeg(), PreprocessSpec(resize_size=20, crop_size=16)
    damaged = bytearray(whole)
    place = damaged.index(b"\xff\xc4") + 5
    damaged[place : place + 16] = b"\xff" * 16  # more codes than a Huffman table can hold
    images = [whole, bytes(damaged), whole, jpeg(size=(21, 37))]
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")
    try:
        unit = decoder.decode(images, [(37, 21)] * 3 + [(21, 37)])
        alone = decoder.decode(images[:1], [(37, 21)])
    finally:
        decoder.close()
    errors = [error and (error.status, error.stage) for error in unit.errors]
    assert errors == [None, (Status.CORRUPT, Stage.DECODE), None, None]
    assert (unit.widths.tolist(), unit.heights.tolist()) == ([37, 0, 37, 21], [21, 0, 21, 37])
    assert np.array_equal(unit.pixels_NHWC[0], unit.pixels_NHWC[2])
    assert np.array_equal(unit.pixels_NHWC[0], alone.pixels_NHWC[0])
    assert not unit.pixels_NHWC[1].any()


def test_an_image_the_device_alone_refuses_is_decoded_on_the_cpu() -> None:
    data, spec = jpeg(), PreprocessSpec(resize_size=20, crop_size=16)
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")

    def refusing(images: list[bytes], **_: object) -> list[torch.Tensor]:
        raise RuntimeError(f"cannot decode {len(images)}")

    decoder._decode_jpeg = refusing
    try:
        unit = decoder.decode([data, data], [(37, 21)] * 2)
    finally:
        decoder.close()
    assert unit.errors == [None, None]
    assert np.array_equal(unit.pixels_NHWC[1], on_cpu(data, spec).pixels_HWC)


def test_a_device_that_decodes_nothing_is_not_asked_for_each_image() -> None:
    data, spec, calls = jpeg(), PreprocessSpec(resize_size=20, crop_size=16), []
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")

    def refusing(images: list[bytes], **_: object) -> list[torch.Tensor]:
        calls.append(len(images))
        raise RuntimeError("no memory")

    decoder._decode_jpeg = refusing
    try:
        unit = decoder.decode([data] * 16, [(37, 21)] * 16)
    finally:
        decoder.close()
    assert calls == [16, 2]
    assert unit.errors == [None] * 16
    assert all(np.array_equal(pixels, on_cpu(data, spec).pixels_HWC) for pixels in unit.pixels_NHWC)


def test_a_device_is_tried_out_with_two_photographs() -> None:
    asked = list[bytes]()
    decoder = GpuDecoder(PreprocessSpec(), DecodeConfig(), device="cpu")
    decoder._decode_jpeg = lambda images, **_: asked.extend(images)
    decoder._try_out()
    assert [read_plain_header(data) for data in asked] == [JpegHeader(640, 480)] * 2
    with Image.open(io.BytesIO(asked[0])) as image:
        assert (image.mode, "progressive" in image.info, JpegImagePlugin.get_sampling(image)) == ("RGB", False, 2)


def test_a_device_that_refuses_many_images_is_not_asked_for_the_others() -> None:
    """Nor is it forgotten for the next call."""
    data, spec = jpeg(), PreprocessSpec(resize_size=20, crop_size=16)
    odd, calls = jpeg(comment=b"odd"), list[int]()
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")
    decode_jpeg = decoder._decode_jpeg

    def choosy(images: list[bytes], **options: object) -> list[torch.Tensor]:
        calls.append(len(images))
        if odd in images:
            raise RuntimeError("odd")
        return decode_jpeg(images, **options)

    decoder._decode_jpeg = choosy
    decode_rest, left = decoder._decoder.decode, list[int]()

    def counted(payloads: list[bytes], num_rows: int) -> DecodedUnit:
        left.append(num_rows)
        return decode_rest(payloads, num_rows)

    decoder._decoder.decode = counted  # type: ignore[method-assign, assignment]
    images = [odd if index % 4 == 0 else data for index in range(128)]
    try:
        unit = decoder.decode(images * 2, [(37, 21)] * 256)
    finally:
        decoder.close()
    assert unit.errors == [None] * 256
    # Of each call the first 29 images were looked at, 8 of them in vain.
    assert left == [2 * (8 + 128 - 29)]
    assert calls[0] == 128
    assert len(calls) < 2 * 8 * 14
    whole = on_cpu(data, spec).pixels_HWC.astype(int)
    assert all(np.abs(pixels - whole).max() <= 2 for pixels in unit.pixels_NHWC)
    assert (unit.widths.tolist(), unit.heights.tolist()) == ([37] * 256, [21] * 256)


def test_damaged_images_cost_their_neighbours_nothing() -> None:
    """In both halves of a call: the others' pixels are the device's, which may differ from the CPU's."""
    data, spec = jpeg(), PreprocessSpec(resize_size=20, crop_size=16)
    damaged, asked = data[:200], list[bytes]()
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")
    decode_rest = decoder._decoder.decode

    def counted(payloads: Iterable[bytes], num_rows: int) -> DecodedUnit:
        asked.extend(payloads)
        return decode_rest(asked, num_rows)

    decoder._decoder.decode = counted  # type: ignore[method-assign, assignment]
    try:
        unit = decoder.decode([damaged if index in (1, 14) else data for index in range(16)], [(37, 21)] * 16)
    finally:
        decoder.close()
    assert asked == [damaged, damaged]
    assert [index for index, error in enumerate(unit.errors) if error is not None] == [1, 14]


def test_a_call_that_is_too_large_for_the_device_is_made_in_halves() -> None:
    data, spec = jpeg(), PreprocessSpec(resize_size=20, crop_size=16)
    decoder = GpuDecoder(spec, DecodeConfig(), device="cpu")
    decode_jpeg = decoder._decode_jpeg

    def small(images: list[bytes], **options: object) -> list[torch.Tensor]:
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode_jpeg(images, **options)

    decoder._decode_jpeg = small
    expected = GpuDecoder(spec, DecodeConfig(), device="cpu").decode([data], [(37, 21)])
    unit = decoder.decode([data] * 8, [(37, 21)] * 8)
    assert decoder._decoder.child_pid is None, "none of them is decoded on the CPU"
    assert all(np.array_equal(pixels, expected.pixels_NHWC[0]) for pixels in unit.pixels_NHWC)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_decode_is_told_of_before_there_are_images() -> None:
    with pytest.raises(UsageError, match=r"^decode.gpu_share: cuda decodes no JPEG here \(.*\); .* or set it to 0$"):
        GpuDecoder(PreprocessSpec(), DecodeConfig(), device="cuda")


def test_large_images_are_decoded_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(gpu_decode._calls([(10, 10)] * 300)) == [(0, 128), (128, 256), (256, 300)]
    assert list(gpu_decode._calls([])) == []
    monkeypatch.setattr(gpu_decode, "_MAX_BYTES", 3 * 250)
    assert list(gpu_decode._calls([(10, 10), (10, 10), (10, 10), (50, 50), (1, 1)])) == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_a_format_that_the_model_does_not_take_is_refused_all_the_same(photo_config: Config) -> None:
    run = plan_run(changed(photo_config, decode__gpu_share=1.0), "cpu")
    spec = replace(run.spec, decode=replace(run.spec.decode, formats=("PNG",)))
    with DecodeStage(replace(run, spec=spec)) as decode:
        block = decode(0)
    assert ENCODED not in block.column_names
    assert set(block["status"].to_pylist()) == {None, Status.UNSUPPORTED_FORMAT.value}


def test_rows_left_to_the_gpu_take_no_room_for_pixels(photo_config: Config) -> None:
    large = changed(photo_config, preprocess__resize_size=224, preprocess__crop_size=224, run__on_unfinished="abandon")
    alone, shared = (plan_run(changed(large, decode__gpu_share=share), "cpu") for share in (0.0, 1.0))
    with DecodeStage(alone) as decode_all, DecodeStage(shared) as decode_some:
        for unit in [*range(4), 0]:  # the last into memory that was used before
            expected, block = decode_all(unit), decode_some(unit)
            left = np.array(block[ENCODED].is_valid())
            assert 8 <= left.sum() < 16
            assert block[PIXELS].is_null().to_pylist() == left.tolist()
            assert block[PIXELS].filter(pa.array(~left)).equals(expected[PIXELS].filter(pa.array(~left)))
            assert block.nbytes < (~left).sum() * shared.spec.pixel_bytes + 16 * 10_000


def test_a_block_that_was_stored_or_cut_has_the_same_images(photo_config: Config) -> None:
    run = plan_run(changed(photo_config, decode__gpu_share=0.5), "cpu")
    classify = ClassifyStage(run, batch_size=8, num_threads=1)
    with DecodeStage(run) as decode:
        block = decode(0)
    classify.close()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as stream:
        stream.write_table(block)
    stored = pa.ipc.open_stream(sink.getvalue()).read_all()
    images_NHWC = classify._images(block)
    cells = block[PIXELS].to_pylist()
    assert any(cells)
    assert None in cells
    assert [pixels_HWC.tobytes() for pixels_HWC in images_NHWC] == [cell or bytes(32 * 32 * 3) for cell in cells]
    assert np.array_equal(classify._images(stored), images_NHWC)
    assert np.array_equal(classify._images(stored.slice(5, 4)), images_NHWC[5:9])
    for row, cell in enumerate(cells):
        assert np.array_equal(classify._images(stored.slice(row, 1)), images_NHWC[row : row + 1])
        assert classify._images(stored.slice(row, 1)).flags.writeable == (cell is None)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_units_come_out_as_they_do_without(photo_config: Config, share: float) -> None:
    shared = changed(photo_config, decode__gpu_share=share, run__on_unfinished="abandon")
    results = []
    for config in (photo_config, shared):
        run = plan_run(config, "cpu")
        classify = ClassifyStage(run, batch_size=8, num_threads=1)
        with DecodeStage(run) as decode:
            blocks = [decode(unit) for unit in range(run.plan.layout.num_units)]
        left = [block[ENCODED].to_pylist() if ENCODED in block.column_names else [] for block in blocks]
        results.append((sum(data is not None for unit in left for data in unit), [classify(block) for block in blocks]))
        classify.close()
    (none, expected), (some, given) = results
    assert none == 0
    assert some >= 45 * share
    for block, other in zip(expected, given, strict=True):
        for column in ("row_id", "status", "error_stage", "error_message", "attempts", "width", "height", "label"):
            assert block[column].equals(other[column]), column
        probs, others = (table["probabilities"].combine_chunks().flatten().to_numpy() for table in (block, other))
        assert np.abs(probs - others).max() < 0.02
