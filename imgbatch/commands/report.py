"""``imgbatch report``: one page on an output; and the page that ``classify`` leaves behind."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages, read_config
from imgbatch.config import Config
from imgbatch.errors import normalise_message

_DUCKDB_INTERRUPTED = "Query interrupted"
"""What it makes of a ``KeyboardInterrupt``, in a ``RuntimeError``."""


def report(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output directory of classify.")],
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", help="Manifest with the targets; default: those of the manifest classified."),
    ] = None,
    file: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to write; default: report.html of the newest run.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Measure only rows of this split.")] = None,
    slice_by: Annotated[
        list[str] | None,
        typer.Option(
            "--slice-by", metavar="COLUMN", help="Manifest column to compare; default: those with few values."
        ),
    ] = None,
    thumbnails: Annotated[
        int, typer.Option("--thumbnails", min=0, max=1000, help="Images on the page, at most; 0: none.")
    ] = 150,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Write one self-contained HTML page: what was labelled, how fast, what failed and why, how good."""
    from imgbatch.report.page import write_report

    config = read_config(config_file, assignments)
    written = write_report(
        out,
        file=file,
        manifest=manifest,
        split=split,
        slice_by=slice_by or (),
        max_thumbnails=thumbnails,
        price_per_hour=config.report.price_per_hour,
        config=config,
    )
    console.print(written, markup=False)


def report_after_run(
    out: str, run_id: str, *, keep: bool, config: Config | None = None, more_to_do: bool = False
) -> None:
    """Write the page on a finished run and its retries; whatever goes wrong is one line and never the run's fault.

    Args:
        keep: leave a page alone that is there already.
        config: where images may lie, unless the run's command said; none: as it said.
        more_to_do: whether an interrupt is to end the command, rather than the page alone.
    """
    from imgbatch.core import storage
    from imgbatch.core.runs import RunPaths
    from imgbatch.report.page import write_report
    from imgbatch.runtime.reporter import Reporter

    try:
        page = RunPaths(out, run_id).report
        if not (keep and storage.exists(page)):
            write_report(out, run_id=run_id, file=page, config=config)
        console.print(f"report:  {page}", markup=False)
    except (Exception, KeyboardInterrupt) as error:
        is_interrupt = isinstance(error, KeyboardInterrupt) or str(error) == _DUCKDB_INTERRUPTED
        if is_interrupt and more_to_do:
            raise KeyboardInterrupt from error
        why = "interrupted; the run is finished" if is_interrupt else normalise_message(error)
        as_json = config is not None and config.run.log_format == "json"
        Reporter(messages, run_id=run_id, as_json=as_json).say(f"no report: {why}")
