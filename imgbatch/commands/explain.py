"""``imgbatch explain``: where in an image the model looked."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import console
from imgbatch.config import Config
from imgbatch.errors import UsageError


def explain(
    config: Config,
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT",
            help="Output directory of classify: its worst mistakes, for its report.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Model bundle; default: the one that OUT was labelled with.")
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", help="Manifest with the images; default: the one classified last into OUT."),
    ] = None,
    directory: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Directory for the pictures and index.html; default: OUT's newest run."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, unless --image-id names them.")] = 12,
    image_id: Annotated[
        list[str] | None,
        typer.Option(
            "--image-id", help="This image; may be repeated. Default: OUT's worst mistakes; no OUT: a sample."
        ),
    ] = None,
) -> None:
    """Draw Grad-CAM heat maps over the worst mistakes of an output, or over images of a manifest."""
    from imgbatch.report.explain import explain_images, explain_output

    image_ids = image_id or ()
    if out is not None:
        found, failed = explain_output(
            out,
            model=model,
            manifest=manifest,
            directory=directory,
            limit=limit,
            image_ids=image_ids,
            config=config,
        )
    elif model is None or manifest is None or directory is None:
        raise UsageError("explain: name an output directory, or --model, --manifest and --output")
    else:
        found, failed = explain_images(
            directory, model=model, manifest=manifest, limit=limit, image_ids=image_ids, config=config
        )
    for name, error in failed.items():
        console.print(f"not shown: {name}: {error.status} ({error.message})", markup=False)
    count = len(found.images)
    console.print(f"{count} image{'s' if count != 1 else ''} in {found.index}", markup=False)
    if out is not None and directory is None:
        console.print(f"next: imgbatch report {out} shows them", markup=False)
