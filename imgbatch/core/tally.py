"""Counting a manifest's rows by target and split as they stream by, in bounded memory."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.schema import SPLIT, TARGET, TARGETS

MAX_TARGETS = 10_000
"""Targets beyond so many different ones are not told apart."""


class Tally:
    """Rows, rows by split, and rows by (target, split); with several targets a row counts for each of them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.by_split: Counter[str | None] = Counter()
        self.by_target: Counter[tuple[str | None, str | None]] = Counter()
        self.has_targets = False
        self.num_not_listed = 0
        """Rows of targets that :attr:`by_target` leaves out; with several targets, for each such target."""
        self._targets: set[str | None] = set()

    def add(self, table: pa.Table) -> None:
        """Count a table that may have columns ``target`` or ``targets`` and ``split``."""
        self.num_rows += table.num_rows
        splits = table[SPLIT] if SPLIT in table.column_names else pa.nulls(table.num_rows, pa.string())
        if SPLIT in table.column_names:
            self.by_split.update({entry["values"]: entry["counts"] for entry in pc.value_counts(splits).to_pylist()})
        if TARGET in table.column_names:
            self._add_pairs(table[TARGET], splits)
        elif TARGETS in table.column_names:
            targets = table[TARGETS].combine_chunks()
            self._add_pairs(pc.list_flatten(targets), splits.take(pc.list_parent_indices(targets)))

    def splits(self) -> list[str | None]:
        """The splits there are, in the order of their names; empty where there is no such column."""
        return sorted(self.by_split, key=lambda split: (split is None, split or ""))

    def targets(self) -> dict[str | None, int]:
        """Rows of each target, in the order of their names."""
        counts: Counter[str | None] = Counter()
        for (target, _), rows in self.by_target.items():
            counts[target] += rows
        return dict(sorted(counts.items(), key=lambda item: (item[0] is None, item[0] or "")))

    def _add_pairs(self, targets: pa.Array | pa.ChunkedArray, splits: pa.Array | pa.ChunkedArray) -> None:
        self.has_targets = True
        pairs = pa.table([targets, splits], names=["target", "split"])
        for pair in pairs.group_by(["target", "split"]).aggregate([([], "count_all")]).to_pylist():
            target = pair["target"]
            if target in self._targets or len(self._targets) < MAX_TARGETS:
                self._targets.add(target)
                self.by_target[target, pair["split"]] += pair["count_all"]
            else:
                self.num_not_listed += pair["count_all"]
