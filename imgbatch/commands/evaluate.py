"""``imgbatch evaluate``, ``calibrate`` and ``compare``: what stored predictions say, without classifying again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from imgbatch.commands.common import AsJson, console, messages, print_json, table_console
from imgbatch.config import Config
from imgbatch.errors import UsageError

OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="Output directory of classify.")]
TargetsOption = Annotated[
    str | None,
    typer.Option("--manifest", help="Manifest with the targets; default: those of the manifest that was classified."),
]
SplitOption = Annotated[str | None, typer.Option("--split", help="Only rows of this split.")]

SHOWN = 10
"""Rows of a table in the summary; the files hold all."""
OTHER_SPLITS = "of a manifest with enough others, those alone are measured"
"""What :func:`warn_of_train` advises where no ``--split`` is taken."""


def evaluate(
    out: OutArgument,
    manifest: TargetsOption = None,
    directory: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to write; default: the run's directory.")
    ] = None,
    split: SplitOption = None,
    slice_by: Annotated[
        list[str] | None,
        typer.Option("--slice-by", metavar="COLUMN", help="Manifest column to compare the values of; may be repeated."),
    ] = None,
    target_precision: Annotated[
        float, typer.Option(min=0, max=1, help="Multi-label: the precision that each label's threshold is told for.")
    ] = 0.95,
    as_json: AsJson = False,
) -> None:
    """Measure stored predictions against targets: metrics, slices, mistakes, likely label errors."""
    from imgbatch.core import evaluate as core

    result = core.evaluate(
        out,
        manifest=manifest,
        directory=directory,
        split=split,
        slice_by=slice_by or (),
        target_precision=target_precision,
    )
    if as_json:
        print_json(result.metrics)
        return
    rows = result.metrics["rows"]
    _print_rows(rows, split)
    warn_of_train(rows["of_train_split"], split, "--split test measures those that it has not seen")
    _print_figures(result.metrics)
    worst = sorted(result.metrics["per_class"], key=lambda entry: entry["f1"] or 0)
    measured = [entry for entry in worst if entry["support"] or entry["predicted"]]
    _print_table("Worst classes by F1", measured, ("class_name", "precision", "recall", "f1", "support"))
    pairs = result.metrics.get("confused_pairs") or []
    _print_table("Most confused", pairs, ("target", "label", "count", "share"))
    for part in result.metrics["slices"]:
        columns = ("value", "accuracy", "balanced_accuracy", "coverage", "rows")
        _print_table(f"Worst of {part['num_values']} values of {part['column']}", part["values"], columns)
    for name in ("mistakes", "label_errors"):
        listed = result.metrics.get(name)
        if listed and listed["listed"]:
            console.print(f"{listed['listed']:,} {name.replace('_', ' ')} in {listed['file']}")
    for name, reason in result.metrics["unavailable"].items():
        console.print(f"no {name}: {reason}", markup=False)
    console.print(f"written to {result.directory}", markup=False)


def calibrate(
    out: OutArgument,
    model: Annotated[str, typer.Option("-m", "--model", help="The bundle that made the predictions.")],
    new_model: Annotated[str, typer.Option("-o", "--output", help="Where to write the calibrated bundle.")],
    manifest: TargetsOption = None,
    split: SplitOption = None,
    target_precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Accept a label from where so many of its class are right, at 80% confidence."),
    ] = None,
    review_budget: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the images that may be left for review.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit temperature and review thresholds to stored predictions, and write them as a new bundle."""
    from imgbatch.core import calibrate as core

    result = core.calibrate(
        out,
        model=model,
        new_model=new_model,
        manifest=manifest,
        split=split,
        target_precision=target_precision,
        review_budget=review_budget,
    )
    if as_json:
        print_json(result.report | {"model_id": result.bundle.model_id, "path": result.bundle.path})
        return
    for name, reason in result.report.get("unavailable", {}).items():
        console.print(f"no {name}: {reason}", markup=False)
    if "before" in result.report:
        changes = [
            {"": name, **{when: result.report[when][name] for when in ("before", "after")}}
            for name in ("log_loss", "expected_calibration_error")
        ]
        rows = result.report["rows"]
        _print_table(f"Temperature, fitted on {rows['fitted']:,} of {rows['of']:,} rows", changes)
    warn_of_train(result.report["of_train_split"], split, "--split validation fits to rows that it has not seen")
    accept = result.report.get("accept")
    if accept:
        columns = ("class_name", "threshold", "precision", "accepted", "rows")
        _print_table("Accept from", accept["per_class"], columns, limit=100)
        precision = "none" if accept["precision"] is None else f"{accept['precision']:.1%}"
        if target_precision is not None:
            confidence = result.report["confidence"]
            console.print(f"from there at least {target_precision:.1%} are right, at {confidence:.0%} confidence")
        console.print(f"{1 - accept['review_rate']:.1%} accepted, {precision} of them right; the rest for review")
    if variants := result.report.get("variants"):
        note = f": {variants['note']}" if variants["note"] else ""
        console.print(f"with {', '.join(variants['copied'])}{note}", markup=False)
    console.print(f"written to {result.bundle.path} ({result.bundle.model_id})", markup=False)


