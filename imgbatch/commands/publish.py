"""``imgbatch publish``: finished runs as commits of a table that others read. Needs no cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import AsJson, console, print_json
from imgbatch.commands.output import OutArgument


def publish(
    out: OutArgument,
    delta: Annotated[
        str, typer.Option("--delta", metavar="TABLE", help="The Delta table, a directory or s3://.", show_default=False)
    ],
    run: Annotated[
        str | None, typer.Option("--run", help="Only this run; default: every finished run that is not there yet.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Append the predictions of finished runs to a Delta table, each run in one transaction and only once.

    The table holds a row per image and run. The current ones: select * from TABLE qualify row_number() over
    (partition by image_id order by predicted_at desc, run_id desc, row_id desc) = 1
    """
    from dataclasses import asdict

    from imgbatch.core.delta import publish as publish_runs

    published = publish_runs(out, delta, run)
    if as_json:
        print_json([asdict(entry) for entry in published])
        return
    for entry in published:
        if entry.version is not None:
            said = f"{entry.num_rows:,} predictions, version {entry.version} of {delta}"
        else:
            said = "was there already" if entry.already_there else "has no prediction"
        console.print(f"{entry.run_id}: {said}", markup=False)
