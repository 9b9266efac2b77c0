"""``imgbatch demo``: the whole job on drawn images."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages, read_config, this_command
from imgbatch.commands.report import report_after_run
from imgbatch.config import Config

if TYPE_CHECKING:
    from imgbatch.demo_steps import Labelled


def demo(
    out: Annotated[str, typer.Option("-o", "--out", help="Directory for images, manifest, model and labels.")],
    images: Annotated[int, typer.Option("--images", min=30, help="How many images to draw.")] = 3000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other images.")] = 0,
    satellite: Annotated[
        bool, typer.Option("--satellite", help="Scenes instead: tiles, four bands, labels on the map.")
    ] = False,
    scenes: Annotated[int, typer.Option("--scenes", min=3, help="With --satellite: how many scenes to draw.")] = 8,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Draw a collection, train a small network, label every image, verify, and show what came out."""
    if satellite:
        _satellite_demo(read_config(config_file, assignments, {"output.path": out}), scenes, seed)
        return
    from imgbatch.demo import LABELS_QUERY, run_demo

    config = read_config(config_file, assignments, {"output.path": out})
    result = run_demo(config, num_images=images, seed=seed, console=messages)
    paths = result.paths
    errors = [(os.path.relpath(uri, paths.images), status, message) for uri, status, message in result.errors]
    shown = replace(result, errors=errors)
    places = {"images": paths.images, "manifest": paths.manifest, "model": paths.model}
    places |= {"labels": paths.labels / "predictions", "errors": paths.labels / "errors"}
    _show(shown, LABELS_QUERY, {"on the test split": result.accuracy}, "rows", paths.labels, places)


def _satellite_demo(config: Config, num_scenes: int, seed: int) -> None:
    from imgbatch.core.bands import require_rasterio

    require_rasterio()
    from imgbatch.satellite_demo import COVER_QUERY, run_satellite_demo

    result = run_satellite_demo(config, num_scenes=num_scenes, seed=seed, console=messages)
    paths = result.paths
    accuracies = {
        "on the tiles of the test scenes": result.accuracy,
        "on the pixels of the test scenes' maps": result.pixel_accuracy,
    }
    places = {"scenes": paths.collection / "scenes", "tiles": paths.tiles, "model": paths.model}
    places |= {"labels": paths.labels / "predictions", "maps": paths.mosaic}
    _show(result, COVER_QUERY, accuracies, "tiles", paths.labels, places)


def _show(
    result: Labelled,
    query: str,
    accuracies: dict[str, float],
    unit: str,
    labels: Path,
    places: dict[str, Path],
) -> None:
    console.print(f'\n{this_command()} query {labels} "{query}"\n', markup=False)
    _print_answer(result.columns, result.rows)
    console.print()
    for where, accuracy in accuracies.items():
        console.print(f"accuracy {where}: {accuracy:.3f}")
    console.print(f"{result.run.num_rows:,} {unit}, {result.run.num_errors:,} without a prediction:")
    for name, status, message in result.errors:
        console.print(f"  {status:<14} {name}: {message}", markup=False)
    console.print("\nwhere things are:")
    for what, path in places.items():
        console.print(f"  {what:<9} {path}", markup=False)
    report_after_run(str(labels), result.run.run_id, keep=True)
    console.print(f"\ncheck it again: {this_command()} verify {labels}", markup=False)


def _print_answer(columns: list[str], rows: list[tuple[Any, ...]]) -> None:
    from rich.table import Table

    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
