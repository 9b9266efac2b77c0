"""Stored predictions beside their targets: the relations that evaluation, calibration and comparison read.

Legend of the shape suffixes: ``N`` rows, ``K`` classes.

DuckDB joins and streams; what it holds in memory is bounded (NumPy's share comes on top: 5 bytes a row and the rank
sample) and spills to a temporary directory. Two relations are made on the connection:

    scored       every image that has a prediction and a target, once, with truth (the target, or the list of targets),
                 is_right, is_known: whether the model has a class for it (true for lists), and of_train: whether it
                 is of the split that training takes; of lists also is_exact: as is_right, but for the names that the
                 model has no class for
    unpredicted  every image that has a target and no prediction, once, with the status of its error row if any
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from imgbatch.core import storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import bounded_memory
from imgbatch.core.manifest import Manifest, open_manifest
from imgbatch.core.results import DEFAULT_LABEL_THRESHOLD
from imgbatch.core.runs import RunPaths
from imgbatch.core.training.labelled import TRAIN, names_of_split
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.schema import RESERVED_COLUMNS, SPLIT, TARGET, TARGETS

_BATCH_VALUES = 1 << 21
_MAX_SPLITS_NAMED = 10

IDENTITY = ("image_id", "uri", "run_id", "row_id")
"""What says which image a listed row is about, and where a reader finds it again."""

_KEPT = (*IDENTITY, "label", "label_index", "probability", "top_k", "probabilities", "labels")


@dataclass(frozen=True, slots=True)
class Labeller:
    """The model that the current predictions of an output come from."""

    task: str
    class_names: tuple[str, ...]
    model_ids: tuple[str, ...]
    """One, unless runs of models with the same classes share the output."""
    run_ids: tuple[str, ...]
    """Runs that current predictions come from, newest last."""
    has_probabilities: bool
    """Whether every class's probability was stored, in every run."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_multilabel(self) -> bool:
        return self.task == "multilabel"


