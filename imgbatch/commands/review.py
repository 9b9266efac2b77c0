"""``imgbatch review``: what a person should look at, and what came of it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from imgbatch.commands.common import console

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")]

app = typer.Typer(help="Have the least certain labels looked at, and take the corrections over.", no_args_is_help=True)


@app.command("export")
def export(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output directory of classify.")],
    path: Annotated[str, typer.Option("-o", "--output", help="File to write.")],
    per_class: Annotated[int | None, typer.Option(min=1, help="At most so many images of each label.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images.")] = None,
    review_format: Annotated[
        Literal["csv", "label-studio"], typer.Option("--format", help="csv, or label-studio: tasks as JSON.")
    ] = "csv",
    model: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", help="Multi-label: the bundle with the thresholds; default: what the stored labels tell."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """List the least certain images first, for a person to say what is true."""
    from imgbatch.core.review import CORRECTED, export_review

    found = export_review(
        out,
        path,
        review_format=review_format,
        per_class=per_class,
        limit=limit,
        model=model,
        overwrite=overwrite,
    )
    console.print(f"{found.num_images:,} images listed in {found.path}", markup=False)
    if found.interface is None:
        console.print(
            f"fill in column {CORRECTED!r}; next: imgbatch review import {path} -o TARGETS --out {out}", markup=False
        )
        return
    console.print(
        "the project's labelling interface (Settings, Labeling Interface, Code):", found.interface, markup=False
    )


@app.command("import")
def import_(
    corrections: Annotated[str, typer.Argument(metavar="CORRECTIONS", help="Filled CSV, or Label Studio's JSON.")],
    path: Annotated[str, typer.Option("-o", "--output", help="Manifest of targets to write (Parquet).")],
    out: Annotated[
        str | None, typer.Option("--out", help="The output reviewed: checks class names, knows the splits.")
    ] = None,
    manifest: Annotated[
        str | None, typer.Option("--manifest", help="Write all of this manifest's rows, with the corrections applied.")
    ] = None,
    accept_empty: Annotated[
        bool, typer.Option("--accept-empty", help="Rows left empty are right as the model labelled them.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn corrections into a manifest of targets, for train and evaluate."""
    from imgbatch.core.targets import import_corrections

    found = import_corrections(
        corrections, path, out=out, manifest=manifest, accept_empty=accept_empty, overwrite=overwrite
    )
    console.print(
        f"{found.num_corrections:,} images looked at, {found.num_changed:,} of them labelled otherwise by the model; "
        f"{found.num_empty:,} left out as empty"
    )
    console.print(f"{found.num_rows:,} rows in {found.path}", markup=False)
