"""A repair through an engine that stands still, or does nothing."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from imgbatch.config import Config
from imgbatch.core.results import Receipt
from imgbatch.core.stages import ClassifyStage
from imgbatch.core.verify import verify
from imgbatch.errors import Interrupted
from imgbatch.runtime.job import classify
from imgbatch.runtime.local import LocalEngine
from imgbatch.runtime.repair import repair
from imgbatch.runtime.watchdog import Stalled

NUM_UNITS = 8


@pytest.fixture
def out(photo_config: Config) -> str:
    """An output whose predictions are lost."""
    result = classify(photo_config)
    (lost,) = Path(result.out, "predictions").rglob("*.parquet")
    lost.unlink()
    return result.out


def test_a_unit_at_which_the_engine_stands_still_ends_in_isolation(
    photo_config: Config, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify_units, begun = LocalEngine.classify_units, list[Sequence[int]]()

    def standing_still(self: LocalEngine, units: Sequence[int], *, defer: bool) -> Generator[Receipt]:
        begun.append(units)
        before = units[: units.index(1)] if 1 in units else units
        yield from classify_units(self, before, defer=defer)
        if 1 in units:
            raise Stalled("nothing came")

    monkeypatch.setattr(LocalEngine, "classify_units", standing_still)
    (done,) = repair(photo_config, None)
    assert begun == [list(range(NUM_UNITS)), list(range(2, NUM_UNITS)), [1]]
    assert done.num_units_classified == NUM_UNITS
    assert verify(out).ok


def test_an_engine_through_which_nothing_comes_ends_the_repair_and_the_next_one_goes_on(
    photo_config: Config, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> pa.Table:
        raise RuntimeError("no such device")

    with monkeypatch.context() as patched:
        patched.setattr("imgbatch.runtime.passes.MAX_INNOCENT", 1)
        patched.setattr(ClassifyStage, "__call__", failing)
        with pytest.raises(Interrupted, match=r"the engine stops whatever the unit, .*no such device"):
            repair(photo_config, None)
    (done,) = repair(photo_config, None)
    assert done.num_units_classified == NUM_UNITS - 1
    assert verify(out).ok
