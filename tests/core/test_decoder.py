from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Set
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgbatch.config import DecodeConfig
from imgbatch.core.decoder import DecodedUnit, Decoder
from imgbatch.core.failpoints import ONCE_VARIABLE, VARIABLE
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.raster_request import RasterRequest
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import ImgbatchError, RowError, Stage, Status, row_error
from tests.core.encoding import encode

SPEC = PreprocessSpec(resize_size=16, crop_size=16)


def jpeg(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    pixels_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels_HWC), "JPEG")


def slow_png() -> bytes:
    """Small to send, long to decode: a palette of 100 million pixels, for tenths of a second in C code."""
    return encode(Image.new("P", (10_000, 10_000)), "PNG")


def assert_all_decoded(unit: DecodedUnit, payloads: list[bytes], except_rows: Set[int] = frozenset()) -> None:
    for row, data in enumerate(payloads):
        if row in except_rows:
            assert unit.errors[row] is not None
            assert not unit.pixels_NHWC[row].any()
            assert unit.widths[row] == unit.heights[row] == 0
        else:
            expected = decode_image(data, SPEC, max_pixels=10**9)
            assert isinstance(expected, Decoded)
            assert unit.errors[row] is None
            np.testing.assert_array_equal(unit.pixels_NHWC[row], expected.pixels_HWC)
            assert (unit.widths[row], unit.heights[row]) == (expected.width, expected.height)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> list[int]:
    """Those that decode: multiprocessing leaves a process behind that tracks what others share."""
    pids = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    return [pid for pid in pids if "decode_child" in Path(f"/proc/{pid}/cmdline").read_text()]


def test_a_unit_is_what_decode_image_makes_of_each_row() -> None:
    payloads = [jpeg(40 + seed, 30, seed) for seed in range(20)]
    with Decoder(SPEC, DecodeConfig()) as decoder:
        unit = decoder.decode(payloads, len(payloads))
        again = decoder.decode(iter(payloads[:3]), 3)
    assert_all_decoded(unit, payloads)
    assert_all_decoded(again, payloads[:3])
    assert unit.pixels_NHWC.shape == (20, 16, 16, 3)
    assert unit.pixels_NHWC.dtype == np.uint8
    assert unit.widths.dtype == unit.heights.dtype == np.int32
    assert unit.decode_s > 0


def test_memory_is_used_again_once_nobody_has_its_pixels() -> None:
    payloads = [jpeg(seed=seed) for seed in range(4)]
    with Decoder(SPEC, DecodeConfig()) as decoder:
        held = decoder.decode(payloads, 4)
        view_HWC = held.pixels_NHWC[1]
        del held
        other = decoder.decode(payloads[::-1], 4)
        expected = decode_image(payloads[1], SPEC, max_pixels=10**9)
        assert isinstance(expected, Decoded)
        np.testing.assert_array_equal(view_HWC, expected.pixels_HWC)
        address, sizes = other.pixels_NHWC.ctypes.data, other.widths
        del other
        missing = row_error(Status.NOT_FOUND, Stage.FETCH, "no such file")
        again = decoder.decode([missing, payloads[2], b"<html>", None], 4)
    assert again.pixels_NHWC.ctypes.data == address
    assert sizes.all()
    assert [error.status if error else None for error in again.errors] == [
        Status.NOT_FOUND,
        None,
        Status.NOT_AN_IMAGE,
        None,
    ]
    assert_all_decoded(
        DecodedUnit(again.pixels_NHWC[1:2], again.widths[1:2], again.heights[1:2], [None], 0), payloads[2:3]
    )
    assert not again.pixels_NHWC[[0, 2, 3]].any()
    assert not again.widths[[0, 2, 3]].any()
    assert not again.heights[[0, 2, 3]].any()


def test_a_unit_of_another_size_has_memory_of_its_own() -> None:
    payloads = [jpeg(seed=seed) for seed in range(6)]
    with Decoder(SPEC, DecodeConfig()) as decoder:
        for num_rows in (4, 6, 6, 2):
            assert_all_decoded(decoder.decode(payloads[:num_rows], num_rows), payloads[:num_rows])


