"""Passes over an engine that stops where a test says, for what no machine would do on demand."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import pytest
from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.parallel import MapParts, in_threads
from imgbatch.core.plan import Run, plan_run
from imgbatch.core.results import Receipt
from imgbatch.errors import Interrupted
from imgbatch.runtime.engine import EngineStopped
from imgbatch.runtime.interrupts import StopSwitch
from imgbatch.runtime.passes import MAX_INNOCENT, Passes
from imgbatch.runtime.reporter import Reporter
from imgbatch.runtime.run_log import RunLog
from imgbatch.runtime.watchdog import Stalled
from tests.conftest import changed


class StoppingEngine:
    """Takes units in order, ``streams`` at once, which come together, and stops when a poisonous one is among them."""

    def __init__(
        self, units: Iterable[int], *, streams: int, window: int, poison: Iterable[int], stops_with: Exception
    ) -> None:
        self.left = dict.fromkeys(units)
        self.isolated: list[int] = []
        self.isolated_counts = {"OK": 1, "CLASSIFY_FAILED": 1}
        """Of a poisonous unit; the others have nothing but predictions."""
        self.away: set[int] = set()
        """Units whose images cannot be fetched in isolation."""
        self._streams = streams
        self._window = window
        self._poison = set(poison)
        self._stops_with = stops_with

    @property
    def window(self) -> int:
        return self._window

    @property
    def num_actors(self) -> dict[str, int]:
        return {}

    @property
    def map_parts(self) -> MapParts:
        return in_threads

    def describe(self) -> str:
        return "a simulation"

    def pending(self) -> list[int]:
        return list(self.left)

    def classify_units(self, units: Sequence[int], *, defer: bool) -> Generator[Receipt]:
        del defer  # whatever comes is committed
        for first in range(0, len(units), self._streams):
            together = units[first : first + self._streams]
            if self._poison.intersection(together):
                raise self._stops_with
            for unit in together:
                del self.left[unit]
                yield Receipt(unit, "committed", 2, {"OK": 2})

    def classify_isolated(self, unit: int, *, defer: bool) -> Receipt:
        self.isolated.append(unit)
        if defer and unit in self.away:
            return Receipt(unit, "deferred", 2, {"FETCH_FAILED": 2}, isolated=True)
        del self.left[unit]
        return Receipt(unit, "committed", 2, self.isolated_counts if unit in self._poison else {"OK": 2}, isolated=True)

    def close(self) -> None:
        pass


@pytest.fixture
def run(photo_config: Config) -> Run:
    """60 units of two rows."""
    return plan_run(changed(photo_config, classify__unit_rows=2), "cpu")


def stopping(
    run: Run,
    poison: Iterable[int],
    *,
    streams: int = 4,
    window: int = 16,
    stops_with: Exception | None = None,
) -> StoppingEngine:
    units = range(run.plan.layout.num_units)
    error = stops_with or EngineStopped("the machine went away")
    return StoppingEngine(units, streams=streams, window=window, poison=poison, stops_with=error)


def passes(run: Run, engine: StoppingEngine, log: RunLog | None = None) -> Passes:
    reporter = Reporter(Console(quiet=True), run_id=run.run_id, as_json=False)
    pending = engine.pending()
    return Passes(run, engine, reporter, pending, find_pending=engine.pending, log=log, stop=StopSwitch())


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (4, 16), (16, 64), (30, 60)])
def test_a_poisonous_unit_at_any_place_is_found(run: Run, streams: int, window: int) -> None:
    """It takes others down that went beside it, so that nothing comes of pass after pass; the engine is well."""
    for poison in range(run.plan.layout.num_units):
        engine = stopping(run, [poison], streams=streams, window=window)
        passes(run, engine).run_all()
        assert not engine.left
        assert poison in engine.isolated


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (4, 16), (30, 60)])
def test_an_engine_that_stops_whatever_the_unit_ends_the_job(run: Run, streams: int, window: int) -> None:
    engine = stopping(run, range(60), streams=streams, window=window)
    engine.isolated_counts = {"OK": 2}
    with pytest.raises(Interrupted, match="the engine stops whatever the unit, the last time with: the machine went"):
        passes(run, engine).run_all()
    assert len(engine.isolated) <= 4 * MAX_INNOCENT


def test_where_not_one_row_passes_even_in_isolation_the_rows_are_not_at_fault(run: Run) -> None:
    """As with a device that is broken: whatever is isolated would become errors, to the last row."""
    engine = stopping(run, range(60))
    engine.isolated_counts = {"CLASSIFY_FAILED": 2}
    with pytest.raises(Interrupted, match="the engine stops whatever the unit"):
        passes(run, engine).run_all()
    assert len(engine.isolated) == MAX_INNOCENT


def test_once_something_passed_units_without_a_prediction_end_nothing(run: Run) -> None:
    engine = stopping(run, range(20, 60))
    engine.isolated_counts = {"CLASSIFY_FAILED": 2}
    passes(run, engine).run_all()
    assert not engine.left
    assert set(engine.isolated) == set(range(20, 60))


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (4, 16), (20, 40)])
def test_an_engine_that_breaks_after_some_units_ends_the_job(run: Run, streams: int, window: int) -> None:
    """Nothing comes of it any more, while isolation works: row by row, the rest would take for ever."""
    engine = stopping(run, range(20, 60), streams=streams, window=window)
    engine.isolated_counts = {"OK": 2}
    with pytest.raises(Interrupted, match="the engine stops whatever the unit, the last time with: the machine went"):
        passes(run, engine).run_all()
    assert len(engine.isolated) <= 4 * MAX_INNOCENT


@pytest.mark.parametrize(("streams", "window"), [(1, 1), (4, 16), (20, 40)])
@pytest.mark.parametrize("poison", [range(3, 60, 8), (20, 21, 22, 23, 24)])
def test_units_that_stop_the_engine_and_pass_alone_end_nothing_while_others_come(
    run: Run, poison: Iterable[int], streams: int, window: int
) -> None:
    engine = stopping(run, poison, streams=streams, window=window)
    engine.isolated_counts = {"OK": 2}
    passes(run, engine).run_all()
    assert not engine.left


def test_a_unit_whose_images_are_away_while_it_is_isolated_comes_again_after_the_others(run: Run) -> None:
    """And then whatever comes of it is kept, where it stops the engine again."""
    engine = stopping(run, [7, 40])
    engine.away = {40}
    passes(run, engine).run_all()
    assert not engine.left
    assert [unit for unit in engine.isolated if unit in (7, 40)] == [40, 7, 40]


def test_what_stood_still_is_remembered_until_it_came(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a command that ends before it looks at anything, and by one that is interrupted."""

    def suspects() -> list[int]:
        found: list[int] = storage.read_json(run.paths.run_json)["sessions"][-1]["suspect_units"]
        return found

    log = RunLog(run)
    engine = stopping(run, [1], stops_with=Stalled("nothing came"))
    with pytest.raises(Stalled):
        passes(run, engine, log).run_all()
    log.write("interrupted")
    assert suspects() == list(range(16))
    RunLog(run).write("failed")
    assert suspects() == list(range(16))

    def interrupt(*_: object, **_options: object) -> Receipt:
        raise KeyboardInterrupt

    log = RunLog(run)
    engine = stopping(run, [1, 30])
    with monkeypatch.context() as patched:
        patched.setattr(engine, "classify_isolated", interrupt)
        with pytest.raises(KeyboardInterrupt):
            passes(run, engine, log).run_all()
    log.write("interrupted")
    assert suspects() == engine.pending()
    assert {1, 30} <= set(suspects()) < set(range(44))

    log = RunLog(run)
    passes(run, engine, log).run_all()
    log.write("finished")
    assert {1, 30} <= set(engine.isolated)
    assert suspects() == []


def test_who_remembers_nothing_looks_into_a_stall_at_once(run: Run) -> None:
    engine = stopping(run, [1], stops_with=Stalled("nothing came"))
    passes(run, engine).run_all()
    assert not engine.left
    assert 1 in engine.isolated
