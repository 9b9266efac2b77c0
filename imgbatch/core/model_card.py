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
        f"| thresholds | {_cell(bundle.thresholds or 'none')} |",
        f"| classes | {_cell(shown)}{f' and {more} more' if more > 0 else ''} |",
        "",
        "## Measured",
        "",
        *(_bullets(metrics) or ["Nothing yet."]),
        "",
        "## Where it came from",
        "",
        *(_bullets(bundle.provenance) or ["Not recorded."]),
    ]
    return "\n".join(lines) + "\n"


def _bullets(values: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {_cell(value)}" for name, value in values.items()]


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
