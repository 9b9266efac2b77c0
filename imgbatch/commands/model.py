"""``imgbatch model``: make and inspect model bundles."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from imgbatch.commands.common import AsJson, console, print_json
from imgbatch.errors import UsageError

app = typer.Typer(help="Make and inspect model bundles.", no_args_is_help=True)

_NAME_WIDTH = 16
_ITEMS_SHOWN = 10


@app.command()
def init(
    output: Annotated[str, typer.Option("-o", "--output", metavar="MODEL", help="Directory to write.")],
    weights: Annotated[
        str,
        typer.Option(help="A .safetensors or .pth file, or 'imagenet' for those that torchvision publishes."),
    ],
    classes: Annotated[str, typer.Option(help="'imagenet1k', or a file: one class name per line, or a JSON list.")],
    arch: Annotated[str, typer.Option(help="A torchvision classification network, or simple_cnn.")] = "resnet50",
    task: Annotated[
        Literal["multiclass", "binary", "multilabel"], typer.Option(help="Whether classes exclude each other.")
    ] = "multiclass",
    resize_size: Annotated[
        int | None, typer.Option(min=1, help="Shorter side after resizing, px.", show_default="as published")
    ] = None,
    crop_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the centre crop, px.", show_default="as published")
    ] = None,
    bands: Annotated[
        int | None,
        typer.Option(min=1, help="Take so many bands of rasters; RGB weights are adapted.", show_default="RGB"),
    ] = None,
    value_range: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="With --bands: the values that become 0 and 255.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a different model that is there.")] = False,
) -> None:
    """Make a model bundle from weights and class names."""
    from imgbatch.core.model import init_bundle

    bundle = init_bundle(
        output,
        arch=arch,
        weights=weights,
        classes=classes,
        task=task,
        resize_size=resize_size,
        crop_size=crop_size,
        num_bands=bands,
        value_range=_parse_range(value_range) if value_range is not None else None,
        overwrite=overwrite,
    )
    console.print(
        f"{bundle.path}: {bundle.arch}, {bundle.num_classes} classes, model_id {bundle.model_id}", markup=False
    )


def _parse_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(f"--value-range {text}: expected two numbers, like 0,10000") from error
    return low, high


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model bundle.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Print what a model bundle holds (its weights are not loaded)."""
    facts = _facts(model)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        if name != "preprocess":
            console.print(f"{name:<{_NAME_WIDTH}}{_text(value)}", markup=False)


def _facts(model: str) -> dict[str, Any]:
    from imgbatch.core import storage
    from imgbatch.core.model import WEIGHTS_FILE, load_bundle, load_metrics
    from imgbatch.core.weights import count_parameters, read_header

    bundle = load_bundle(model)
    weights_uri = storage.join(bundle.path, WEIGHTS_FILE)
    described = bundle.to_dict()
    return {
        "model_id": bundle.model_id,
        "path": bundle.path,
        "arch": bundle.arch,
        "task": bundle.task,
        "num_classes": bundle.num_classes,
        "class_names": described["class_names"],
        "preprocessing": bundle.preprocess.describe(),
        "preprocess": described["preprocess"],
        "temperature": bundle.temperature,
        "thresholds": bundle.thresholds,
        "parameters": count_parameters(read_header(weights_uri)),
        "weights_bytes": storage.file_info(weights_uri).size,
        "weights_sha256": bundle.weights_sha256,
        "provenance": bundle.provenance,
        "metrics": load_metrics(bundle.path),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        rows = (f"{name}: {_text(item)}" for name, item in value.items())
        return f"\n{'':<{_NAME_WIDTH}}".join(rows) or "none"
    if isinstance(value, list | tuple):
        shown = ", ".join(str(item) for item in value[:_ITEMS_SHOWN])
        return shown if len(value) <= _ITEMS_SHOWN else f"{shown} and {len(value) - _ITEMS_SHOWN} more"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "none" if value is None else str(value)
