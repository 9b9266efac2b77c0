"""``imgbatch repair``: output files that were damaged or lost."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages, read_config


def repair(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output directory.")],
    run: Annotated[
        str | None, typer.Option("--run", help="Run to repair; default: the newest, with its retries.")
    ] = None,
    config_file: ConfigFile = None,
    engine: Annotated[str | None, typer.Option("--engine", help="ray, or local.")] = None,
    assignments: Assignments = None,
) -> None:
    """Write damaged or missing output files anew: from unit files if they were kept, else by classifying their rows."""
    from imgbatch.runtime.repair import repair as repair_output

    config = read_config(config_file, assignments, {"output.path": out, "classify.engine": engine})
    repaired = repair_output(config, run, messages)
    if not repaired:
        console.print("nothing to repair: every file is as files.json records it")
    for done in repaired:
        console.print(
            f"run {done.run_id}: {len(done.files):,} files written anew, {done.num_units_classified:,} units "
            f"classified again, {done.num_strays:,} stray files removed",
            markup=False,
        )
        for path in done.files:
            console.print(f"  {path}", markup=False)
