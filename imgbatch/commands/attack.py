"""``imgbatch attack``: what is left of a model's accuracy when images are attacked or corrupted."""

from __future__ import annotations

from typing import Annotated

import typer

from imgbatch.commands.common import AsJson, console, messages, print_json, print_table
from imgbatch.commands.evaluate import OTHER_SPLITS, warn_of_train
from imgbatch.config import Config
from imgbatch.errors import UsageError

CURVES_FILE = "robustness.png"


def attack(
    config: Config,
    model: Annotated[str, typer.Option("-m", "--model", help="Model bundle.")],
    manifest: Annotated[str, typer.Option("--manifest", help="Manifest with images and their targets.")],
    directory: Annotated[str, typer.Option("-o", "--output", help="Directory for the table and the curves.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many images, spread over the manifest.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and of where PGD begins.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure accuracy under FGSM and PGD attacks and under noise, blur, JPEG, brightness and contrast."""
    from dataclasses import asdict

    from imgbatch.core import storage
    from imgbatch.core.robustness import TABLE_FILE, measure_robustness
    from imgbatch.report.plots import robustness_curves

    result = measure_robustness(model, manifest, directory, limit=limit, seed=seed, config=config)
    written = [storage.join(directory, TABLE_FILE)]
    try:
        storage.replace(storage.join(directory, CURVES_FILE), robustness_curves(result.rows))
        written.append(storage.join(directory, CURVES_FILE))
    except UsageError as error:
        messages.print(f"no curves: {error}", markup=False)
    if as_json:
        print_json([asdict(row) for row in result.rows])
        return
    clean, *perturbed = result.rows
    console.print(f"{clean.images:,} images, {clean.accuracy:.1%} right ({clean.low:.1%} to {clean.high:.1%})")
    if result.num_failed:
        console.print(f"{result.num_failed:,} images could not be decoded and are left out")
    warn_of_train(result.of_train_split, None, OTHER_SPLITS)
    by_name = {
        row.perturbation: [each for each in perturbed if each.perturbation == row.perturbation] for row in perturbed
    }
    severities = [str(row.severity) for row in next(iter(by_name.values()))]
    print_table(
        ["accuracy at severity", *severities],
        [[name, *(f"{row.accuracy:.1%}" for row in rows)] for name, rows in by_name.items()],
    )
    console.print(f"written to {', '.join(written)}", markup=False)
