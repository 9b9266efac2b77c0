"""What an output holds, counted: labels, confidence, errors by reason, what each run took.

Everything is counted in DuckDB over the views, so that ten million rows cost no more memory than ten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb

from imgbatch.core import storage
from imgbatch.core.runs import RunPaths

NUM_BINS = 20
"""Of the confidence histogram, equal in width."""
UNLABELLED = "(from errors anti join predictions using (image_id))"
"""The failed rows whose image has no label: the views hold an image that an older run labelled and a newer one did not
on both sides."""
MESSAGES_SHOWN = 3
"""Different messages of one status."""
STAGES = ("fetch", "decode", "classify", "commit")


@dataclass(frozen=True, slots=True)
class LabelCount:
    """Rows of one label."""

    label: str
    count: int
    mean_probability: float | None
    """None where no row stored it: multi-label, and not among the best classes."""


@dataclass(frozen=True, slots=True)
class FailureReason:
    """Rows that failed with one status."""

    status: str
    stage: str
    count: int
    messages: tuple[tuple[str, int], ...]
    """The commonest messages and their rows."""
    num_messages: int
    """Different messages in all."""


@dataclass(frozen=True, slots=True)
class Session:
    """One command's work on a run, as run.json tells it."""

    run_id: str
    started_at: str
    machine: str
    rows: int
    images_per_s: float | None
    """From the moment the engine was ready; none where nothing was classified."""
    busy_s: float
    """Seconds over which ``images_per_s`` was measured."""
    hours: float
    """From the command's start to its end, the engine's start included."""
    stage_seconds: dict[str, float]
    """Seconds of work by stage, summed over the processes."""
    price_per_hour: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What the report says of an output, whether or not targets are known."""

    num_predictions: int
    num_errors: int
    """Images without a label."""
    labels: tuple[LabelCount, ...]
    """The commonest first; multi-label rows count once for each of their labels."""
    confidence_bins: tuple[int, ...]
    """Rows by the probability of their label."""
    median_confidence: float | None
    """To the width of a bin."""
    decisions: dict[str, int]
    """Rows by ``decision``; empty where the model has no thresholds."""
    failures: tuple[FailureReason, ...]
    sessions: tuple[Session, ...]
    """Oldest first."""

    @property
    def num_rows(self) -> int:
        return self.num_predictions + self.num_errors

    @property
    def rows_classified(self) -> int:
        """By the sessions that are on record."""
        return sum(session.rows for session in self.sessions)

    @property
    def busy_s(self) -> float:
        """Seconds in which :attr:`rows_classified` came about."""
        return sum(session.busy_s for session in self.sessions)

    @property
    def hours(self) -> float:
        """Over all sessions, the engine's start included."""
        return sum(session.hours for session in self.sessions)

    @property
    def images_per_s(self) -> float | None:
        """Over all sessions that classified anything."""
        return self.rows_classified / self.busy_s if self.busy_s else None

    @property
    def fastest(self) -> float | None:
        """Images per second of the fastest session."""
        return max((session.images_per_s or 0 for session in self.sessions), default=None)

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Over all sessions, in the order in which the stages follow each other."""
        total: Counter[str] = Counter()
        for session in self.sessions:
            total.update(session.stage_seconds)
        return {stage: total[stage] for stage in STAGES if total[stage]}

    @property
    def slowest_stage(self) -> str | None:
        """Where most seconds of work went."""
        return max(self.stage_seconds, key=lambda stage: self.stage_seconds[stage], default=None)

    @property
    def cost(self) -> float | None:
        """Hours times price, over all sessions; none where a session has no price."""
        prices = [session.price_per_hour for session in self.sessions]
        if not prices or None in prices:
            return None
        return sum(session.hours * (session.price_per_hour or 0) for session in self.sessions)


def summarise(
    connection: duckdb.DuckDBPyConnection, out: str, *, is_multilabel: bool, price_per_hour: float | None = None
) -> Summary:
    """Count what ``connection``'s views over ``out`` hold.

    Args:
        price_per_hour: of everything that the runs used; none: what their own configuration says.
    """
    cells = connection.execute(
        f"select label, decision, least(floor(probability * {NUM_BINS}), {NUM_BINS - 1})::int as bin, "
        "count(*), sum(probability::double) from predictions group by all"
    ).fetchall()
    bins: Counter[int] = Counter()
    decisions: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    confidence: Counter[str] = Counter()
    for label, decision, bin_index, count, probability in cells:
        bins[bin_index] += count
        counts[label] += count
        confidence[label] += probability
        if decision is not None:
            decisions[decision] += count
    labels = [LabelCount(label, count, confidence[label] / count) for label, count in counts.items()]
    if is_multilabel:
        labels = _count_said(connection)
    confidence_bins = tuple(bins[index] for index in range(NUM_BINS))
    return Summary(
        num_predictions=counts.total(),
        num_errors=connection.execute(f"select count(*) from {UNLABELLED}").fetchall()[0][0],
        labels=tuple(sorted(labels, key=lambda each: (-each.count, each.label))),
        confidence_bins=confidence_bins,
        median_confidence=_median(confidence_bins),
        decisions=dict(decisions),
        failures=_failures(connection),
        sessions=_sessions(connection, out, price_per_hour),
    )


def _count_said(connection: duckdb.DuckDBPyConnection) -> list[LabelCount]:
    """Rows by label said, and its mean probability over those rows that list it among their best classes."""
    found = connection.execute(
        "select said, count(*), avg(list_filter(top_k, lambda entry: entry.label = said)[1].probability::double) "
        "from (select unnest(labels) as said, top_k from predictions) group by said"
    ).fetchall()
    return [LabelCount(*row) for row in found]


def _median(bins: Sequence[int]) -> float | None:
    seen, half = 0, sum(bins) / 2
    for index, count in enumerate(bins):
        seen += count
        if count and seen >= half:
            return (index + 0.5) / len(bins)
    return None


def _failures(connection: duckdb.DuckDBPyConnection) -> tuple[FailureReason, ...]:
    groups = connection.execute(
        f"""
        with messages as (
            select status, mode(error_stage) as stage, error_message, count(*) as num from {UNLABELLED} group by all
        )
        select status, mode(stage), sum(num)::bigint as total,
            arg_max(struct_pack(message := error_message, num := num), num, ?), count(*)
        from messages group by status order by total desc, status
        """,
        [MESSAGES_SHOWN],
    ).fetchall()
    return tuple(
        FailureReason(status, stage or "", total, tuple((m["message"] or "", m["num"]) for m in messages), num)
        for status, stage, total, messages, num in groups
    )


def _sessions(connection: duckdb.DuckDBPyConnection, out: str, price_per_hour: float | None) -> tuple[Session, ...]:
    sessions = []
    for (run_id,) in connection.execute("select run_id from runs order by predicted_at, run_id").fetchall():
        paths = RunPaths(out, run_id)
        if storage.exists(paths.run_json):
            record = storage.read_json(paths.run_json)
            sessions += [_session(run_id, record, entry, price_per_hour) for entry in record["sessions"]]
    return tuple(sessions)


def _session(run_id: str, record: dict[str, Any], entry: dict[str, Any], price_per_hour: float | None) -> Session:
    machine = record["machine"]
    gpus = f", {machine['gpus']} GPUs" if machine["gpus"] else ""
    own_price = entry["config"].get("report", {}).get("price_per_hour")
    return Session(
        run_id=run_id,
        started_at=entry["started_at"],
        machine=entry["pools"] or f"{machine['cpus']} CPUs{gpus}",
        rows=entry["rows"],
        images_per_s=entry["images_per_s"],
        busy_s=_seconds(entry["engine_ready_at"], entry["finished_at"]) if entry["images_per_s"] else 0.0,
        hours=_seconds(entry["started_at"], entry["finished_at"]) / 3600,
        stage_seconds=entry["stage_seconds"],
        price_per_hour=own_price if price_per_hour is None else price_per_hour,
    )


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
