"""The options of a job: the same for ``classify``, which runs it, and for ``plan``, which looks ahead."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Option("-m", "--model", help="Model bundle.")]
ManifestPath = Annotated[str | None, typer.Option("--manifest", help="Parquet manifest.")]
Out = Annotated[str | None, typer.Option("-o", "--out", help="Output directory; may hold many runs.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first so many rows.")]
Engine = Annotated[str | None, typer.Option("--engine", help="ray, or local: a plain loop in this process.")]
Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings",
        help="Also write what the last layer sees of each image; the model then runs in torch, without variants.",
    ),
]
NewRun = Annotated[bool, typer.Option("--new-run", help="A second run although this one has finished.")]
SkipExisting = Annotated[
    bool,
    typer.Option(
        "--skip-existing",
        help="Only rows that this model has not labelled in OUT, without broken images that did not change.",
    ),
]
SinceRun = Annotated[
    str | None, typer.Option("--since-run", help="As --skip-existing, of labels of this run and later ones.")
]


def job_flags(
    *,
    model: str | None,
    manifest: str | None,
    out: str | None,
    limit: int | None,
    engine: str | None,
    embeddings: bool,
    new_run: bool,
    skip_existing: bool,
    since_run: str | None,
) -> dict[str, Any]:
    """Dotted keys of the configuration to the values given; none: not given, as :func:`load_config` takes them."""
    return {
        "model.path": model,
        "input.manifest": manifest,
        "output.path": out,
        "input.limit": limit,
        "classify.engine": engine,
        "output.embeddings": embeddings or None,
        "run.new_run": new_run or None,
        "input.skip_existing": skip_existing or None,
        "input.since_run": since_run,
    }