@dataclass(frozen=True, slots=True)
class Scored:
    """An open connection with the relations ``scored`` and ``unpredicted``."""

    connection: duckdb.DuckDBPyConnection
    labeller: Labeller
    slice_by: tuple[str, ...]
    """Manifest columns; the views hold the i-th as text under ``slice_<i>``."""

    def fetch_row(self, sql: str) -> tuple[Any, ...]:
        """The one row of a query that always has one."""
        return self.connection.execute(sql).fetchall()[0]

    def iter_batches(self, columns: Sequence[str], where: str = "true") -> Iterator[pa.RecordBatch]:
        """Rows of ``scored``, in no particular order, in batches of about two million values."""
        num_rows = max(1024, _BATCH_VALUES // max(self.labeller.num_classes, 16))
        yield from self.connection.sql(f"select {', '.join(columns)} from scored where {where}").to_arrow_reader(
            num_rows
        )

    def probabilities(self, lists: pa.Array) -> np.ndarray:
        """A column of ``probabilities`` as float32 (N, K)."""
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(len(lists), self.labeller.num_classes)

    def membership(self, lists: pa.Array, class_names: Sequence[str] | None = None) -> np.ndarray:
        """A column of lists of class names as bool (N, K), K the labeller's or ``class_names``; others are left out."""
        names = self.labeller.class_names if class_names is None else class_names
        lengths_N = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        index = pc.index_in(lists.flatten(), pa.array(names)).fill_null(-1).to_numpy()
        row = np.repeat(np.arange(len(lists)), lengths_N)
        membership_NK = np.zeros((len(lists), len(names)), bool)
        membership_NK[row[index >= 0], index[index >= 0]] = True
        return membership_NK


@contextlib.contextmanager
def open_scored(
    out: str,
    *,
    manifest: str | None = None,
    split: str | None = None,
    slice_by: Sequence[str] = (),
    all_predictions: bool = False,
    runs: Sequence[CurrentRun] | None = None,
) -> Iterator[Scored]:
    """The current predictions of ``out`` beside their targets.

    Args:
        manifest: where the targets are, joined on ``image_id``; none: the classified manifest's own.
        split: only rows of this split, by whichever of the names that training knows for it.
        slice_by: manifest columns to carry along.
        all_predictions: ``scored`` also holds predictions without a target, with a null truth.
        runs: as of :func:`open_views`.

    Raises:
        UsageError: no finished run, runs of different models, no such column, no targets, or contradictory ones.
    """
    out = storage.absolute(out)
    with open_views(out, runs) as connection, bounded_memory(connection):
        labeller = read_labeller(connection, out)
        slice_by = tuple(dict.fromkeys(slice_by))
        truth = TARGETS if labeller.is_multilabel else TARGET
        wanted = _Wanted(truth, split, slice_by, all_predictions)
        opened = open_manifest(manifest) if manifest is not None else None
        if opened is None:
            _use_own_targets(connection, out, wanted)
        else:
            _load_targets(connection, opened, wanted)
        _view_with_target_index(connection, labeller)
        scored = Scored(connection, labeller, slice_by)
        if not all_predictions and not scored.fetch_row("select exists(from scored) or exists(from unpredicted)")[0]:
            raise UsageError(f"{manifest or out}: {_why_empty(connection, opened, wanted)}")
        yield scored


def read_labeller(connection: duckdb.DuckDBPyConnection, out: str) -> Labeller:
    """What the views say of the model behind the current predictions.

    Raises:
        UsageError: nothing predicted yet, or the current predictions come from models with different classes.
    """
    rows = connection.execute(
        "select run_id, any_value(model_id), max(predicted_at) as newest from predictions "
        "group by run_id order by newest, run_id"
    ).fetchall()
    if not rows:
        raise UsageError(f"{out}: no finished run with predictions there; `imgbatch classify -o {out}` makes one")
    runs = [RunPaths(out, str(run_id)) for run_id, _, _ in rows]
    described = [storage.read_json(run.classes) for run in runs]
    known = {(each["task"], tuple(each["class_names"])) for each in described}
    run_ids = tuple(run.run_id for run in runs)
    if len(known) > 1:
        raise UsageError(
            f"{out}: the current predictions come from models with different classes (runs {', '.join(run_ids)}); "
            f"classify with each model into an output of its own"
        )
    task, class_names = known.pop()
    has_probabilities = all(storage.read_json(run.plan)["probabilities"] == "all" for run in runs)
    return Labeller(task, class_names, tuple(dict.fromkeys(row[1] for row in rows)), run_ids, has_probabilities)


LISTED_LABELS = (
    "select labels, entry.label as label, entry.probability as probability from "
    "(select labels, unnest(coalesce(top_k, [{label: label, probability: probability}])) as entry from predictions)"
)
"""SQL, multi-label: each prediction's ``labels`` beside each entry of its ``top_k``, or its ``label`` without one."""


def told_label_thresholds(connection: duckdb.DuckDBPyConnection, cells: str = LISTED_LABELS) -> dict[str, float]:
    """Multi-label: from which probability each label applies, as far as what the current predictions say tells.

    That is half way between the highest probability at which a label was left out and the lowest at which it was
    given; 0.5, which nobody had to choose, where that explains the same labels.

    Args:
        cells: SQL for rows of ``labels``, ``label`` and ``probability``.
    """
    ends = connection.execute(
        "select label, coalesce(max(probability) filter (not list_contains(labels, label)), 0), "
        f"coalesce(min(probability) filter (list_contains(labels, label)), 1) from ({cells}) group by label"
    ).fetchall()
    half = DEFAULT_LABEL_THRESHOLD
    return {label: half if below < half <= above else (below + above) / 2 for label, below, above in ends}


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What to take of the rows that have a target."""

    truth: str
    """The column with the target: ``target`` or ``targets``."""
    split: str | None
    slice_by: tuple[str, ...]
    all_predictions: bool
    """Whether rows without a target are wanted too."""

    def check(self, names: Sequence[str], where: str) -> None:
        if self.truth not in names and not self.all_predictions:
            raise UsageError(f"{where}: no column {self.truth!r}; name a manifest that has it with --manifest")
        if self.split is not None and SPLIT not in names:
            raise UsageError(f"{where}: no column {SPLIT!r}, which --split {self.split} needs")
        for column in self.slice_by:
            if column not in names:
                known = ", ".join(name for name in names if name not in RESERVED_COLUMNS)
                raise UsageError(f"--slice-by {column}: no such column in {where}; there are: {known}")

    def columns(self, available: Sequence[str]) -> list[str]:
        """What to select of the rows that hold the target, of which these columns are ``available``."""
        slices = [f"cast({_quoted(name)} as varchar) as slice_{i}" for i, name in enumerate(self.slice_by)]
        of_train = f"coalesce({_is_of(TRAIN)}, false)" if SPLIT in available else "false"
        truth = self.truth if self.truth in available else f"null::varchar{'[]' if self.truth == TARGETS else ''}"
        return [f"{truth} as truth", f"{of_train} as of_train", *slices]

    @property
    def names(self) -> list[str]:
        """What :meth:`columns` are called."""
        return ["truth", "of_train", *(f"slice_{i}" for i in range(len(self.slice_by)))]

    @property
    def condition(self) -> str:
        has_truth = "true" if self.all_predictions else f"{self.truth} is not null"
        return has_truth if self.split is None else f"{has_truth} and {_is_of(self.split)}"


def _use_own_targets(connection: duckdb.DuckDBPyConnection, out: str, wanted: _Wanted) -> None:
    of_failed = set(_columns(connection, "errors"))
    names = [name for name in _columns(connection, "predictions") if name in of_failed]
    wanted.check(names, out)
    columns = wanted.columns(names)
    kept = ", ".join([*_KEPT, *columns])
    connection.execute(f"create temp view with_truth as select {kept} from predictions where {wanted.condition}")
    # The views count an image that an older run labelled and a newer one did not on both sides.
    connection.execute(
        f"create temp table unpredicted as select image_id, status, {', '.join(columns)} "
        f"from errors anti join predictions using (image_id) where {wanted.condition}"
    )


def _load_targets(connection: duckdb.DuckDBPyConnection, manifest: Manifest, wanted: _Wanted) -> None:
    if wanted.truth not in manifest.schema.names:
        raise UsageError(f"manifest {manifest.path}: no column {wanted.truth!r}; it holds what is true of each image")
    wanted.check(manifest.schema.names, f"manifest {manifest.path}")

    def batches() -> Iterator[pa.RecordBatch]:
        first_row = 0
        for table in manifest.iter_batches():
            yield from manifest.with_image_id(table, first_row).to_batches()
            first_row += table.num_rows

    stream = batches()
    head = next(stream)
    rows = pa.RecordBatchReader.from_batches(head.schema, itertools.chain([head], stream))
    connection.register("manifest_rows", rows)
    connection.execute(
        f"create temp table targets as select image_id, {', '.join(wanted.columns(manifest.schema.names))} "
        f"from manifest_rows where {wanted.condition}"
    )
    connection.unregister("manifest_rows")
    twice = connection.execute("select image_id from targets group by image_id having count(*) > 1 limit 1").fetchone()
    if twice:
        raise UsageError(
            f"manifest {manifest.path}: image_id {twice[0]!r} stands there more than once; keep one target"
        )
    predicted = ", ".join(f"p.{name}" for name in _KEPT)
    truth = ", ".join(f"t.{name}" for name in wanted.names)
    join = "left join" if wanted.all_predictions and wanted.split is None else "join"
    connection.execute(
        f"create temp view with_truth as select {predicted}, {truth} "
        f"from predictions p {join} targets t using (image_id)"
    )
    connection.execute(
        f"""create temp table unpredicted as select t.image_id, e.status, {truth}
        from (from targets anti join predictions using (image_id)) t
        left join errors e using (image_id)"""
    )


def _view_with_target_index(connection: duckdb.DuckDBPyConnection, labeller: Labeller) -> None:
    named = pa.table({"name": list(labeller.class_names), "index": np.arange(labeller.num_classes, dtype=np.int32)})
    connection.register("class_index", named)
    if labeller.is_multilabel:
        unknown = (
            "select list(distinct name) from (select unnest(truth) as name from with_truth) "
            "anti join class_index using (name)"
        )
        connection.execute(
            "create temp view scored as select *, true as is_known, "
            "list_has_all(truth, labels) and list_has_all(labels, truth) as is_right, "
            f"list_has_all(truth, labels) and list_has_all(list_concat(labels, ({unknown})), truth) as is_exact "
            "from with_truth"
        )
        return
    connection.execute(
        "create temp view scored as select s.*, c.index as target_index, c.index is not null as is_known, "
        "coalesce(c.index = s.label_index, false) as is_right "
        "from with_truth s left join class_index c on s.truth = c.name"
    )


def _why_empty(connection: duckdb.DuckDBPyConnection, manifest: Manifest | None, wanted: _Wanted) -> str:
    splits = _splits_with_targets(connection, manifest, wanted.truth) if wanted.split is not None else []
    if splits:
        return f"no row in split {wanted.split!r} has a target; there are some in: {', '.join(splits)}"
    return f"no row has a target; fill in column {wanted.truth!r}"


def _splits_with_targets(connection: duckdb.DuckDBPyConnection, manifest: Manifest | None, truth: str) -> list[str]:
    """The first splits by name in which a row has a target."""
    if manifest is None:
        rows = f"select {SPLIT}::varchar from {{}} where {truth} is not null"
        found = connection.execute(f"{rows.format('predictions')} union {rows.format('errors')}").fetchall()
        names = {name for (name,) in found}
    else:
        with_target = (table.filter(table[truth].is_valid()) for table in manifest.iter_batches([truth, SPLIT]))
        names = {name for table in with_target for name in table[SPLIT].unique().to_pylist()}
    return sorted(names - {None})[:_MAX_SPLITS_NAMED]


def _is_of(split: str) -> str:
    """SQL: whether a row is of the split."""
    return f"{SPLIT}::varchar in ({', '.join(map(_text, names_of_split(split)))})"


def _columns(connection: duckdb.DuckDBPyConnection, view: str) -> list[str]:
    return [row[0] for row in connection.execute(f"describe {view}").fetchall()]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
