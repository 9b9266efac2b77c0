from __future__ import annotations

from dataclasses import replace

import pytest

from imgbatch.config import Config, DecodeConfig
from imgbatch.core import gpu_share
from imgbatch.core.bands import BandSpec
from imgbatch.core.gpu_share import LeftToGpu, check_gpu_share, is_for_gpu
from imgbatch.core.plan import plan_run
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import Stage, Status, UsageError, row_error
from tests.conftest import changed
from tests.core.test_jpeg_header import jpeg


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("first", [0, 512, 10**12])
def test_rows_are_spread_evenly(share: float, first: int) -> None:
    chosen = [is_for_gpu(row, share) for row in range(first, first + 512)]
    assert abs(sum(chosen) - 512 * share) <= 4
    for start in range(0, 512, 64):
        assert abs(sum(chosen[start : start + 64]) - 64 * share) <= 3


def test_plain_jpegs_are_kept_and_all_else_passes_by() -> None:
    failed = row_error(Status.NOT_FOUND, Stage.FETCH, "gone")
    large = jpeg(size=(60, 50))
    payloads = [jpeg(), failed, b"no image", jpeg("CMYK"), large, None]
    left = LeftToGpu(payloads, range(6), DecodeConfig(gpu_share=1.0, max_pixels=2_000))
    assert list(left) == [None, failed, b"no image", payloads[3], large, None]
    assert left.images == [payloads[0], None, None, None, None, None]
    assert [(row, header.width, header.height) for row, header in left.kept()] == [(0, 37, 21)]


def test_a_unit_leaves_so_many_bytes_to_the_gpu_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = jpeg(), jpeg(size=(60, 50))
    monkeypatch.setattr(gpu_share, "MAX_ENCODED_BYTES", 2 * len(small) + len(large) - 1)
    payloads = [small, large, large, small, small]
    left = LeftToGpu(payloads, range(5), DecodeConfig(gpu_share=1.0))
    assert list(left) == [None, None, large, small, small]
    assert left.images == [small, large, None, None, None]
    assert [row for row, _ in left.kept()] == [0, 1]


def test_none_is_left_without_a_share() -> None:
    left = LeftToGpu([jpeg()] * 3, range(3), DecodeConfig())
    assert list(left) == [jpeg()] * 3
    assert left.images == [None] * 3


def test_what_the_gpu_does_not_do_is_refused() -> None:
    share = DecodeConfig(gpu_share=0.5)
    spec = PreprocessSpec()
    check_gpu_share(DecodeConfig(), replace(spec, median_size=3))
    with pytest.raises(UsageError, match=r"^decode.gpu_share: .* median filter .* set it to 0$"):
        check_gpu_share(share, replace(spec, median_size=3))
    with pytest.raises(UsageError, match=r"^decode.gpu_share: .* reduced decoding \(preprocess.reducing_gap\)"):
        check_gpu_share(share, replace(spec, reducing_gap=3))
    bands = BandSpec(indices=(1, 2, 3), low=(0.0,) * 3, high=(1.0,) * 3)
    with pytest.raises(UsageError, match=r"^decode.gpu_share: .* bands of rasters"):
        check_gpu_share(share, replace(spec, bands=bands))


def test_share_is_part_of_what_a_run_is_the_same_by(photo_config: Config) -> None:
    without = plan_run(photo_config, "cpu").plan
    assert "decode.gpu_share" not in without.fields
    some = plan_run(changed(photo_config, decode__gpu_share=0.25, run__on_unfinished="abandon"), "cpu").plan
    assert some.fields["decode.gpu_share"] == 0.25
    assert some.run_id != without.run_id
