"""``imgbatch evaluate``: metrics from stored predictions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from imgbatch.commands.common import AsJson, console, messages, print_json

Out = Annotated[str, typer.Argument(metavar="OUT", help="An output of classify.", show_default=False)]
Targets = Annotated[
    str | None,
    typer.Option("--manifest", help="Parquet with image_id and target; none: the targets that were classified along."),
]
Split = Annotated[str | None, typer.Option("--split", help="Only rows of this split.")]


def evaluate(
    out: Out,
    manifest: Targets = None,
    directory: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to write; none: the run's directory.")
    ] = None,
    split: Split = None,
    slice_by: Annotated[
        list[str] | None, typer.Option("--slice-by", metavar="COLUMN", help="Manifest column; may be repeated.")
    ] = None,
    target_precision: Annotated[
        float, typer.Option(min=0, max=1, help="Multi-label: of each label's operating point at_precision.")
    ] = 0.95,
    as_json: AsJson = False,
) -> None:
    """Measure stored predictions against targets, without classifying again."""
    from imgbatch.core.evaluate import evaluate as run

    result = run(
        out,
        manifest=manifest,
        directory=directory,
        split=split,
        slice_by=slice_by or (),
        target_precision=target_precision,
    )
    if as_json:
        print_json(result.metrics)