def test_errors_stay_in_their_rows() -> None:
    missing = row_error(Status.NOT_FOUND, Stage.FETCH, "no such file")
    with Decoder(SPEC, DecodeConfig(max_pixels=1500)) as decoder:
        unit = decoder.decode([b"", missing, jpeg(), b"<html>", jpeg(100, 100)], 5)
    assert [error.status if error else Status.OK for error in unit.errors] == [
        Status.EMPTY,
        Status.NOT_FOUND,
        Status.OK,
        Status.NOT_AN_IMAGE,
        Status.TOO_LARGE,
    ]
    assert unit.errors[1] is missing
    assert unit.errors[4] == RowError(Status.TOO_LARGE, Stage.DECODE, "100 x 100 px, more than 1500 (max_pixels)")


def test_a_unit_without_rows_and_one_of_nothing_but_errors() -> None:
    missing = row_error(Status.NOT_FOUND, Stage.FETCH, "no such file")
    with Decoder(SPEC, DecodeConfig()) as decoder:
        assert decoder.decode([], 0).errors == []
        assert decoder.decode([missing], 1).errors == [missing]


def test_images_larger_than_any_socket_buffer_pass() -> None:
    payloads = [encode(Image.effect_noise((1500, 1500), 90).convert("RGB"), "BMP"), jpeg()]
    assert len(payloads[0]) > 6_000_000
    with Decoder(SPEC, DecodeConfig()) as decoder:
        assert_all_decoded(decoder.decode(payloads, 2), payloads)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Arms failpoints in the children that start from then on; ``once``: each acts in one child only."""

    def arm(failpoints: str, *, once: bool = False) -> None:
        monkeypatch.setenv(VARIABLE, failpoints)
        if once:
            monkeypatch.setenv(ONCE_VARIABLE, str(tmp_path))

    return arm


def test_a_hanging_decoder_is_a_timeout_of_one_row(fail: Callable[..., None]) -> None:
    payloads = [jpeg(seed=seed) for seed in range(5)]
    fail("decode.row[1]=hang;decode.row[3]=hang")
    with Decoder(SPEC, DecodeConfig(timeout_s=2)) as decoder:
        unit = decoder.decode(payloads, 5)
    assert_all_decoded(unit, payloads, except_rows={1, 3})
    timeout = RowError(Status.TIMEOUT, Stage.DECODE, "decoding took more than 2 s (decode.timeout_s)", 1)
    assert [unit.errors[1], unit.errors[3]] == [timeout, timeout]


def test_a_timeout_ends_a_decoder_that_hangs_in_c_code_too() -> None:
    """Where no signal handler of Python's would come to its turn."""
    with Decoder(SPEC, DecodeConfig(timeout_s=0.1)) as decoder:
        (error,) = decoder.decode([slow_png()], 1).errors
    assert error is not None
    assert error.status is Status.TIMEOUT


def test_memory_is_bounded_for_the_child_and_not_for_this_process() -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    payloads = [jpeg(), encode(Image.new("RGB", (6000, 6000)), "PNG"), jpeg(seed=1)]
    with Decoder(SPEC, DecodeConfig(memory_mb=32)) as decoder:
        unit = decoder.decode(payloads, 3)
    assert_all_decoded(unit, payloads, except_rows={1})
    assert unit.errors[1] is not None
    assert (unit.errors[1].status, unit.errors[1].attempts) == (Status.OUT_OF_MEMORY, 2)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_an_image_larger_than_the_memory_costs_its_row() -> None:
    payloads = [jpeg(), jpeg() + bytes(80 << 20), jpeg(seed=1)]
    with Decoder(SPEC, DecodeConfig(memory_mb=64)) as decoder:
        unit = decoder.decode(payloads, 3)
    assert_all_decoded(unit, payloads, except_rows={1})
    assert unit.errors[1] is not None
    assert (unit.errors[1].status, unit.errors[1].attempts) == (Status.OUT_OF_MEMORY, 2)


