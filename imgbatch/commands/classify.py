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
from imgbatch.errors import ImgbatchError, Status, UsageError

if TYPE_CHECKING:
    from imgbatch.runtime.job import RunResult

_NAMED_RUNS = 5
"""Of those with failed rows."""


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
    run: Annotated[
        str | None,
        typer.Option("--run", help="Run to retry; default: the newest that is no retry; older ones need --run."),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Every run with failed rows whose image no later run has labelled."),
    ] = False,
    config_file: ConfigFile = None,
    engine: Engine = None,
    assignments: Assignments = None,
) -> None:
    """Classify the rows of a finished run that failed, as a child run that keeps their row_ids."""
    from imgbatch.core.failed import find_retried
    from imgbatch.runtime.interrupts import stop_on_signals
    from imgbatch.runtime.job import retry as retry_job

    if every and run is not None:
        raise UsageError(f"--all retries run {run} too, if it needs it; give --all or --run")
    config = read_config(config_file, assignments, {"output.path": out, "classify.engine": engine})
    if every:
        _retry_all(config, out)
        return
    with stop_on_signals() as stop:
        result = retry_job(config, run, messages, stop)
    if result is not None:
        _report(result, config)
        return
    retried = find_retried(out, run).run_id
    console.print(f"nothing to retry in run {retried}: every row of it has a prediction", markup=False)
    if elsewhere := _failed_elsewhere(out):
        command = f"{this_command()} retry {out} --all"
        console.print(f"without a prediction: {elsewhere}; `{command}` tries them again", markup=False)


def _failed_elsewhere(out: str) -> str:
    """How many rows of which runs have no prediction yet."""
    from imgbatch.core.failed import failed_runs

    failed = failed_runs(out)
    named = [f"{len(each.row_ids):,} rows of run {each.run_id}" for each in failed[:_NAMED_RUNS]]
    if others := failed[_NAMED_RUNS:]:
        named.append(f"{sum(len(each.row_ids) for each in others):,} rows of {len(others):,} other runs")
    return ", ".join(named)


def _retry_all(config: Config, out: str) -> None:
    from imgbatch.runtime.interrupts import stop_on_signals
    from imgbatch.runtime.job import iter_retries

    done: list[RunResult] = []
    errors: dict[str, ImgbatchError] = {}
    with stop_on_signals() as stop:
        for each in iter_retries(config, messages, stop):
            if each.result is not None:
                told = f"run {each.run_id}, retried as run {each.result.run_id}: {_counted(each.result)}"
                console.print(told, markup=False)
                report_after_run(each.result.out, each.result.run_id, keep=False, config=config, more_to_do=True)
                done.append(each.result)
            elif each.error is not None:
                messages.print(f"run {each.run_id} is passed over: {each.error}", markup=False, style="yellow")
                errors[each.run_id] = each.error
    if not done and not errors:
        console.print("nothing to retry in any run: every row that failed has a prediction by now", markup=False)
        return
    num_rows, num_errors = sum(result.num_rows for result in done), sum(result.num_errors for result in done)
    console.print(
        f"{len(done):,} runs retried: {num_rows:,} rows, {num_rows - num_errors:,} predictions, {num_errors:,} errors",
        markup=False,
    )
    if errors:
        worst = min(errors.values(), key=lambda error: error.exit_code)  # 1 stands for what nobody foresaw
        raise type(worst)(f"{out}: not retried: {', '.join(errors)}, for the reasons above")


def _report(result: RunResult, config: Config) -> None:
    if result.already_finished:
        console.print(f"run {result.run_id} is finished already, nothing to do", markup=False)
        if result.num_errors:
            command = f"{this_command()} retry {result.out} --run {result.run_id}"
            console.print(f"the rows that failed in it are tried again by `{command}` only", markup=False)
    console.print(_counted(result), markup=False)
    for status, count in result.counts.items():
        if status != Status.OK:
            console.print(f"  {count:>9,} {status}", markup=False)
    console.print(f"labels:  {result.out}/predictions/run_id={result.run_id}/", markup=False)
    report_after_run(result.out, result.run_id, keep=result.already_finished, config=config)
    next_command = f'{this_command()} query {result.out} "select label, count(*) n from predictions group by 1"'
    console.print(f"next:    {next_command}", markup=False)


def _counted(result: RunResult) -> str:
    rate = f", {result.images_per_s:,.1f} images/s" if result.images_per_s else ""
    num_predictions = result.num_rows - result.num_errors
    return f"{result.num_rows:,} rows: {num_predictions:,} predictions, {result.num_errors:,} errors{rate}"
