"""A corpus of bad inputs: what becomes of each, that nothing invents pixels, and that the right pixels come out."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from imgbatch.config import DecodeConfig
from imgbatch.core.decoder import Decoder
from imgbatch.core.images import Decoded, decode_image
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from imgbatch.errors import RowError, Status
from tests.core.bad_inputs import BAD_INPUTS, ENCODINGS, BadInput, animation, deep_png, encoded, photograph, png
from tests.core.encoding import GREY, encode

SPEC = PreprocessSpec(resize_size=8, crop_size=8)
MAX_PIXELS = DecodeConfig().max_pixels
HEADER_BYTES = 64


def decode(data: bytes, spec: PreprocessSpec = SPEC) -> Decoded | RowError:
    return decode_image(data, spec, max_pixels=MAX_PIXELS)


def status_of(outcome: Decoded | RowError) -> Status:
    return Status.OK if isinstance(outcome, Decoded) else outcome.status


def middle(data: bytes, spec: PreprocessSpec = SPEC) -> np.ndarray:
    outcome = decode(data, spec)
    assert isinstance(outcome, Decoded), outcome
    return outcome.pixels_HWC[spec.crop_size // 2, spec.crop_size // 2].astype(int)


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
def test_each_becomes_what_the_table_says(bad: BadInput) -> None:
    outcome = decode(bad.make())
    assert status_of(outcome) is bad.status, outcome


def test_security_md_shows_the_same_table() -> None:
    text = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    table = text.partition("| file | outcome |\n")[2].partition("\n\n")[0]
    shown = re.findall(r"^\| (.+?) \| `?(.+?)`? \|$", table, re.MULTILINE)
    expected = {bad.name: "a label" if bad.status is Status.OK else bad.status.value for bad in BAD_INPUTS}
    assert sorted(shown) == sorted([("---", "---"), *expected.items()])


def test_they_do_no_harm_to_each_other_in_the_decoding_process() -> None:
    payloads = [data for bad in BAD_INPUTS for data in (bad.make(), encoded("PNG"))]
    with Decoder(SPEC, DecodeConfig(memory_mb=256)) as decoder:
        unit = decoder.decode(payloads, len(payloads))
    found = [error.status if error else Status.OK for error in unit.errors]
    assert found[::2] == [bad.status for bad in BAD_INPUTS]
    assert set(found[1::2]) == {Status.OK}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_file_cut_at_any_sixteenth_is_never_an_image(name: str) -> None:
    data = encoded(name)
    found = [status_of(decode(data[: len(data) * part // 16])) for part in range(16)]
    assert found[0] is Status.EMPTY
    # A JPEG inside a TIFF ends without a word about how much is missing.
    allowed = {Status.TRUNCATED, Status.CORRUPT} if name == "TIFF jpeg" else {Status.TRUNCATED}
    assert set(found[1:]) <= allowed


def flipped(data: bytes, rng: np.random.Generator, last: int | None = None) -> bytes:
    """1 to 8 bytes of the first ``last`` replaced."""
    damaged = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(0, last or len(data), rng.integers(1, 9))
    damaged[places] = rng.integers(0, 256, len(places))
    return damaged.tobytes()


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_damaged_header_ends_in_an_image_or_a_reason(name: str) -> None:
    rng = np.random.default_rng(2)
    data = encoded(name)
    for _ in range(40):
        assert isinstance(decode(flipped(data, rng, HEADER_BYTES)), Decoded | RowError)


@pytest.mark.soak
@pytest.mark.parametrize("name", ENCODINGS)
def test_thousands_of_damaged_files_cost_no_process(name: str) -> None:
    """In the decoding process, which must not have died of any of them."""
    rng = np.random.default_rng(3)
    data = encoded(name)
    payloads = [flipped(data, rng, HEADER_BYTES if row % 2 else None) for row in range(3000)]
    with Decoder(SPEC, DecodeConfig(timeout_s=5)) as decoder:
        unit = decoder.decode(payloads, len(payloads))
    fatal = {Status.DECODER_CRASH, Status.TIMEOUT, Status.OUT_OF_MEMORY}
    assert [error for error in unit.errors if error and error.status in fatal] == []


places = st.integers(0, 2**16)
damage = st.lists(st.tuples(places, st.integers(0, 255)), max_size=12)


@pytest.mark.soak
@settings(max_examples=5000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(sorted(ENCODINGS)), bytes_set=damage, inserted=st.binary(max_size=64), at=places)
def test_decoding_ends_in_an_image_or_a_reason(
    name: str, bytes_set: list[tuple[int, int]], inserted: bytes, at: int
) -> None:
    data = bytearray(encoded(name))
    for place, value in bytes_set:
        data[place % len(data)] = value
    at %= len(data)
    outcome = decode(bytes(data[:at] + inserted + data[at:]))
    assert isinstance(outcome, Decoded | RowError)
    if isinstance(outcome, Decoded):
        assert outcome.pixels_HWC.shape == (8, 8, 3)
    else:
        assert outcome.message


@pytest.mark.parametrize(
    ("colour_type", "samples", "expected"),
    [
        (2, (40000, 20000, 65535), (156, 78, 255)),
        (6, (40000, 20000, 65535, 65535), (156, 78, 255)),
        (4, (40000, 65535), (156, 156, 156)),
        (0, (40000,), (156, 156, 156)),
    ],
    ids=["RGB", "RGBA", "grey and alpha", "grey"],
)
def test_16_bit_samples_are_divided_by_257(
    colour_type: int, samples: tuple[int, ...], expected: tuple[int, int, int]
) -> None:
    """Written without a library: 40000 / 65535 x 255 is 155.6."""
    assert np.abs(middle(deep_png(colour_type, *samples)) - expected).max() <= 1


def test_half_transparent_16_bit_samples_are_composited() -> None:
    spec = PreprocessSpec(8, 8, decode=DecodePolicy(background=(255, 0, 0)))
    found = middle(deep_png(6, 0, 65535, 0, 32768), spec)
    assert np.abs(found - (127, 128, 0)).max() <= 2


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_fills_the_range(bits: int) -> None:
    line = b"\0" + bytes([0xFF])
    assert (middle(png(8 // bits, 1, bits, 0, line)) == 255).all()


def test_a_bmp_from_top_to_bottom_stands_upright() -> None:
    """Half black above, half white below; the sign of the height says which line comes first."""
    lines = [bytes(12)] * 4 + [b"\xff" * 12] * 4
    header = b"BM" + (54 + 96).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = (40).to_bytes(4, "little") + (4).to_bytes(4, "little") + (-8).to_bytes(4, "little", signed=True)
    info += b"\x01\0\x18\0" + bytes(24)
    outcome = decode(header + info + b"".join(lines), PreprocessSpec(4, 4, resize_mode="stretch"))
    assert isinstance(outcome, Decoded)
    assert outcome.pixels_HWC[0].max() == 0
    assert outcome.pixels_HWC[-1].min() == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_counts(kind: str) -> None:
    assert np.abs(middle(animation(kind)) - GREY).max() <= 3


def test_a_progressive_jpeg_has_the_pixels_of_a_plain_one() -> None:
    plain, progressive = (decode(encoded(name)) for name in ("JPEG", "JPEG progressive"))
    assert isinstance(plain, Decoded)
    assert isinstance(progressive, Decoded)
    np.testing.assert_array_equal(plain.pixels_HWC, progressive.pixels_HWC)


def test_a_name_says_nothing_about_a_format(tmp_path: Path) -> None:
    """A PNG named .JPEG, through the file system as the job reads it."""
    from imgbatch.config import FetchConfig
    from imgbatch.core.fetch import Fetcher

    path = tmp_path / "photograph.JPEG"
    path.write_bytes(encode(photograph(), "PNG"))
    with Fetcher(FetchConfig()) as fetcher:
        (data,) = fetcher.fetch([str(path)])
    assert isinstance(data, bytes)
    assert status_of(decode(data)) is Status.OK


def test_an_arithmetic_coded_jpeg_has_the_pixels_of_its_original(test_data: Path) -> None:
    folder = test_data / "odd-images" / "libjpeg-turbo"
    spec = PreprocessSpec(64, 64)
    ours, original = (decode((folder / name).read_bytes(), spec) for name in ("testimgari.jpg", "testorig.jpg"))
    assert isinstance(ours, Decoded)
    assert isinstance(original, Decoded)
    assert np.abs(ours.pixels_HWC.astype(int) - original.pixels_HWC).mean() < 3
    assert status_of(decode((folder / "monkey12.jpg").read_bytes())) is Status.UNSUPPORTED_FORMAT


def test_palette_indices_past_the_palette_are_no_crash() -> None:
    image = Image.new("P", (8, 8), 200)
    image.putpalette([10, 20, 30])
    assert status_of(decode(encode(image, "PNG"))) in (Status.OK, Status.CORRUPT)