def test_an_embedded_raster_that_fits_into_the_memory_only_once_costs_its_row() -> None:
    pytest.importorskip("rasterio")
    with Decoder(SPEC, DecodeConfig(memory_mb=64), max_nodata=0.5) as decoder:
        too_large, photograph = decoder.decode([RasterRequest(data=bytes(40 << 20)), jpeg()], 2).errors
    assert too_large is not None
    assert (too_large.status, too_large.attempts) == (Status.OUT_OF_MEMORY, 2)
    assert photograph is None


def test_a_progressive_jpeg_that_needs_more_memory_is_not_called_damaged() -> None:
    """Whose coefficients are all held at once; libjpeg says so rather than Python."""
    payloads = [jpeg(), encode(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True)]
    with Decoder(SPEC, DecodeConfig(memory_mb=64)) as decoder:
        unit = decoder.decode(payloads, 2)
    assert_all_decoded(unit, payloads, except_rows={1})
    assert unit.errors[1] is not None
    assert (unit.errors[1].status, unit.errors[1].attempts) == (Status.OUT_OF_MEMORY, 2)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exact": True}], ids=["VP8", "VP8L", "VP8X"])
def test_a_webp_of_too_many_pixels_is_too_large_though_there_is_no_memory_for_its_canvas(options: dict) -> None:
    mode = "RGBA" if "exact" in options else "RGB"
    payloads = [encode(Image.new(mode, (9000, 4000)), "WEBP", **options)]
    with Decoder(SPEC, DecodeConfig(memory_mb=64, max_pixels=30_000_000)) as decoder:
        (error,) = decoder.decode(payloads, 1).errors
    assert error is not None
    assert (error.status, error.message) == (Status.TOO_LARGE, "9000 x 4000 px, more than 30000000 (max_pixels)")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process has")
def test_no_library_takes_the_memory_that_images_may_have() -> None:
    """Arrow's allocator reserves 1 GiB at its first use; with just that much allowed, every image was a crash."""
    payloads = [jpeg(seed=seed) for seed in range(4)]
    with Decoder(SPEC, DecodeConfig(memory_mb=1024)) as decoder:
        assert_all_decoded(decoder.decode(payloads, 4), payloads)
        status = Path(f"/proc/{decoder.child_pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmData:")]
    assert int(line.split()[1]) < 400_000


def test_a_child_killed_once_costs_no_row(fail: Callable[..., None]) -> None:
    payloads = [jpeg(seed=seed) for seed in range(3)]
    fail("decode.row[1]=kill", once=True)
    with Decoder(SPEC, DecodeConfig()) as decoder:
        first = decoder.decode(payloads[:1], 1)
        pid = decoder.child_pid
        unit = decoder.decode(payloads, 3)
        assert decoder.child_pid != pid
    assert_all_decoded(first, payloads[:1])
    assert_all_decoded(unit, payloads)


@pytest.mark.parametrize(
    ("action", "message"),
    [("kill", "the decoding process was ended by SIGKILL"), ("raise", "the decoding process exited with code 1")],
)
def test_a_row_that_the_child_dies_of_twice_is_a_decoder_crash(
    action: str, message: str, fail: Callable[..., None]
) -> None:
    payloads = [jpeg(seed=seed) for seed in range(5)]
    fail(f"decode.row[1]={action}")
    with Decoder(SPEC, DecodeConfig()) as decoder:
        unit = decoder.decode(payloads, 5)
    assert_all_decoded(unit, payloads, except_rows={1})
    assert unit.errors[1] == RowError(Status.DECODER_CRASH, Stage.DECODE, message, 2)


def test_a_stopped_child_is_a_timeout(fail: Callable[..., None]) -> None:
    payloads = [jpeg(seed=seed) for seed in range(3)]
    fail("decode.row[1]=stop")
    with Decoder(SPEC, DecodeConfig(timeout_s=2)) as decoder:
        unit = decoder.decode(payloads, 3)
    assert_all_decoded(unit, payloads, except_rows={1})
    assert unit.errors[1] == RowError(Status.TIMEOUT, Stage.DECODE, "decoding made no progress for 3 s", 1)


