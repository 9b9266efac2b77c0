"""The README.md of a model bundle: what the model is, for a person who finds the directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from imgbatch.core.weights import count_parameters

if TYPE_CHECKING:
    from imgbatch.core.model import ModelBundle

_CLASSES_SHOWN = 20


def build_model_card(bundle: ModelBundle, shapes: Mapping[str, tuple[int, ...]], metrics: Mapping[str, Any]) -> str:
    """Markdown, the same for the same model.

    Args:
        shapes: of the weights, by name.
        metrics: as in metrics.json.
    """
    shown = ", ".join(bundle.class_names[:_CLASSES_SHOWN])
    more = len(bundle.class_names) - _CLASSES_SHOWN
    lines = [
        f"# {bundle.arch}, {bundle.num_classes} classes ({bundle.task})",
        "",
        "An image classifier in the bundle format of imgbatch: `model.safetensors` (weights), `model.json` (all else",
        "that decides a label), `metrics.json` (what was measured).",
        "",
        "    imgbatch model inspect MODEL",
        "    imgbatch classify -m MODEL --manifest MANIFEST -o OUT",
        "",
        "| | |",
        "| --- | --- |",
        f"| model_id | {bundle.model_id} |",
        f"| parameters | {count_parameters(shapes):,} |",
        f"| preprocessing | {_cell(bundle.preprocess.describe())} |",
        f"| temperature | {_cell(bundle.temperature)} |",
        f"| thresholds | {_cell(_thresholds(bundle) or 'none')} |",
        f"| classes | {_cell(shown)}{f' and {more} more' if more > 0 else ''} |",
        "",
        "## Measured",
        "",
        *(_measured(metrics) or ["Nothing yet."]),
        "",
        "## Where it came from",
        "",
        *(_bullets(bundle.provenance) or ["Not recorded."]),
    ]
    return "\n".join(lines) + "\n"


def _thresholds(bundle: ModelBundle) -> str:
    kinds = {"accept": "accepted without review from", "labels": "labels apply from"}
    return "; ".join(
        f"{kinds[kind]} {', '.join(f'{name} {_cell(limit)}' for name, limit in limits.items())}"
        for kind, limits in (bundle.thresholds or {}).items()
    )


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    """A table of the splits, one of their classes each, and the rest as a list."""
    splits = {name: values for name, values in metrics.items() if isinstance(values, Mapping) and "images" in values}
    lines: list[str] = []
    if splits:
        names = [name for name in next(iter(splits.values())) if name != "per_class"]
        lines += _table(["", *splits], [[name, *(values.get(name) for values in splits.values())] for name in names])
    for split, values in splits.items():
        if per_class := values.get("per_class"):
            columns = list(next(iter(per_class.values())))
            rows = [[name, *(scores[column] for column in columns)] for name, scores in per_class.items()]
            lines += ["", f"{split}, by class:", "", *_table(["class", *columns], rows)]
    rest = _bullets({name: value for name, value in metrics.items() if name not in splits})
    return [*lines, *([""] if lines and rest else []), *rest]


def _table(header: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _bullets(values: Mapping[str, Any], indent: str = "") -> list[str]:
    """A list, with one inside it for every mapping."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}- {name}:", *_bullets(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}- {name}: {_cell(value)}")
    return lines


def _cell(value: Any) -> str:
    """One line that breaks no table; numbers to four digits."""
    if value is None or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return " ".join(str(value).replace("|", "\\|").split())