def compare(
    config: Config,
    out_a: Annotated[str, typer.Argument(metavar="A", help="Output directory of classify.")],
    out_b: Annotated[str, typer.Argument(metavar="B", help="Another, over the same images.")],
    manifest: TargetsOption = None,
    split: SplitOption = None,
    directory: Annotated[
        str | None, typer.Option("-o", "--output", help="Where to write; default: below B's run.")
    ] = None,
    thumbnails: Annotated[
        int, typer.Option("--thumbnails", min=0, max=1000, help="Images on the page, at most; 0: none.")
    ] = 96,
    as_json: AsJson = False,
) -> None:
    """Compare two outputs image by image: who is right where, and whether it is more than chance."""
    from imgbatch.core import compare as core
    from imgbatch.report.comparison import write_comparison

    result = core.compare(out_a, out_b, manifest=manifest, split=split, directory=directory)
    figures = result.figures
    try:
        page = write_comparison(result, max_thumbnails=thumbnails, config=config)
    except UsageError as error:
        page = None
        messages.print(f"no page: {error}", markup=False)
    if as_json:
        print_json(figures)
        return
    images = figures["images"]
    console.print(
        f"{images['both']:,} images in both ({images['in_a']:,} in A, {images['in_b']:,} in B); "
        f"{figures['agreement']:.1%} labelled alike"
    )
    warn_of_train(images["of_train_split"], split, "--split test compares those that it has not seen")
    names = [name for name in ("top1", "exact_match", "balanced_accuracy", "macro_f1") if name in figures]
    _print_table("B less A", [{"": name, **figures[name]} for name in names])
    if "mcnemar" in figures:
        test = figures["mcnemar"]
        console.print(
            f"only A right: {test['only_a']:,}, only B right: {test['only_b']:,}; "
            f"p = {test['p_value']:.2g} (McNemar, {test['method']})"
        )
        changed = ("class_name", "f1_a", "f1_b", "f1_difference", "f1_interval", "support")
        _print_table("Most changed classes", figures["per_class"], changed)
    _print_table("Most frequent changes of label", figures["label_changes"])
    listed = figures["disagreements"]
    console.print(f"{listed['listed']:,} of {listed['found']:,} disagreements in {listed['file']}")
    console.print(f"written to {result.directory}", markup=False)
    if page is not None:
        console.print(f"report: {page}", markup=False)


def _print_rows(rows: Mapping[str, Any], split: str | None) -> None:
    console.print(
        f"{rows['with_target']:,} rows with a target: {rows['measured']:,} measured, "
        f"{rows['without_prediction']:,} without a prediction, coverage {rows['coverage']:.2%}"
    )
    if rows["without_prediction"]:
        reasons = rows["without_prediction_by_status"].items()
        console.print("without a prediction: " + ", ".join(f"{n:,} {status}" for status, n in reasons), markup=False)
    if rows["unknown_target"]:
        names = list(rows["unknown_targets"].items())[:SHOWN]
        console.print(
            "targets unknown to the model: " + ", ".join(f"{name} ({n:,})" for name, n in names), markup=False
        )
    if rows["predicted_without_target"]:
        why = "have no target" if split is None else "have no target or are of other splits"
        console.print(f"{rows['predicted_without_target']:,} predictions {why}")


def warn_of_train(num_rows: int, split: str | None, advice: str) -> None:
    """A line where rows that the model was trained on are among those used without being asked for."""
    if num_rows and split is None:
        console.print(f"{num_rows:,} rows are of split train, which a model may know by heart; {advice}")


def _print_figures(metrics: Mapping[str, Any]) -> None:
    rank = metrics["rank"] or {}
    intervals = metrics["intervals"]
    figures = {
        **{name: metrics.get(name) for name in ("top1", "top5", "exact_match", "hamming_loss", "balanced_accuracy")},
        "accuracy_of_all": metrics["accuracy_of_all"],
        **{f"{kind}_f1": metrics[kind]["f1"] for kind in ("macro", "micro", "weighted")},
        **{name: metrics[name] for name in ("log_loss", "brier", "expected_calibration_error")},
        **{name: rank.get(name) for name in ("roc_auc", "average_precision", "mean_average_precision")},
    }
    shown = [
        {"metric": name, "value": value, "95% interval": intervals.get(name, rank.get("intervals", {}).get(name))}
        for name, value in figures.items()
        if value is not None
    ]
    _print_table("Metrics", shown, limit=len(shown))
    sample = rank.get("sample")
    if sample and sample["rows"] < sample["of"]:
        console.print(f"roc_auc and the precisions are of a sample of {sample['rows']:,} rows")
    if reason := rank.get("intervals", {}).get("unavailable"):
        console.print(f"no intervals of roc_auc and average_precision: {reason}")


def _print_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, limit: int = SHOWN
) -> None:
    from rich.table import Table

    if not rows:
        return
    columns = columns or list(rows[0])
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        heading = column.replace("_", " ")
        if any(isinstance(row[column], str) for row in rows):
            table.add_column(heading, overflow="fold")
        else:  # on a narrow terminal, text makes room for numbers
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:limit]:
        table.add_row(*(_text(row[column]) for column in columns))
    table_console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " to ".join(_text(each) for each in value)
    return str(value)
