from __future__ import annotations

import math

import pytest

from imgbatch.runtime.suspects import Suspects

EVERYTHING = 10**6


def play(suspects: Suspects, num_units: int, poison: set[int], window: int) -> tuple[list[int], int]:
    """Passes until only poison is left: the units that were isolated, in order, and how many passes it took.

    A pass does units in order and dies when it meets poison; the ``window`` units from there on were under way.
    """
    pending, isolated, num_passes = list(range(num_units)), list[int](), 0
    while pending:
        if alone := suspects.alone(pending):
            isolated.append(alone[0])
            pending.remove(alone[0])
            continue
        units = suspects.choose(pending, set(), EVERYTHING)
        num_passes += 1
        done = next((at for at, unit in enumerate(units) if unit in poison), len(units))
        pending = [unit for unit in pending if unit not in units[:done]]
        if done < len(units):
            suspects.pass_ended_early(units, units[done:][:window], anything_came=done > 0)
        else:
            suspects.pass_ended()
    return isolated, num_passes


@pytest.mark.parametrize("window", [1, 12, 64, 1276])
def test_a_poisonous_unit_is_alone_after_a_few_halves(window: int) -> None:
    isolated, num_passes = play(Suspects(), 5000, {2345}, window)
    assert isolated == [2345]
    assert num_passes <= 3 + 2 * math.log2(max(2, window))


def test_every_one_of_several_is_found_and_none_else() -> None:
    isolated, _ = play(Suspects(), 1000, {10, 11, 500, 900}, 64)
    assert set(isolated) >= {10, 11, 500, 900}
    assert len(isolated) <= 6


def test_an_engine_that_never_does_anything_is_looked_at_after_two_passes() -> None:
    suspects = Suspects()
    pending = list(range(100_000))
    for _ in range(2):
        assert not suspects.alone(pending)
        units = suspects.choose(pending, set(), EVERYTHING)
        suspects.pass_ended_early(units, units[:64], anything_came=False)
    assert suspects.alone(pending)


def test_untried_units_go_before_suspects_and_those_before_what_came_already() -> None:
    suspects = Suspects(before=[2, 3])
    assert suspects.choose(range(10), {8, 9}, most=3) == [0, 1, 4]
    assert suspects.choose([2, 3, 8, 9], {8, 9}, most=3) == [2, 3]
    suspects.pass_ended()
    assert suspects.choose([8, 9], {8, 9}, most=3) == [8, 9]


def test_what_was_under_way_when_the_command_before_stopped_is_known() -> None:
    suspects = Suspects(before=[2, 3])
    assert suspects.hold([3])
    assert not suspects.hold([3, 4])
