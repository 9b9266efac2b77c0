"""``imgbatch demo``: the whole job on drawn images."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from imgbatch.commands.common import Assignments, ConfigFile, console, messages
from imgbatch.commands.report import report_after_run
from imgbatch.config import load_config


def demo(
    out: Annotated[str, typer.Option("-o", "--out", help="Directory for images, manifest, model and labels.")],
    images: Annotated[int, typer.Option("--images", min=30, help="How many images to draw.")] = 3000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another seed draws other images.")] = 0,
    config_file: ConfigFile = None,
    assignments: Assignments = None,
) -> None:
    """Draw a collection, train a small network, label every image, verify, and show what came out."""
    from rich.table import Table

    from imgbatch.demo import LABELS_QUERY, run_demo

    config = load_config(config_file, assignments or (), {"output.path": out})
    result = run_demo(config, num_images=images, seed=seed, console=messages)
    paths = result.paths
    console.print(f'\nimgbatch query {paths.labels} "{LABELS_QUERY}"\n', markup=False)
    table = Table(*result.columns, box=None)
    for row in result.rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row))
    console.print(table)
    console.print(f"\naccuracy on the test split: {result.accuracy:.3f}")
    console.print(f"{result.run.num_rows:,} rows, {result.run.num_errors:,} without a prediction:")
    for uri, status, message in result.errors:
        console.print(f"  {status:<14} {os.path.relpath(uri, paths.images)}: {message}", markup=False)
    console.print("\nwhere things are:")
    for what, path in [
        ("images", paths.images),
        ("manifest", paths.manifest),
        ("model", paths.model),
        ("labels", paths.labels / "predictions"),
        ("errors", paths.labels / "errors"),
    ]:
        console.print(f"  {what:<9} {path}", markup=False)
    report_after_run(str(paths.labels), result.run.run_id, keep=True)
    console.print(f"\ncheck it again: imgbatch verify {paths.labels}", markup=False)
