"""The report's figures: matplotlib draws them, and the page's style sheet colours them.

Each function returns one ``<svg>`` element to stand inside HTML. Text stays text, the background is transparent, and
colours are CSS variables of the page (``--ink``, ``--accent`` and so on), so one figure serves light, dark and print.
Class names are drawn as they are: no mathematics, no markup. matplotlib comes with the ``report`` extra.

Legend of the shape suffixes: ``K`` classes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from imgbatch.errors import UsageError

_INK, _MUTED, _LINE, _ACCENT, _BAD = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _ACCENT: "--accent", _BAD: "--bad"}
"""Colours that stand for a variable of the style sheet."""
_ACCENT_RGB, _BAD_RGB = (0.29, 0.53, 0.78), (0.86, 0.36, 0.25)
"""Of pixels, which cannot follow the style sheet: legible on light and on dark through their transparency."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "imgbatch",
    "text.parse_math": False,
    "font.size": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.title_fontsize": 8.5,
    "legend.frameon": False,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_OWN_IDS = re.compile(r' id="[a-zA-Z0-9.]+_\d+(?:_\d+)?"')
_NAMESPACES = re.compile(r' xmlns(?::\w+)?="[^"]*"')
_STYLE_SHEET = re.compile(r"<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_HALF, _THIRD = (4.2, 3.0), (3.5, 3.1)
"""Sizes in inches, of figures that take half or a third of the page's width; each fits a phone."""
_LARGE_MATRIX = 40
"""Beyond so many classes the confusion matrix takes the whole page's width."""
_COUNTED_CLASSES = 16
"""Up to so many classes the cells of the confusion matrix show their counts."""
_MAX_NAME_CHARS = 24
_HIGHLIGHTED = 3


def check_installed() -> None:
    """Raise :class:`UsageError` in one line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("the report needs matplotlib, which pip install 'imgbatch[report]' brings") from error


def confidence_histogram(counts: Sequence[int]) -> str:
    """Rows by the probability of their label, in equal bins from 0 to 1."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        width = 1 / len(counts)
        axes.bar(np.arange(len(counts)) * width, counts, width * 0.9, align="edge", color=_ACCENT)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="probability of the label", ylabel="images", xlim=(0, 1))
        axes.yaxis.set_major_formatter(_thousands)

    return _svg(draw, _HALF, f"Histogram of confidence over {sum(counts):,} images")


