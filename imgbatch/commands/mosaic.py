"""``imgbatch mosaic``: labels of tiles back onto the map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from imgbatch.commands.common import console
from imgbatch.config import Config
from imgbatch.errors import UsageError

_MAX_SHOWN = 10


def mosaic(
    config: Config,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output directory of a run on tiles.")],
    directory: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Folder for the rasters.")],
    class_name: Annotated[
        str | None,
        typer.Option(
            "--class", help="Write the probability of this class.", show_default="the likeliest class's index"
        ),
    ] = None,
) -> None:
    """Burn the labels of tiles into a cloud-optimised GeoTIFF per scene; where tiles overlap, their mean decides."""
    from imgbatch.core.bands import require_rasterio

    require_rasterio()
    from imgbatch.core.mosaic import write_mosaics

    tally = write_mosaics(out, directory, class_name=class_name, config=config)
    _print_some(tally.files)
    console.print(f"{len(tally.files):,} rasters of {tally.num_tiles:,} tiles")
    _print_some([f"left out: {failure}" for failure in tally.failed])
    if not tally.files:
        raise UsageError(f"{out}: no raster was written; {len(tally.failed):,} scenes were left out")


def _print_some(lines: Sequence[str]) -> None:
    for line in lines[:_MAX_SHOWN]:
        console.print(line, markup=False)
    if len(lines) > _MAX_SHOWN:
        console.print(f"and {len(lines) - _MAX_SHOWN:,} more")
