"""Which units each pass of a job takes, through the local engine."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgbatch.config import Config
from imgbatch.core import stages, storage
from imgbatch.core.failpoints import parse_failpoints
from imgbatch.core.runs import list_runs
from imgbatch.core.verify import verify
from imgbatch.errors import Interrupted
from imgbatch.runtime.job import classify
from imgbatch.runtime.passes import Passes
from tests.conftest import changed
from tests.runtime.conftest import UNREADABLE

NUM_UNITS = 8


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], bool]]:
    """The units of each pass, and whether it may put units off."""
    one_pass, begun = Passes._one_pass, list[tuple[list[int], bool]]()

    def watched(self: Passes, units: list[int], *, defer: bool) -> bool:
        begun.append((units, defer))
        return one_pass(self, units, defer=defer)

    monkeypatch.setattr(Passes, "_one_pass", watched)
    return begun


@pytest.fixture
def unfetchable(photo_config: Config, photos: list[Path], tmp_path: Path) -> Config:
    """Eight units of 16 rows; of units 0, 1 and 5 more cannot be fetched than ``errors.max_rate`` allows."""
    uris = [str(photos[1])] * 16 * NUM_UNITS
    for row in (3, 4, 16, 17, 80, 95):
        uris[row] = UNREADABLE
    image_ids = [str(index) for index in range(len(uris))]
    pq.write_table(pa.table({"uri": uris, "image_id": image_ids}), tmp_path / "mixed.parquet")
    return changed(
        photo_config, input__manifest=str(tmp_path / "mixed.parquet"), errors__max_rate=0.07, fetch__retries=0
    )


def test_passes_follow_each_other_over_all_units(
    photo_config: Config, passes: list[tuple[list[int], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgbatch.runtime.passes.MAX_PASS_UNITS", 3)
    result = classify(photo_config)
    assert passes == [([0, 1, 2], True), ([3, 4, 5], True), ([6, 7], True)]
    assert verify(result.out).ok


def test_units_that_were_put_off_come_after_all_others(
    unfetchable: Config, passes: list[tuple[list[int], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing comes of the first pass, unit 5 may be put off too, and is tried again like units 0 and 1."""
    monkeypatch.setattr("imgbatch.runtime.passes.MAX_PASS_UNITS", 2)
    result = classify(unfetchable)
    may_put_off = [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]
    assert passes == [*((units, True) for units in may_put_off), ([0, 1], False), ([5], False)]
    assert result.counts == {"FETCH_FAILED": 6, "OK": 122}
    assert verify(result.out).ok


def test_a_unit_that_goes_alone_after_a_pass_died_and_is_put_off_ends_nothing(
    unfetchable: Config, passes: list[tuple[list[int], bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "failpoint", parse_failpoints("commit.before=raise@1"))
    result = classify(unfetchable)
    may_put_off = [list(range(NUM_UNITS)), [0], list(range(1, NUM_UNITS)), [0, 1, 5]]
    assert passes == [*((units, True) for units in may_put_off), ([0, 1, 5], False)]
    assert result.counts == {"FETCH_FAILED": 6, "OK": 122}


def test_units_that_only_the_engine_fails_on_are_isolated_and_the_run_ends_well(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them, one after the other, without a row at fault; a third would have been one too many."""
    monkeypatch.setattr("imgbatch.runtime.passes.MAX_INNOCENT", 2)
    in_this_process = "classify.unit[96]=raise;classify.unit[112]=raise"
    monkeypatch.setattr(stages, "failpoint", parse_failpoints(in_this_process))
    result = classify(photo_config)
    assert verify(result.out).ok
    assert result.num_rows == 120


def test_an_engine_through_which_nothing_comes_ends_the_job(
    photo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "failpoint", parse_failpoints("classify.unit=raise"))
    monkeypatch.setattr("imgbatch.runtime.passes.MAX_INNOCENT", 2)
    with pytest.raises(Interrupted, match=r"the engine stops whatever the unit, .*: classify.unit=raise; put it right"):
        classify(photo_config)
    record = storage.read_json(list_runs(str(photo_config.output.path))[0].paths.run_json)
    assert record["sessions"][0]["isolated_units"] == 2
