"""``imgbatch plan``: what a classification would be, before a night is spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgbatch.commands.common import (
    AsJson,
    Assignments,
    ConfigFile,
    console,
    messages,
    print_json,
    print_table,
    read_config,
)
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

if TYPE_CHECKING:
    from imgbatch.runtime.forecast import Forecast

_STATES = {"new": "a new run", "unfinished": "continues an unfinished run", "finished": "finished already"}


def plan(
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
    as_json: AsJson = False,
    assignments: Assignments = None,
) -> None:
    """Show what would run: rows, units, pools, sampled speed, time, size, cost, warnings. Writes nothing."""
    from imgbatch.runtime.forecast import forecast, to_json

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
    result = forecast(read_config(config_file, assignments, flags))
    if as_json:
        print_json(to_json(result))
        return
    print_table(("", ""), _rows(result))
    for warning in result.warnings:
        messages.print(f"warning: {warning}", markup=False, style="yellow")
    console.print("classify with the same options runs it", markup=False)


def _rows(result: Forecast) -> list[tuple[str, str]]:
    done = f", {result.units_done:,} units done" if result.units_done else ""
    rows = [
        ("run", f"{result.run_id}: {_STATES[result.state]}{done}"),
        ("rows", f"{result.num_rows:,} in {result.num_units:,} units of {result.unit_rows:,}"),
        ("pools", f"{result.pools}, {result.device}"),
        ("model", result.backend.removeprefix("the model ")),
        ("images", result.preprocess),
    ]
    for stage, ms in result.stage_ms.items():
        rows.append((stage, f"{ms:,.2f} ms an image in one process ({result.sampled} sampled)"))
    pools = ", ".join(f"{stage} {rate:,.0f}" for stage, rate in result.stage_images_per_s.items())
    if result.images_per_s:
        rows.append(("images/s", f"{result.images_per_s:,.0f}, limit: {result.limit} ({pools})"))
    elif pools:
        rows.append(("images/s", f"unknown ({pools})"))
    if result.hours is not None:
        rows.append(("time", _duration(result.hours)))
    rows.append(("output", f"{result.output_mb:,.0f} MB before compression"))
    rows.append(("memory", result.memory))
    if result.price_per_hour is not None:
        whole = f", {result.cost:,.2f} in all" if result.cost is not None else ""
        rows.append(("cost", f"{result.price_per_hour:,.2f} an hour{whole}: nodes only, without requests"))
    return rows


def _duration(hours: float) -> str:
    seconds = round(hours * 3600)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} (h:mm:ss)"
