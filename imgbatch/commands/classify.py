"""``imgbatch classify`` and ``imgbatch retry``: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages, read_config, this_command
from imgbatch.commands.job_options import (
    Embeddings,
    Engine,
    Limit,
    ManifestPath,
    Model,
    NewRun,
    Out,
    SinceRun,
    SkipExisting,
    job_flags,
)
from imgbatch.commands.report import report_after_run
from imgbatch.config import Config
from imgbatch.errors import Status

if TYPE_CHECKING:
    from imgbatch.runtime.job import RunResult


def classify(
    config_file: ConfigFile = None,
    model: Model = None,
    manifest: ManifestPath = None,
    out: Out = None,
    limit: Limit = None,
    engine: Engine = None,
    embeddings: Embeddings = False,
    new_run: NewRun = False,
    skip_existing: SkipExisting = False,
    since_run: SinceRun = None,
    assignments: Assignments = None,
) -> None:
    """Label every row of a manifest exactly once; the same command again continues where it stopped."""
    from imgbatch.runtime.interrupts import stop_on_signals
    from imgbatch.runtime.job import classify as run_job

    flags = job_flags(
        model=model,
        manifest=manifest,
        out=out,
        limit=limit,
        engine=engine,
        embeddings=embeddings,
        new_run=new_run,
        skip_existing=skip_existing,
        since_run=since_run,
    )
    config = read_config(config_file, assignments, flags)
    with stop_on_signals() as stop:
        result = run_job(config, messages, stop)
    _report(result, config)


def retry(
    out: Annotated[str, typer.Argument(help="Output directory.")],
    run: Annotated[str | None, typer.Option("--run", help="Run to retry; default: the newest.")] = None,
    config_file: ConfigFile = None,
    engine: Engine = None,
    assignments: Assignments = None,
) -> None:
    """Classify the rows of a finished run that failed, as a child run that keeps their row_ids."""
    from imgbatch.runtime.interrupts import stop_on_signals
    from imgbatch.runtime.job import retry as retry_job

    config = read_config(config_file, assignments, {"output.path": out, "classify.engine": engine})
    with stop_on_signals() as stop:
        result = retry_job(config, run, messages, stop)
    if result is None:
        console.print("nothing to retry: every row has a prediction")
    else:
        _report(result, config)


def _report(result: RunResult, config: Config) -> None:
    if result.already_finished:
        console.print(f"run {result.run_id} is finished already, nothing to do", markup=False)
        if result.num_errors:
            command = f"{this_command()} retry {result.out} --run {result.run_id}"
            console.print(f"the rows that failed in it are tried again by `{command}` only", markup=False)
    rate = f", {result.images_per_s:,.1f} images/s" if result.images_per_s else ""
    console.print(
        f"{result.num_rows:,} rows: {result.counts.get(Status.OK.value, 0):,} predictions, "
        f"{result.num_errors:,} errors{rate}",
        markup=False,
    )
    for status, count in result.counts.items():
        if status != Status.OK:
            console.print(f"  {count:>9,} {status}", markup=False)
    console.print(f"labels:  {result.out}/predictions/run_id={result.run_id}/", markup=False)
    report_after_run(result.out, result.run_id, keep=result.already_finished, config=config)
    next_command = f'{this_command()} query {result.out} "select label, count(*) n from predictions group by 1"'
    console.print(f"next:    {next_command}", markup=False)
