"""Units: runs of consecutive manifest rows that are decoded, classified, written, committed and retried as one."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

MAX_UNIT_ROWS = 8192
MAX_UNIT_PIXEL_BYTES = 80 * 2**20
"""Keeps a decoded block under the 128 MiB at which Ray would split it."""
MAX_UNIT_RESULT_BYTES = 32 * 2**20
_SMALL_MANIFEST_UNITS, _SMALL_MANIFEST_ROWS = 32, 32
_FINE_UNIT_PIXEL_BYTES = 20 * 2**20
_FINE_UNITS, _FINE_UNITS_ON_CPUS = 128, 8192
"""On two cores units of 128 rows at 224 px cost a model in int8 4% more than of 512, one in float32 1%; they take a
quarter of the memory, and spread better over the pools. GPUs are fast enough for the driver's work to count, which is
that of a unit, whatever its rows; a longer job has larger units on CPUs too, because each is a file and a request."""


def choose_unit_rows(pixel_bytes: int, result_row_bytes: int, num_rows: int, *, on_cpus: bool = False) -> int:
    """The largest power of two, 1 to 8,192, whose pixels fit in 80 MiB and whose result rows fit in 32 MiB.

    A manifest too small to fill the pools with such units gets smaller ones: about 128 units (8,192 where CPUs run the
    model) of 20 MiB of pixels or more, or else about 32, of 32 rows or more.

    Args:
        pixel_bytes: bytes of one decoded image.
        result_row_bytes: bytes of one result row, estimated.
        num_rows: rows of the manifest.
        on_cpus: whether CPUs run the model.
    """
    num_fine = _FINE_UNITS_ON_CPUS if on_cpus else _FINE_UNITS
    fine = max(num_rows // num_fine, _FINE_UNIT_PIXEL_BYTES // pixel_bytes)
    enough = max(_SMALL_MANIFEST_ROWS, min(num_rows // _SMALL_MANIFEST_UNITS, fine))
    return min(max_unit_rows(pixel_bytes, result_row_bytes), 1 << (enough.bit_length() - 1))


def max_unit_rows(pixel_bytes: int, result_row_bytes: int) -> int:
    """As :func:`choose_unit_rows`, of a manifest of any size."""
    fits = min(MAX_UNIT_PIXEL_BYTES // pixel_bytes, MAX_UNIT_RESULT_BYTES // result_row_bytes, MAX_UNIT_ROWS)
    return 1 << (max(1, fits).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit: rows ``first_row`` to ``first_row + num_rows`` of the run."""

    index: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class UnitLayout:
    """How a run's rows are cut into units of at most ``unit_rows``.

    ``segments`` are row counts that no unit straddles: one for the whole run, or the manifest's row groups where
    the images are embedded in it.
    """

    unit_rows: int
    segments: tuple[int, ...]

    @cached_property
    def _first_units(self) -> list[int]:
        return [0, *accumulate(-(-rows // self.unit_rows) for rows in self.segments)]

    @cached_property
    def _first_rows(self) -> list[int]:
        return [0, *accumulate(self.segments)]

    @property
    def num_units(self) -> int:
        return self._first_units[-1]

    @property
    def num_rows(self) -> int:
        return self._first_rows[-1]

    def unit(self, index: int) -> Unit:
        """The unit with this index; raises ``IndexError``."""
        if not 0 <= index < self.num_units:
            raise IndexError(f"unit {index} of {self.num_units}")
        segment = bisect.bisect_right(self._first_units, index) - 1
        offset = (index - self._first_units[segment]) * self.unit_rows
        num_rows = min(self.unit_rows, self.segments[segment] - offset)
        return Unit(index, self._first_rows[segment] + offset, num_rows)

    def unit_of_row(self, row: int) -> Unit:
        """The unit that holds the run's row at position ``row``; raises ``IndexError``."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        segment = bisect.bisect_right(self._first_rows, row) - 1
        return self.unit(self._first_units[segment] + (row - self._first_rows[segment]) // self.unit_rows)

    def __iter__(self) -> Iterator[Unit]:
        return (self.unit(index) for index in range(self.num_units))
