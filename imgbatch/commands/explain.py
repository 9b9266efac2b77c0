"""``imgbatch explain``: where in an image the model looked."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import console
from imgbatch.errors import UsageError


def explain(
    model: Annotated[str, typer.Option("-m", "--model", help="Model bundle.")],
    manifest: Annotated[str, typer.Option("--manifest", help="Manifest that holds the images.")],
    directory: Annotated[str, typer.Option("-o", "--output", help="Directory for the pictures and index.html.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many images.")] = 12,
    image_id: Annotated[
        list[str] | None, typer.Option("--image-id", help="This image; may be repeated. Default: spread over all.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="OUT", help="The most confident mistakes of this output instead.")
    ] = None,
) -> None:
    """Draw Grad-CAM heat maps over images: for chosen ones, for the worst mistakes, or for a sample."""
    if image_id and out is not None:
        raise UsageError("--image-id, --out: give one of them")
    from imgbatch.report.explanations import write_explanations

    found = write_explanations(
        directory, model=model, manifest=manifest, limit=limit, image_ids=image_id or None, out=out
    )
    for name, error in found.failed.items():
        console.print(f"not shown: {name}: {error.status} ({error.message})", markup=False)
    console.print(f"{found.num_images} images in {found.index}", markup=False)
