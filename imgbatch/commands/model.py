"""``imgbatch model``: make, inspect, optimize and export model bundles."""

from __future__ import annotations

import sys
import textwrap
from enum import Enum
from typing import Annotated, Any, Literal

import typer

from imgbatch.commands.common import AsJson, console, messages, print_json
from imgbatch.commands.evaluate import OTHER_SPLITS, warn_of_train
from imgbatch.config import Config, PreprocessConfig
from imgbatch.errors import UsageError

app = typer.Typer(help="Make, inspect, optimize and export model bundles.", no_args_is_help=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model bundle.", show_default=False)]

_NAME_WIDTH = 22
_ITEMS_SHOWN = 10


@app.command()
def init(
    preprocess: PreprocessConfig,
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
    from imgbatch.core.weights import published_name

    sizes = {"resize_size": resize_size, "crop_size": crop_size}
    overrides = preprocess.model_dump() | {name: size for name, size in sizes.items() if size is not None}
    bundle = init_bundle(
        output,
        arch=arch,
        weights=weights,
        classes=classes,
        task=task,
        **overrides,
        num_bands=bands,
        value_range=_parse_range(value_range) if value_range is not None else None,
        overwrite=overwrite,
    )
    console.print(
        f"{bundle.path}: {bundle.arch}, {bundle.num_classes} classes, model_id {bundle.model_id}; "
        f"{bundle.preprocess.describe()}",
        markup=False,
    )
    if published_name(weights) is None and overrides["resize_size"] is None:
        messages.print(
            f"the file does not say at which sizes its weights were trained, so those usual for {arch} are assumed; "
            f"--resize-size and --crop-size give others",
            markup=False,
        )


def _parse_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(f"--value-range {text}: expected two numbers, like 0,10000") from error
    return low, high


@app.command()
def inspect(
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Print what a model bundle holds (its weights are not loaded)."""
    facts = _facts(model)
    if as_json:
        print_json(facts)
        return
    facts["variants"] = {
        target: f"{variant['variant_id']}, {variant['agreement']['labels']:.2%} of labels as torch's"
        for target, variant in facts["variants"].items()
    }
    for name, value in facts.items():
        if name != "preprocess":
            # Into a pipe every fact stays on one line.
            for line in _lines(name, value, "", console.width if console.is_terminal else sys.maxsize):
                console.print(line, markup=False, soft_wrap=True)


class _Target(Enum):
    """As ``core.variants.Target``; typer takes no list of literals."""

    OPENVINO_INT8 = "openvino-int8"
    OPENVINO_BF16 = "openvino-bf16"
    OPENVINO_FP32 = "openvino-fp32"
    MNN_FP32 = "mnn-fp32"
    TORCH_BF16 = "torch-bf16"
    TORCH_FP16 = "torch-fp16"
    TORCH_COMPILE = "torch-compile"
    ONNX_INT8 = "onnx-int8"


@app.command()
def optimize(
    config: Config,
    model: Model,
    target: Annotated[
        list[_Target],
        typer.Option(help="What the variant is; repeat for several."),
    ],
    calibration: Annotated[
        str, typer.Option(metavar="MANIFEST", help="Images like those to be classified; targets help.")
    ],
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="NEW", help="A copy of MODEL to put it into.", show_default="MODEL"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many images, spread over the manifest.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list: an entry for each variant.")] = False,
) -> None:
    """Make a faster variant of a model and measure how far it agrees with the original; classify then uses it."""
    from imgbatch.core.optimize import optimize_bundle
    from imgbatch.core.variants import TARGETS, directory_of

    made: list[dict[str, Any]] = []
    for each in (name for name in TARGETS if _Target(name) in target):
        bundle, variant = optimize_bundle(
            model, target=each, calibration=calibration, output=output, limit=limit, config=config
        )
        model = bundle.path  # where the next one goes too
        if as_json:
            made.append({"variant_id": variant.variant_id, **variant.model_dump(mode="json")})
            continue
        console.print(f"{directory_of(bundle.path, each)}: variant_id {variant.variant_id}", markup=False)
        console.print(f"agreement  {variant.agreement.describe()}", markup=False)
        console.print(
            f"speed      {variant.images_per_s['variant']:,.1f} images/s in one thread at batches of "
            f"{variant.batch_size}, torch {variant.images_per_s['original']:,.1f}",
            markup=False,
        )
        warn_of_train(variant.provenance["measured_of_train_split"], None, OTHER_SPLITS)
        floor = config.classify.min_agreement
        if variant.agreement.labels < floor:
            console.print(
                f"classify leaves it out, because its labels agree on less than {100 * floor:g}%, unless "
                f"--set classify.min_agreement={int(variant.agreement.labels * 1000) / 1000:g} allows it",
                markup=False,
            )
        elif doubt := variant.doubt(floor):
            console.print(f"sample     {doubt}", markup=False)
    if as_json:
        print_json(made)


@app.command()
def export(
    config: Config,
    model: Model,
    file_format: Annotated[Literal["onnx", "openvino"], typer.Option("--format", help="What to write.")],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="A .onnx file, or a .xml beside which a .bin is put.")
    ],
    manifest: Annotated[str, typer.Option(help="Images to compare the file with torch on.")],
    limit: Annotated[int, typer.Option(min=1, help="At most so many images, spread over the manifest.")] = 64,
) -> None:
    """Write a model for use elsewhere: uint8 crops in, probabilities out; compared with torch on real images first."""
    from imgbatch.core.export import export_bundle

    result = export_bundle(model, file_format=file_format, output=output, manifest=manifest, limit=limit, config=config)
    console.print(
        f"{', '.join(result.files)}: {result.same_labels:,} of {result.images:,} labels as in torch, probabilities "
        f"within {result.largest_difference:.2g}",
        markup=False,
    )


def _facts(model: str) -> dict[str, Any]:
    from imgbatch.core import storage
    from imgbatch.core.model import WEIGHTS_FILE, load_bundle, load_metrics
    from imgbatch.core.variants import load_variants
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
        "variants": {
            variant.target: {"variant_id": variant.variant_id, **variant.model_dump(mode="json", exclude={"target"})}
            for variant in load_variants(bundle)
        },
    }


def _lines(name: str, value: Any, indent: str, width: int) -> list[str]:
    """A fact as aligned text: one paragraph, but a line for each entry of what holds further groups or is outermost."""
    if isinstance(value, dict) and (not indent or any(isinstance(item, dict) for item in value.values())):
        inner = [line for key, item in value.items() for line in _lines(key, item, indent + "  ", width)]
        return [f"{indent}{name}", *inner] if inner else [f"{indent}{name:<{_NAME_WIDTH}}none"]
    start = f"{indent}{name} ".ljust(len(indent) + _NAME_WIDTH)
    hanging = indent + " " * _NAME_WIDTH
    return textwrap.wrap(
        _text(value),
        width=max(width, 2 * _NAME_WIDTH),
        initial_indent=start,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        shown = ", ".join(_text(item) for item in value[:_ITEMS_SHOWN])
        return shown if len(value) <= _ITEMS_SHOWN else f"{shown} and {len(value) - _ITEMS_SHOWN} more"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "none" if value is None else str(value)
