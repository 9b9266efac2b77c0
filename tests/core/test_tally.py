from __future__ import annotations

import pyarrow as pa

from imgbatch.core import tally as tally_module
from imgbatch.core.tally import Tally


def test_targets_and_splits_are_counted_over_tables() -> None:
    tally = Tally()
    tally.add(pa.table({"target": ["cat", "dog", "cat"], "split": ["train", "train", None]}))
    tally.add(pa.table({"target": [None, "cat"], "split": ["test", "train"]}, schema=None))
    assert tally.num_rows == 5
    assert tally.splits() == ["test", "train", None]
    assert tally.targets() == {"cat": 3, "dog": 1, None: 1}
    assert tally.by_target["cat", "train"] == 2
    assert tally.by_split["train"] == 3


def test_a_row_counts_for_each_of_its_targets() -> None:
    tally = Tally()
    targets = pa.array([["a", "b"], [], ["b"], None], pa.list_(pa.string()))
    tally.add(pa.table({"targets": targets, "split": ["x", "x", "y", "y"]}))
    assert tally.targets() == {"a": 1, "b": 2}
    assert tally.by_target["b", "y"] == 1
    assert tally.num_rows == 4


def test_without_such_columns_only_rows_are_counted() -> None:
    tally = Tally()
    tally.add(pa.table({"uri": ["a", "b"]}))
    assert (tally.num_rows, tally.splits(), tally.targets(), tally.has_targets) == (2, [], {}, False)


def test_the_number_of_targets_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(tally_module, "MAX_TARGETS", 2)
    tally = Tally()
    tally.add(pa.table({"target": ["a", "b", "c", "a"]}))
    tally.add(pa.table({"target": ["d", "a", "d"]}))
    assert len(tally.targets()) == 2
    assert tally.num_rows == 7
    assert tally.num_not_listed == 7 - sum(tally.targets().values()) >= 3
