from __future__ import annotations

from itertools import accumulate

import pytest

from imgbatch.core.units import (
    MAX_UNIT_PIXEL_BYTES,
    MAX_UNIT_RESULT_BYTES,
    MAX_UNIT_ROWS,
    UnitLayout,
    choose_unit_rows,
)

MANY = 10_000_000


@pytest.mark.parametrize(
    ("pixel_bytes", "result_bytes", "expected"),
    [
        (224 * 224 * 3, 200, 512),  # ten million images at 224 px with ten classes
        (64 * 64 * 3, 200, 4096),
        (8 * 8 * 3, 200, MAX_UNIT_ROWS),
        (224 * 224 * 3, 4 * 20_000, 256),  # 20,000 classes: the results are what counts
        (200 * 2**20, 200, 1),
    ],
)
def test_units_fill_their_budgets(pixel_bytes: int, result_bytes: int, expected: int) -> None:
    rows = choose_unit_rows(pixel_bytes, result_bytes, MANY)
    assert rows == expected
    if rows > 1:
        assert rows * pixel_bytes <= MAX_UNIT_PIXEL_BYTES
        assert rows * result_bytes <= MAX_UNIT_RESULT_BYTES


@pytest.mark.parametrize(
    ("side", "num_rows", "expected"),
    [
        (224, 1, 32),
        (224, 372, 32),
        (224, 3_000, 64),
        (224, 30_000, 128),
        (224, 100_000, 512),
        (64, 30_000, 512),
        (64, 50_000, 1024),
    ],
)
def test_a_small_manifest_is_cut_finer(side: int, num_rows: int, expected: int) -> None:
    assert choose_unit_rows(side * side * 3, 200, num_rows) == expected


@pytest.mark.parametrize("num_rows", [10_000, 100_000, 1_000_000])
def test_on_cpus_a_million_images_take_no_more_memory_than_ten_thousand(num_rows: int) -> None:
    assert choose_unit_rows(224 * 224 * 3, 200, num_rows, on_cpus=True) == 128


def test_on_cpus_units_are_those_of_gpus_where_there_are_few_images_or_very_many() -> None:
    for num_rows in (372, MANY):
        assert choose_unit_rows(224 * 224 * 3, 200, num_rows, on_cpus=True) == choose_unit_rows(
            224 * 224 * 3, 200, num_rows
        )


@pytest.mark.parametrize("segments", [(10,), (10, 3, 4), (4, 4, 4), (1,)])
def test_units_cover_every_row_once_and_straddle_nothing(segments: tuple[int, ...]) -> None:
    layout = UnitLayout(4, segments)
    units = list(layout)
    assert [unit.index for unit in units] == list(range(layout.num_units))
    assert [row for unit in units for row in range(unit.first_row, unit.first_row + unit.num_rows)] == list(
        range(sum(segments))
    )
    assert set(accumulate(segments)) <= {unit.first_row + unit.num_rows for unit in units}
    for unit in units:
        assert 1 <= unit.num_rows <= 4
        for row in range(unit.first_row, unit.first_row + unit.num_rows):
            assert layout.unit_of_row(row) == unit


def test_outside_there_is_nothing() -> None:
    layout = UnitLayout(4, (10,))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            layout.unit(index)
    with pytest.raises(IndexError):
        layout.unit_of_row(10)
