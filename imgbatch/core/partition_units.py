"""Which units hold rows of a partition, and the output files that they are cut into."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

SPANNED_UNITS = 2**15
"""No output file reaches across a multiple of so many units, so that no part of the writing takes hours."""
PARTITION_RANGES = 32
"""Runs of units that finalize.json keeps of one file of a partition: most units hold some of most buckets."""


class PartitionUnits:
    """Units in order, and how many rows of one partition each holds; of a large run there are millions of pairs."""

    def __init__(self, units: array[int] | None = None, rows: array[int] | None = None) -> None:
        self.units = array("I") if units is None else units
        self.rows = array("I") if rows is None else rows

    def add(self, unit: int, rows: int) -> None:
        self.units.append(unit)
        self.rows.append(rows)

    def extend(self, later: PartitionUnits) -> None:
        self.units.extend(later.units)
        self.rows.extend(later.rows)

    def cut(self, rows_per_file: int) -> Iterator[PartitionUnits]:
        """The units of each output file; one without any where there are none."""
        first, held = 0, 0
        for position, (unit, rows) in enumerate(zip(self.units, self.rows, strict=True)):
            is_far = unit // SPANNED_UNITS != self.units[first] // SPANNED_UNITS
            if position > first and (held + rows > rows_per_file or is_far):
                yield PartitionUnits(self.units[first:position], self.rows[first:position])
                first, held = position, 0
            held += rows
        yield PartitionUnits(self.units[first:], self.rows[first:])

    def ranges(self, limit: int) -> list[list[int]]:
        """Runs of unit indices, ``[first, last]``; beyond ``limit`` of them, the smallest gaps count as units too."""
        if not self.units:
            return []
        units = np.array(self.units, np.int64)
        gaps = np.diff(units)
        breaks = np.flatnonzero(gaps > 1)
        breaks = np.sort(breaks[np.argsort(-gaps[breaks], kind="stable")[: limit - 1]])
        firsts, lasts = units[[0, *(breaks + 1)]], units[[*breaks, -1]]
        ranges: list[list[int]] = np.stack([firsts, lasts], axis=1).tolist()
        return ranges
