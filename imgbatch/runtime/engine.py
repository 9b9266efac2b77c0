"""What the job asks of an engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol

from imgbatch.core.parallel import MapParts
from imgbatch.core.results import Receipt


class EngineStopped(Exception):
    """The engine could not go on: something died or failed, perhaps because of one of the units under way."""


class Engine(Protocol):
    """What runs the stages."""

    @property
    def window(self) -> int:
        """Units under way at once, at most."""

    @property
    def num_actors(self) -> dict[str, int]:
        """How many processes share each stage's work."""

    def describe(self) -> str:
        """One line for a person."""

    def classify_units(self, units: Sequence[int], *, defer: bool) -> Generator[Receipt]:
        """A receipt per unit; raises :class:`EngineStopped` when it cannot go on, ``Stalled`` when nothing comes, and
        ``CannotWrite`` if no pass could.
        """

    def classify_isolated(self, unit: int, *, defer: bool) -> Receipt:
        """The last resort for one unit; raises :class:`EngineStopped` when what looked after it died, ``Stalled`` when
        it does nothing.
        """

    @property
    def map_parts(self) -> MapParts:
        """Where the parts of finalize are done."""

    def close(self) -> None:
        """Give back what is held between passes."""
