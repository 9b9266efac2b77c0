"""``imgbatch manifest``: list images into a manifest, and check one."""

from __future__ import annotations

from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from imgbatch.commands.common import AsJson, console, print_json, print_table
from imgbatch.config import Config
from imgbatch.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from imgbatch.core.manifest_check import CheckResult, SampledRow
    from imgbatch.core.tally import Tally

app = typer.Typer(help="Build and check manifests.", no_args_is_help=True)

_MAX_TARGETS_SHOWN = 30
_MAX_SAMPLE_SHOWN = 10
_MAX_ID_CHARS = 26


class From(StrEnum):
    FOLDER = "folder"


class TargetsFrom(StrEnum):
    FOLDER = "folder"
    CLS = "cls"


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Folders, globs, images, tar shards, CSV or TSV lists, Parquet; local or s3://.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="MANIFEST", help="The Parquet file to write.", show_default=False)
    ],
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="NEW=OLD", help="Column of a list or Parquet under another name, like uri=file; repeat."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where relative uris of lists start; the list's own folder if not given.")
    ] = None,
    targets_separator: Annotated[
        str | None, typer.Option(help="Splits the column 'targets' into several classes, like '|'.")
    ] = None,
    targets_from: Annotated[
        TargetsFrom | None,
        typer.Option(help="folder: the class is the parent folder's name; cls: of shards, what KEY.cls says."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=SHARE,...", help="Draw splits, like train=0.8,validation=0.1,test=0.1; more images move none."
        ),
    ] = None,
    split_from: Annotated[
        From | None, typer.Option(help="folder: the split is the folder train, validation, val, valid or test.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other splits.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the manifest if it is there.")] = False,
) -> None:
    """List images into a manifest: one Parquet row per image.

    Columns of lists stay strings; an empty cell is null. Hidden files are skipped.
    """
    from imgbatch.core.manifest_build import BuildOptions, build_manifest, parse_split_shares
    from imgbatch.core.manifest_sources import TableOptions

    options = BuildOptions(
        table=TableOptions(
            columns=_parse_columns(column or []),
            root=root,
            targets_separator=targets_separator,
            targets_from_cls=targets_from is TargetsFrom.CLS,
        ),
        targets_from="folder" if targets_from is TargetsFrom.FOLDER else None,
        split_shares=parse_split_shares(split) if split is not None else None,
        split_from="folder" if split_from else None,
        seed=seed,
    )
    tally = build_manifest(sources, output, options, overwrite=overwrite)
    console.print(f"{output}: {tally.num_rows:,} images", markup=False)
    _print_tally(tally)


