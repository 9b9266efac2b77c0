"""``OUT/current.json``: which runs, and which of their files, make up what an output says now.

It follows from the finished runs, so it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from imgbatch.core import storage
from imgbatch.core.output_files import EMBEDDINGS, ERRORS, KINDS, PREDICTIONS
from imgbatch.core.runs import RunEntry, list_runs


@dataclass(frozen=True)
class CurrentRun:
    """A finished run and its output files, relative to the output directory."""

    run_id: str
    parent: str | None
    predicted_at: str
    model_id: str
    unique_ids: bool
    """Whether no image_id stands twice in the run."""
    num_predictions: int
    num_errors: int
    partition_types: dict[str, str]
    """DuckDB type of each partition column, so that no reader guesses it from the directory names."""
    predictions: list[str]
    errors: list[str]
    embeddings: list[str] = field(default_factory=list)


def location(out: str) -> str:
    return storage.join(out, "current.json")


def update(out: str) -> None:
    """Write current.json anew from the finished runs, oldest first, until no run has finished meanwhile.

    Of two commands that end together, the last one to write looks again after the other's run was there.
    """
    runs = _finished_runs(out)
    while True:
        storage.write_json(location(out), {"runs": [asdict(_entry(run)) for run in runs]})
        written, runs = runs, _finished_runs(out)
        if _ids(runs) == _ids(written):
            return


def is_up_to_date(out: str) -> bool:
    """Whether current.json holds the runs that have finished; it may not, where a command was killed at its end."""
    return _ids(load(out)) == _ids(_finished_runs(out))


def _finished_runs(out: str) -> list[RunEntry]:
    return [run for run in list_runs(out) if run.finished]


def _ids(runs: Sequence[RunEntry | CurrentRun]) -> list[str]:
    return [run.run_id for run in runs]


def load(out: str) -> list[CurrentRun]:
    """The finished runs, oldest first; empty where there is none."""
    if not storage.exists(location(out)):
        return []
    return [CurrentRun(**run) for run in storage.read_json(location(out))["runs"]]


def load_finished(out: str) -> list[CurrentRun]:
    """As :func:`load`, with the runs whose command was killed before it wrote them down; writes nothing."""
    return load(out) if is_up_to_date(out) else [_entry(run) for run in _finished_runs(out)]


def _entry(run: RunEntry) -> CurrentRun:
    written = storage.read_json(run.paths.files)
    files = {kind: [f for f in written["files"] if f["kind"] == kind] for kind in KINDS}
    return CurrentRun(
        run_id=run.run_id,
        parent=run.parent,
        predicted_at=run.plan["predicted_at"],
        model_id=run.plan["fields"]["model"],
        unique_ids=run.plan["fields"]["input.duplicates"] == "error",
        num_predictions=sum(file["rows"] for file in files[PREDICTIONS]),
        num_errors=sum(file["rows"] for file in files[ERRORS]),
        partition_types=written["partition_types"],
        predictions=[file["path"] for file in files[PREDICTIONS]],
        errors=[file["path"] for file in files[ERRORS]],
        embeddings=[file["path"] for file in files[EMBEDDINGS]],
    )