def test_a_child_that_died_between_units_is_replaced() -> None:
    payloads = [jpeg()]
    with Decoder(SPEC, DecodeConfig()) as decoder:
        decoder.decode(payloads, 1)
        first = decoder.child_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert_all_decoded(decoder.decode(payloads, 1), payloads)
        assert decoder.child_pid != first


def test_a_child_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "simplejpeg.py").write_text("raise ImportError('this build of simplejpeg is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with Decoder(SPEC, DecodeConfig()) as decoder, pytest.raises(ImgbatchError, match="simplejpeg is broken"):
        decoder.decode([jpeg()], 1)
    assert not children()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_wrong_number_of_payloads_is_the_callers_mistake(num_rows: int) -> None:
    with Decoder(SPEC, DecodeConfig()) as decoder, pytest.raises(ValueError, match="argument 2"):
        decoder.decode([jpeg(), jpeg()], num_rows)


def test_an_exception_among_the_payloads_ends_the_child_and_nothing_else() -> None:
    def failing() -> Iterator[bytes]:
        yield jpeg()
        raise KeyError("from the fetcher")

    with Decoder(SPEC, DecodeConfig()) as decoder:
        with pytest.raises(KeyError, match="from the fetcher"):
            decoder.decode(failing(), 2)
        assert decoder.child_pid is None
        assert_all_decoded(decoder.decode([jpeg()], 1), [jpeg()])


def test_nothing_is_left_behind() -> None:
    descriptors = open_descriptors()
    payloads = [jpeg(), slow_png()]
    for timeout_s in (20.0, 0.1):
        with Decoder(SPEC, DecodeConfig(timeout_s=timeout_s)) as decoder:
            decoder.decode(payloads, 2)
    forgotten = Decoder(SPEC, DecodeConfig())
    forgotten.decode(payloads[:1], 1)
    del forgotten
    assert open_descriptors() == descriptors
    assert not children()


def test_the_child_ends_with_its_parent() -> None:
    script = (
        "import os, signal, sys\n"
        "from imgbatch.config import DecodeConfig\n"
        "from imgbatch.core.decoder import Decoder\n"
        "from imgbatch.core.transforms import PreprocessSpec\n"
        "decoder = Decoder(PreprocessSpec(), DecodeConfig())\n"
        "decoder.decode([b'x'], 1)\n"
        "print(decoder.child_pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while is_alive(int(parent.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(parent.stdout))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_odd_file_ends_in_pixels_or_a_reason(test_data: Path) -> None:
    files = sorted(file for file in (test_data / "odd-images").rglob("*") if file.is_file())
    payloads = [file.read_bytes() for file in files]
    with Decoder(SPEC, DecodeConfig(timeout_s=10, memory_mb=1024)) as decoder:
        unit = decoder.decode(payloads, len(payloads))
    statuses = {file.name: error.status if error else Status.OK for file, error in zip(files, unit.errors, strict=True)}
    assert len(statuses) > 400
    counts = {status: list(statuses.values()).count(status) for status in statuses.values()}
    assert set(counts) == {
        Status.OK,
        Status.UNSUPPORTED_FORMAT,
        Status.NOT_AN_IMAGE,
        Status.TRUNCATED,
        Status.CORRUPT,
        Status.TOO_LARGE,
    }
    assert counts[Status.OK] >= 290
    other_formats = (".ico", ".ff", ".exr", ".hdr", ".qoi", ".ppm", ".pgm", ".pbm")
    for name, status in statuses.items():
        if name.endswith(other_formats):
            assert status is Status.UNSUPPORTED_FORMAT, name
        elif name.endswith((".tga", ".icc")):
            assert status in (Status.UNSUPPORTED_FORMAT, Status.NOT_AN_IMAGE), name
        elif name.endswith((".md", ".txt", ".sh", ".scan")) or "LICENSE" in name or name.endswith("README"):
            assert status is Status.NOT_AN_IMAGE, name
        elif name.startswith(("bad__bmp__Bad_", "testpngs__crashers__huge")):
            assert status in (Status.OK, Status.CORRUPT, Status.TRUNCATED, Status.TOO_LARGE), name
        elif name.startswith(("pngsuite", "Landscape_")):
            assert status is Status.OK, name
