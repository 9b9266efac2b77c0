from __future__ import annotations

import pickle
from array import array

import pytest

from imgbatch.core import partition_units
from imgbatch.core.partition_units import PartitionUnits


def units_of(rows: dict[int, int]) -> PartitionUnits:
    return PartitionUnits(array("I", rows.keys()), array("I", rows.values()))


def test_files_end_where_they_are_full() -> None:
    chunks = list(units_of({0: 5, 2: 5, 3: 1, 9: 20, 10: 1}).cut(10))
    assert [(list(chunk.units), list(chunk.rows)) for chunk in chunks] == [
        ([0, 2], [5, 5]),
        ([3], [1]),
        ([9], [20]),
        ([10], [1]),
    ]
    assert [list(chunk.units) for chunk in PartitionUnits().cut(10)] == [[]]


def test_no_file_reaches_over_all_units_of_a_large_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition_units, "SPANNED_UNITS", 4)
    chunks = units_of(dict.fromkeys([0, 3, 4, 5, 13], 1)).cut(10)
    assert [list(chunk.units) for chunk in chunks] == [[0, 3], [4, 5], [13]]


@pytest.mark.parametrize(
    ("limit", "ranges"),
    [
        (20, [[1, 3], [5, 5], [9, 10], [14, 14], [30, 30]]),
        (5, [[1, 3], [5, 5], [9, 10], [14, 14], [30, 30]]),
        (3, [[1, 5], [9, 14], [30, 30]]),
        (2, [[1, 14], [30, 30]]),
        (1, [[1, 30]]),
    ],
)
def test_of_more_ranges_than_are_kept_the_nearest_become_one(limit: int, ranges: list[list[int]]) -> None:
    assert units_of(dict.fromkeys([1, 2, 3, 5, 9, 10, 14, 30], 1)).ranges(limit) == ranges
    assert PartitionUnits().ranges(limit) == []


def test_a_pair_of_partition_and_unit_takes_a_few_bytes() -> None:
    """Ten million images in a thousand buckets are eight million pairs, all of which the driver holds."""
    counted = units_of(dict.fromkeys(range(10_000), 1))
    total = PartitionUnits()
    for _ in range(10):
        total.extend(pickle.loads(pickle.dumps(counted)))
    assert len(total.units) == len(total.rows) == 100_000
    assert sum(values.buffer_info()[1] * values.itemsize for values in (total.units, total.rows)) <= 800_000