@app.command()
def check(
    config: Config,
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="A Parquet file or a directory of them.", show_default=False)
    ],
    sample: Annotated[int, typer.Option(min=0, help="Images to read and decode; 0: none.")] = 64,
    seed: Annotated[int, typer.Option(help="Another seed takes another sample.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check a manifest before a long run: columns, nulls, duplicates, and whether a sample of its images can be read.

    Exit code 5 if a problem was found.
    """
    from imgbatch.core.manifest_check import check_manifest

    result = check_manifest(manifest, sample_rows=sample, seed=seed, config=config)
    if as_json:
        print_json(result.to_dict())
    else:
        _print_check(result)
    if result.problems:
        count = len(result.problems)
        raise CheckFailed(
            f"manifest {manifest}: {count} problem{'s' if count > 1 else ''}; first: {result.problems[0]}"
        )


@app.command()
def tile(
    config: Config,
    scenes: Annotated[
        list[str],
        typer.Argument(metavar="SCENE...", help="GeoTIFFs: folders, globs, files, lists of them.", show_default=False),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="MANIFEST", help="The Parquet file to write.", show_default=False)
    ],
    size: Annotated[int, typer.Option(min=1, help="Side of a tile, px.")] = 256,
    overlap: Annotated[float, typer.Option(help="Share of a tile's side that the next one shows too.")] = 0.0,
    min_valid: Annotated[
        float, typer.Option(help="Share of a tile that must hold data, where overviews tell; else geo.max_nodata does.")
    ] = 0.0,
    bands: Annotated[
        str | None, typer.Option(metavar="BAND,...", help="Bands from 1, like 4,3,2.", show_default="the model's")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="GEOJSON", help="Polygons or points whose class becomes the tiles' target.")
    ] = None,
    label_field: Annotated[str, typer.Option(help="The property of a feature that names its class.")] = "class",
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME=SHARE,...", help="Draw splits by scene, like train=0.8,validation=0.1,test=0.1."),
    ] = None,
    split_from: Annotated[
        From | None, typer.Option(help="folder: the split is the folder train, validation, val, valid or test.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed draws other splits.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the manifest if it is there.")] = False,
) -> None:
    """Cut scenes into tiles: one manifest row per tile, with window, CRS and geometry (GeoParquet).

    Only the headers of the scenes are read, and overviews where --min-valid asks what is missing.
    """
    from imgbatch.core.bands import require_rasterio

    require_rasterio()
    from imgbatch.core.manifest_build import parse_split_shares
    from imgbatch.core.tiling import TileOptions, tile_scenes
    from imgbatch.core.vector_labels import VectorLabels

    options = TileOptions(
        size=size,
        overlap=overlap,
        min_valid=min_valid,
        bands=_parse_bands(bands) if bands is not None else None,
        split_shares=parse_split_shares(split) if split is not None else None,
        split_from="folder" if split_from else None,
        seed=seed,
        labels=VectorLabels(labels, label_field) if labels is not None else None,
    )
    tally = tile_scenes(scenes, output, options, overwrite=overwrite, config=config)
    left_out = f", {tally.num_left_out:,} left out (--min-valid)" if tally.num_left_out else ""
    console.print(f"{output}: {tally.num_tiles:,} tiles of {tally.num_scenes:,} scenes{left_out}", markup=False)
    for failure in tally.failed[:_MAX_SAMPLE_SHOWN]:
        console.print(f"cannot be opened: {failure}", markup=False)
    if len(tally.failed) > _MAX_SAMPLE_SHOWN:
        console.print(f"and {len(tally.failed) - _MAX_SAMPLE_SHOWN:,} more")


@app.command()
def stats(
    config: Config,
    manifest: Annotated[
        str, typer.Argument(metavar="MANIFEST", help="A Parquet file or a directory of them.", show_default=False)
    ],
    bands: Annotated[
        str | None, typer.Option(metavar="BAND,...", help="Bands from 1, like 4,3,2.", show_default="all but alpha")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Tiles to read.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Print what the bands of rasters hold over a sample of the tiles: range, percentiles, mean, missing values.

    More than 64 tiles are read on Ray, unless classify.engine is local. Training takes the same statistics itself
    (geo.bands, geo.stretch) and stores them in the model.
    """
    import numpy as np

    from imgbatch.core.band_statistics import sample_bands
    from imgbatch.core.manifest import open_manifest
    from imgbatch.runtime.parts import map_parts_of

    opened = open_manifest(manifest)
    wanted = _parse_bands(bands) if bands is not None else None
    rows = np.arange(opened.num_rows)
    sampled = sample_bands(opened, rows, wanted, num_tiles=sample, config=config, map_parts=map_parts_of(config))
    described = sampled.describe()
    if as_json:
        print_json({"tiles": sampled.num_tiles, "failed": list(sampled.failed), "bands": described})
        return
    print_table(
        list(described[0]),
        [["" if number is None else f"{number:,.6g}" for number in row.values()] for row in described],
    )
    console.print(f"{sampled.num_tiles:,} tiles read, {len(sampled.failed):,} not", markup=False)
    for failure in sampled.failed[:_MAX_SAMPLE_SHOWN]:
        console.print(f"  {failure}", markup=False)


def _parse_bands(text: str) -> tuple[int, ...]:
    try:
        bands = tuple(int(band) for band in text.split(","))
    except ValueError as error:
        raise UsageError(f"--bands {text}: expected numbers from 1, like 4,3,2") from error
    if min(bands) < 1:
        raise UsageError(f"--bands {text}: bands are counted from 1")
    return bands


def _parse_columns(assignments: list[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for assignment in assignments:
        new, _, old = assignment.partition("=")
        if not new or not old or new in columns:
            raise UsageError(f"--column {assignment}: expected NEW=OLD, each NEW once, like uri=file")
        if old in columns.values():
            raise UsageError(f"--column {assignment}: column {old!r} is used twice")
        columns[new] = old
    return columns


def _print_tally(tally: Tally) -> None:
    """A row per class, a column per split, and the sums."""
    if not tally.has_targets and not tally.by_split:
        return
    splits = tally.splits()
    table = Table(box=SIMPLE)
    table.add_column("class" if tally.has_targets else "")
    for heading in [*(str(split or "(none)") for split in splits), "all"]:
        table.add_column(Text(heading), justify="right")
    targets = tally.targets()
    for target, rows in islice(targets.items(), _MAX_TARGETS_SHOWN):
        counts = [*(tally.by_target[target, split] for split in splits), rows]
        table.add_row(Text(target or "(none)"), *(f"{count:,}" for count in counts))
    if len(targets) > _MAX_TARGETS_SHOWN:
        at_least = "at least " if tally.num_not_listed else ""
        table.add_row(f"and {at_least}{len(targets) - _MAX_TARGETS_SHOWN:,} more classes")
    table.add_row("images", *(f"{count:,}" for count in [*(tally.by_split[split] for split in splits), tally.num_rows]))
    console.print(table)


def _print_check(result: CheckResult) -> None:
    console.print(Text(f"{result.path}: {result.num_rows:,} rows, {result.num_files:,} file(s)"))
    columns = Table("column", "type", "nulls", box=SIMPLE)
    for name, arrow_type in result.columns.items():
        columns.add_row(Text(name), Text(arrow_type), f"{result.nulls.get(name, 0):,}")
    console.print(columns)
    _print_tally(result.tally)
    if result.sample:
        readable = sum(row.error is None for row in result.sample)
        console.print(f"sample: {readable} of {len(result.sample)} images can be read")
        console.print(_sample_table(result.sample))
    for problem in result.problems:
        console.print(Text(f"problem: {problem}", style="red"))
    if not result.problems:
        console.print("no problem found", style="green")


def _sample_table(sample: list[SampledRow]) -> Table:
    """The rows that failed, then others, as far as the table goes."""
    table = Table("row", "image_id", "class", "split", "size", "status", box=SIMPLE)
    for row in sorted(sample, key=lambda row: row.error is None)[:_MAX_SAMPLE_SHOWN]:
        size = "" if row.error else f"{row.width} x {row.height}"
        status = f"{row.error.status}: {row.error.message}" if row.error else "OK"
        # The end of a path tells images apart.
        image_id = row.image_id or ""
        shown_id = image_id if len(image_id) <= _MAX_ID_CHARS else "…" + image_id[-_MAX_ID_CHARS:]
        cells = [str(row.row_id), shown_id, row.target or "", row.split or "", size, status]
        table.add_row(*(Text(cell) for cell in cells))
    return table
