"""Two labellings on one page: who is right where, what changed, and the images that the two label differently."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.compare import Comparison
from imgbatch.core.database import connect
from imgbatch.report.picks import Pick
from imgbatch.report.rendering import check_installed, render
from imgbatch.report.thumbnails import make_thumbnails

PAGE_FILE = "compare.html"
MAX_THUMBNAILS = 96
SIGNIFICANT = 0.05
"""Below this p-value the page calls one of the two better."""
_GROUPS = {
    "only_a_right": "Only A is right",
    "only_b_right": "Only B is right",
    "both_wrong": "Both are wrong, each otherwise",
    "no_target": "No target says who is right",
}
_MEASURES = {
    "top1": "Right",
    "exact_match": "All labels right",
    "balanced_accuracy": "Balanced accuracy",
    "macro_f1": "Macro F1",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Disagreements of one outcome, the surest first."""

    title: str
    num_listed: int
    """In disagreements.parquet."""
    picks: tuple[Pick, ...]


def write_comparison(
    comparison: Comparison, *, max_thumbnails: int = MAX_THUMBNAILS, config: Config | None = None
) -> str:
    """Write compare.html beside compare.json and return where it stands.

    Args:
        max_thumbnails: images on the page, at most; 0: none.
        config: as of :func:`make_thumbnails`.

    Raises:
        UsageError: the ``report`` extra is missing.
    """
    check_installed()
    figures = comparison.figures
    groups = _pick(comparison, max_thumbnails)
    picks = [pick for group in groups for pick in group.picks]
    html = render(
        "compare.html.j2",
        figures=figures,
        verdict=_verdict(figures),
        measures=[(title, figures[name]) for name, title in _MEASURES.items() if name in figures],
        groups=groups,
        thumbnails=make_thumbnails(figures["a"]["out"], picks, config),
    )
    file = storage.join(comparison.directory, PAGE_FILE)
    storage.replace(file, html.encode())
    return file


def _verdict(figures: dict[str, Any]) -> str:
    if "mcnemar" not in figures:
        return "Without targets, nobody is right"
    if figures["mcnemar"]["p_value"] >= SIGNIFICANT:
        return "No difference beyond chance"
    measure = figures.get("top1") or figures["exact_match"]
    return f"{'B' if measure['difference'] > 0 else 'A'} is right more often"


def _pick(comparison: Comparison, max_thumbnails: int) -> list[Group]:
    file = storage.join(comparison.directory, comparison.figures["disagreements"]["file"])
    with contextlib.closing(connect(comparison.directory)) as connection:
        counts = dict(
            connection.execute("select outcome, count(*) from read_parquet(?) group by outcome", [file]).fetchall()
        )
        shown = [name for name in _GROUPS if name in counts]
        each = max_thumbnails // max(1, len(shown))
        rows = connection.execute(
            "select * from read_parquet(?) qualify row_number() over (partition by outcome order by "
            "probability_a + probability_b desc, image_id) <= ? order by probability_a + probability_b desc, image_id",
            [file, each],
        )
        names = [column[0] for column in rows.description or ()]
        found = [dict(zip(names, row, strict=True)) for row in rows.fetchall()]
    return [
        Group(_GROUPS[name], counts[name], tuple(_disagreement(row) for row in found if row["outcome"] == name))
        for name in shown
    ]


def _disagreement(row: dict[str, Any]) -> Pick:
    said_a, said_b, truth = row["label_a"], row["label_b"], row.get("target")
    if "targets" in row:
        said_a, said_b, truth = (
            None if names is None else ", ".join(names) or "none"
            for names in (row["labels_a"], row["labels_b"], row["targets"])
        )
    note = f"B: {said_b} {row['probability_b']:.2f}" + ("" if truth is None else f"; is {truth}")
    return Pick(row["image_id"], row["uri"], row["run_id"], row["row_id"], f"A: {said_a}", row["probability_a"], note)
