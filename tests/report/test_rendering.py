from __future__ import annotations

import pytest

from imgbatch.report.rendering import duration, number, percent, signed, when


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0%"), (1.0, "100.0%"), (0.99999, ">99.9%"), (0.00001, "<0.1%"), (0.1234, "12.3%"), (None, "–")],
)
def test_shares_never_round_to_all_or_nothing(share, text):
    assert percent(share) == text


def test_numbers_moments_and_durations_are_for_people():
    assert [number(value) for value in (0.012345, 4.918, 12345.6, None)] == ["0.0123", "4.92", "12,346", "–"]
    assert when("2026-01-02T03:04:05+01:00") == "2 Jan 2026, 02:04 UTC"
    assert [duration(value) for value in (4.25, 600, 9000)] == ["4.25 s", "10 min", "2.5 h"]


def test_differences_show_their_sign():
    assert [signed(value) for value in (0.0123, -0.5, 0.0, None)] == ["+1.2%", "−50.0%", "+0.0%", "–"]
