"""Which units go next after the engine died or stood still: halves of those that were under way, until one is alone.

A unit that takes down whatever touches it shows after some log2(window) short passes, however wide the cluster is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set


class Suspects:
    """Units that were under way when a pass ended early, in this command or the one before."""

    def __init__(self, before: Iterable[int] = ()) -> None:
        self._groups = [group] if (group := list(before)) else []
        """The newest last."""
        self._known = set(group)
        self._alone: list[int] = []
        self._died_alone: set[int] = set()
        self._outlived: set[int] = set()
        """Of these, the ones after which more came of the engine: it was not to blame."""
        self._is_barren = False
        """Whether the last pass ended early before anything came of it."""

    def choose(self, pending: Sequence[int], tried: Set[int], most: int) -> list[int]:
        """The units of the next pass: untried ones, which keep a cluster busy; then a group; then the rest.

        Where nothing at all came of the last pass, a group is next: perhaps nothing ever comes.

        Args:
            tried: came already, and are to come again at the end.
            most: units of one pass.
        """
        wanted = set(pending)
        self._groups = [left for group in self._groups if (left := [unit for unit in group if unit in wanted])]
        grouped = {unit for group in self._groups for unit in group}
        untried = [unit for unit in pending if unit not in tried and unit not in grouped]
        if self._groups and (self._is_barren or not untried):
            return self._groups.pop()
        return (untried or list(pending))[:most]

    def alone(self, pending: Iterable[int]) -> list[int]:
        """The units among ``pending`` that are to be isolated."""
        wanted = set(pending)
        return [unit for unit in self._alone if unit in wanted]

    def came(self, unit: int) -> None:
        """The unit was isolated: if it is pending yet, it goes with the others again."""
        self._alone = [other for other in self._alone if other != unit]
        self._died_alone.discard(unit)

    def died_alone(self, unit: int) -> bool:
        """Whether nothing else was under way when the engine stopped at the unit, and nothing came of it since."""
        return unit in self._died_alone - self._outlived

    def hold(self, units: Iterable[int]) -> bool:
        """Whether all of these were under way before when a pass ended early."""
        return self._known.issuperset(units)

    def pass_ended_early(self, units: Sequence[int], under_way: Sequence[int], *, anything_came: bool) -> None:
        """Split what was under way; what was alone, or is first where nothing ever comes, is to be isolated."""
        left = list(under_way)
        self._known.update(left)
        if anything_came:
            self._outlived |= self._died_alone
        if len(left) == 1:
            self._died_alone.add(left[0])
        if left and (len(units) == 1 or (self._is_barren and not anything_came)):
            self._alone.append(left.pop(0))
        self._is_barren = not anything_came
        half = len(left) // 2
        self._groups += [group for group in (left[half:], left[:half]) if group]

    def pass_ended(self) -> None:
        """As it should."""
        self._outlived |= self._died_alone
        self._is_barren = False
