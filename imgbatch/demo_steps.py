"""What the demos have in common once there is a manifest: train -> classify -> verify -> ask.

Every step leaves its product below the output directory and is skipped where that is there already, so a demo resumes
like the job it shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.architectures import SIMPLE_CNN
from imgbatch.core.verify import verify
from imgbatch.core.views import open_views
from imgbatch.errors import CheckFailed, UsageError
from imgbatch.runtime.job import RunResult, classify
from imgbatch.runtime.train import train

TRAIN = {"arch": SIMPLE_CNN, "method": "from_scratch", "learning_rate": 1e-2}
"""Section ``train`` of a network small enough to learn in a minute or two on two cores."""

_ACCURACY_QUERY = "select avg((label = target)::int) from predictions where split = 'test'"

Sections = Mapping[str, Mapping[str, Any]]
"""Changes to a configuration: keys and values by section."""


@dataclass(frozen=True, kw_only=True)
class DemoJob:
    """What a demo trains on and labels."""

    manifest: Path
    model: Path
    labels: Path
    training: Sections
    """How it trains."""
    classifying: Sections
    query: str
    """That it shows the answer to."""
    unit: str
    """One row, in a word or two."""
    shown_id: str
    """The column that names a row."""


@dataclass(frozen=True)
class Labelled:
    """What came out."""

    run: RunResult
    accuracy: float
    """Share of the test split's predictions that are right, 0 to 1."""
    columns: list[str]
    rows: list[tuple[Any, ...]]
    """The answer to the demo's query."""
    errors: list[tuple[str, str, str]]
    """Name, status and message of every row without a prediction."""


def settle_demo(out: Path, settings: dict[str, int]) -> None:
    """Claim the output directory for these settings; raises :class:`UsageError` if it holds a demo of others."""
    stored = str(out / "demo.json")
    storage.create_if_absent(stored, storage.json_bytes(settings))
    if storage.read_json(stored) != settings:
        raise UsageError(f"output {out}: holds a demo of other images; remove it or give another -o")


def train_and_label(config: Config, job: DemoJob, console: Console) -> Labelled:
    """Train, classify, verify and ask.

    Raises:
        CheckFailed: the job's output did not pass verification.
    """
    paths: Sections = {"input": {"manifest": str(job.manifest)}}
    training = {**paths, **job.training, "output": {"path": str(job.model)}}
    classifying = {**paths, **job.classifying, "model": {"path": str(job.model)}}
    classifying["output"] = {**classifying.get("output", {}), "path": str(job.labels)}
    with _session(config):
        with demo_step(console, f"training {SIMPLE_CNN} on every {job.unit} of the train split"):
            train(_changed(config, training), console)
        with demo_step(console, f"classifying every {job.unit}"):
            run = classify(_changed(config, classifying), console)
            if run.already_finished:
                console.print(f"run {run.run_id} is finished already, nothing to do", markup=False)
    with demo_step(console, f"verifying that every {job.unit} came out exactly once"):
        _verify(job.labels)
    errors_query = f"select {job.shown_id}, status, error_message from errors order by {job.shown_id}"
    with closing(open_views(str(job.labels))) as views:
        answer = views.execute(job.query)
        columns, rows = [column[0] for column in answer.description or ()], answer.fetchall()
        [(accuracy,)] = views.execute(_ACCURACY_QUERY).fetchall()
        errors = views.execute(errors_query).fetchall()
    return Labelled(run, accuracy, columns, rows, errors)


@contextmanager
def demo_step(console: Console, what: str) -> Iterator[None]:
    """Say what is being done, and how long it took."""
    console.print(f"{what} …", markup=False)
    started = time.monotonic()
    yield
    console.print(f"… {time.monotonic() - started:.1f} s", markup=False)


def _session(config: Config) -> AbstractContextManager[object]:
    """One Ray for training and classifying: starting a second would cost the seconds twice."""
    if config.classify.engine == "local":
        return nullcontext()
    from imgbatch.runtime.session import ray_session

    return ray_session(config)


def _verify(labels: Path) -> None:
    checks = verify(str(labels))
    if not checks.ok:
        failed = next(check for check in checks.checks if not check.ok)
        raise CheckFailed(f"{labels}: {failed.name}: {failed.detail}")


def _changed(config: Config, sections: Sections) -> Config:
    changed = {name: getattr(config, name).model_copy(update=dict(keys)) for name, keys in sections.items()}
    return config.model_copy(update=changed)