def reliability_diagram(bins: Sequence[dict[str, Any]]) -> str:
    """How often answers of each confidence are right, with the number of rows below.

    Args:
        bins: as metrics.json holds them under ``reliability``.
    """
    filled = [entry for entry in bins if entry["count"]]

    def draw(figure: Any) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        left = [entry["low"] for entry in filled]
        width = 0.92 / len(bins)
        axes.bar(left, [entry["accuracy"] for entry in filled], width, align="edge", color=_ACCENT, alpha=0.35)
        axes.plot(
            [entry["confidence"] for entry in filled],
            [entry["accuracy"] for entry in filled],
            color=_ACCENT,
            marker="o",
            markersize=3,
        )
        axes.set(ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
        below.bar(left, [entry["count"] for entry in filled], width, align="edge", color=_MUTED)
        below.grid(axis="x", visible=False)
        below.set(xlabel="confidence", ylabel="rows")
        below.yaxis.set_major_formatter(_thousands)
        below.locator_params(axis="y", nbins=2)

    return _svg(draw, _THIRD, "Reliability diagram: share right at each confidence")


def risk_coverage(curve: dict[str, Any]) -> str:
    """Share wrong among the rows accepted, by the share accepted, most confident first.

    Args:
        curve: as metrics.json holds it under ``risk_coverage``.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(curve["coverage"], curve["risk"], color=_ACCENT)
        axes.fill_between(curve["coverage"], curve["risk"], color=_ACCENT, alpha=0.15, linewidth=0)
        axes.set(xlabel="share of images accepted, most confident first", ylabel="share wrong among them")
        axes.set(xlim=(0, 1), ylim=(0, None))
        axes.xaxis.set_major_formatter(_percent)
        axes.yaxis.set_major_formatter(_percent)

    return _svg(draw, _THIRD, "Risk and coverage: share wrong among the images accepted")


def precision_recall(per_class: Sequence[dict[str, Any]]) -> str:
    """A precision/recall curve per class that has one; the worst by average precision stand out by name."""
    curves = [entry for entry in per_class if entry["average_precision"] is not None]
    worst = sorted(curves, key=lambda entry: entry["average_precision"])[:_HIGHLIGHTED]
    dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for entry in curves:
            if entry not in worst:
                curve = entry["pr_curve"]
                axes.plot(curve["recall"], curve["precision"], color=_MUTED, linewidth=0.8, alpha=0.5)
        for entry, dash in zip(worst, dashes, strict=False):
            label = f"{shorten(entry['class_name'], 18)} {entry['average_precision']:.2f}"
            curve = entry["pr_curve"]
            # Without the underscore matplotlib would read as "leave this out of the legend".
            axes.plot(curve["recall"], curve["precision"], color=_BAD, linestyle=dash, label=label.lstrip("_"))
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        axes.legend(loc="lower left", title="worst by average precision" if len(curves) > len(worst) else None)

    return _svg(draw, _THIRD, "Precision and recall of each class")


def confusion_matrix(class_names: Sequence[str], confusion_KK: np.ndarray, rows_K: np.ndarray | None = None) -> str:
    """Targets in rows, labels in columns; shade is the share of the target: right in blue, wrong in red.

    Every cell that is not empty can be seen, and up to 16 classes show their counts. Names stay legible at 100
    classes: the figure grows with them.

    Args:
        confusion_KK: counts, targets in rows.
        rows_K: rows of each target, where some of their labels are not among the classes shown; none: the sums.
    """
    num_classes = len(class_names)
    is_large = num_classes > _LARGE_MATRIX
    names = [shorten(name, 20 if is_large else _MAX_NAME_CHARS) for name in class_names]
    total_K = confusion_KK.sum(axis=1) if rows_K is None else rows_K
    share_KK = confusion_KK / np.maximum(total_K[:, None], 1)
    rgba_KK4 = np.zeros((num_classes, num_classes, 4))
    rgba_KK4[..., :3] = _BAD_RGB
    rgba_KK4[np.arange(num_classes), np.arange(num_classes), :3] = _ACCENT_RGB
    # The square root lifts the small shares that confusions usually are.
    rgba_KK4[..., 3] = np.where(confusion_KK > 0, 0.12 + 0.68 * np.sqrt(share_KK), 0)
    font_size = 6.5 if is_large else 8.5
    cell = 0.4 if num_classes <= _COUNTED_CLASSES else font_size / 65
    side = max(2.4, num_classes * cell) + 0.45 + max(map(len, names)) * font_size * 0.0085

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.imshow(rgba_KK4, interpolation="none", aspect="equal")
        ticks = np.arange(num_classes)
        axes.set_xticks(ticks, names, rotation=90, fontsize=font_size)
        axes.set_yticks(ticks, names, fontsize=font_size)
        axes.grid(visible=False)
        for at in range(0, num_classes + 1, 5 if is_large else 1):
            axes.axhline(at - 0.5, color=_LINE, linewidth=0.5)
            axes.axvline(at - 0.5, color=_LINE, linewidth=0.5)
        axes.set(xlabel="label given by the model", ylabel="target")
        axes.spines[:].set_visible(False)
        if num_classes <= _COUNTED_CLASSES:
            for row, column in zip(*np.nonzero(confusion_KK), strict=True):
                count = _compact(int(confusion_KK[row, column]))
                axes.text(column, row, count, ha="center", va="center", fontsize=8)

    return _svg(draw, (side, side), f"Confusion matrix of {num_classes} classes")


def shorten(text: str, limit: int = _MAX_NAME_CHARS) -> str:
    """One line of at most ``limit`` characters, cut in the middle, without control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) <= limit:
        return text
    head = limit // 2
    return f"{text[:head]}…{text[len(text) - (limit - head - 1) :]}"


def _svg(draw: Callable[[Any], None], inches: tuple[float, float], description: str) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    written = io.StringIO()
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Names in scripts that matplotlib's own font lacks: only their width is guessed, the browser draws them.
        warnings.filterwarnings("ignore", message=r"Glyph \d+")
        figure = Figure(figsize=inches, layout="constrained")
        draw(figure)
        figure.savefig(written, format="svg", metadata=_NO_METADATA)
    return _for_html(written.getvalue(), description)


def _for_html(document: str, description: str) -> str:
    """The ``<svg>`` of a whole document, with the page's colours, and without ids that several figures share."""
    head, rest = document[document.index("<svg") :].split(">", 1)
    head = _NAMESPACES.sub("", head).replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)
    rest = _STYLE_SHEET.sub("", _NAMESPACES.sub("", rest), count=1)
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return f"{head}>{_OWN_IDS.sub('', rest)}".strip()


def _thousands(value: float, _: int) -> str:
    return _compact(value)


def _percent(value: float, _: int) -> str:
    return f"{value * 100:g}%" if abs(value * 100 - round(value * 100)) < 1e-6 else f"{value * 100:.1f}%"


def _compact(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"
