"""One self-contained HTML page on an output: what was labelled, how fast, what failed and why, how good.

count (summary) -> measure (quality) -> pick images -> thumbnails -> heat maps that explain left -> render

The page loads nothing and runs nothing: its content security policy says so, and whatever comes from a manifest, a
model or an error is escaped. jinja2 and matplotlib come with the ``report`` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from imgbatch.config import Config
from imgbatch.core import current, storage
from imgbatch.core.current import CurrentRun
from imgbatch.core.database import bounded_memory
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import Labeller, read_labeller
from imgbatch.core.views import open_views
from imgbatch.errors import UsageError
from imgbatch.report import explanations, figures, picks
from imgbatch.report.explanations import Explanation
from imgbatch.report.picks import Gallery, Pick
from imgbatch.report.quality import Quality, measure
from imgbatch.report.rendering import check_installed, render
from imgbatch.report.scenes import summarise_scenes
from imgbatch.report.summary import Summary, summarise
from imgbatch.report.thumbnails import make_thumbnails, shrink_picture

MAX_THUMBNAILS = 150
"""About 7 kB each on the page."""
_LABELS_PICTURED = 12
_LEAST_PER_LABEL, _MOST_PER_LABEL = 3, 12
_FAILED_PER_STATUS = 6
_SESSIONS_SHOWN = 20
_HEAT_MAP_PX = 224
"""Height of a heat map's picture; about 25 kB each."""


@dataclass(frozen=True, slots=True)
class Galleries:
    """The images that the page shows."""

    per_label: tuple[Gallery, ...] = ()
    least_certain: tuple[Pick, ...] = ()
    failed: tuple[Pick, ...] = ()
    mistakes: tuple[Pick, ...] = ()
    label_errors: tuple[Pick, ...] = ()

    @property
    def all_picks(self) -> list[Pick]:
        per_label = [pick for gallery in self.per_label for pick in gallery.picks]
        return [*per_label, *self.least_certain, *self.failed, *self.mistakes, *self.label_errors]


def write_report(
    out: str,
    *,
    run_id: str | None = None,
    file: str | None = None,
    manifest: str | None = None,
    split: str | None = None,
    slice_by: Sequence[str] = (),
    max_thumbnails: int = MAX_THUMBNAILS,
    price_per_hour: float | None = None,
    config: Config | None = None,
) -> str:
    """Write the page on ``out`` and return where it stands.

    Where targets are known, the labels are evaluated anew, which writes metrics.json and its tables too.

    Args:
        run_id: show only this run, with what it retries and all retries of that; none: everything.
        file: where to write; none: report.html of the newest run shown.
        manifest: where the targets are; none: the classified manifest's own.
        split: measure only rows of this split.
        slice_by: manifest columns to compare the values of; none: those with few values.
        max_thumbnails: images on the page, at most; 0: none.
        price_per_hour: of everything the runs used; none: what their configuration says.
        config: as of :func:`make_thumbnails`.

    Raises:
        UsageError: no finished run, the ``report`` extra is missing, or targets that were asked for do not fit.
    """
    check_installed()
    out = storage.absolute(out)
    runs = current.load(out)
    if run_id is not None:
        runs = _with_retries(runs, run_id)
    with open_views(out, runs) as connection, bounded_memory(connection):
        labeller = _labeller(connection, out)
        is_multilabel = isinstance(labeller, Labeller) and labeller.is_multilabel
        summary = summarise(connection, out, is_multilabel=is_multilabel, price_per_hour=price_per_hour)
        quality: Quality | str = "Not measured: nothing was labelled."
        if isinstance(labeller, Labeller):
            quality = measure(connection, out, labeller, manifest=manifest, split=split, slice_by=slice_by, runs=runs)
        elif summary.num_predictions:
            quality = f"Not measured: {labeller}."
        scenes = summarise_scenes(connection)
        galleries = _pick(connection, summary, quality, max_thumbnails, is_multilabel=is_multilabel)
    run = RunPaths(out, runs[-1].run_id)
    html = render(
        "report.html.j2",
        out=out,
        sessions_shown=_SESSIONS_SHOWN,
        run=_describe_run(run),
        summary=summary,
        labeller=labeller if isinstance(labeller, Labeller) else None,
        quality=quality if isinstance(quality, Quality) else None,
        not_measured=quality if isinstance(quality, str) else None,
        scenes=scenes,
        galleries=galleries,
        thumbnails=make_thumbnails(out, galleries.all_picks, config),
        heat_maps=_show_heat_maps(out, labeller) if isinstance(labeller, Labeller) and max_thumbnails else (),
        heat_maps_title=explanations.TITLE,
        heat_maps_legend=explanations.LEGEND,
        histogram=figures.confidence_histogram(summary.confidence_bins) if summary.num_predictions else None,
    )
    file = file or run.report
    storage.replace(file, html.encode())
    return file


def _with_retries(runs: Sequence[CurrentRun], run_id: str) -> list[CurrentRun]:
    """The runs that classified rows of the same first run as ``run_id`` did."""
    parents = {run.run_id: run.parent for run in runs}

    def first(run_id: str) -> str:
        while parent := parents.get(run_id):
            run_id = parent
        return run_id

    return [run for run in runs if first(run.run_id) == first(run_id)]


def _labeller(connection: duckdb.DuckDBPyConnection, out: str) -> Labeller | str:
    """The model behind the labels, or why there is not one."""
    try:
        return read_labeller(connection, out)
    except UsageError as error:
        return str(error)


def _pick(
    connection: duckdb.DuckDBPyConnection,
    summary: Summary,
    quality: Quality | str,
    max_thumbnails: int,
    *,
    is_multilabel: bool,
) -> Galleries:
    if not max_thumbnails:
        return Galleries()
    part = max(1, max_thumbnails * 3 // 20)
    shown = max(1, min(_LABELS_PICTURED, part, len(summary.labels)))
    each = max(_LEAST_PER_LABEL, min(_MOST_PER_LABEL, max_thumbnails * 2 // 5 // shown))
    pictured = [entry.label for entry in summary.labels[:shown]]
    mistakes: tuple[Pick, ...] = ()
    label_errors: tuple[Pick, ...] = ()
    if isinstance(quality, Quality):
        if _listed(quality.metrics, "mistakes"):
            mistakes = picks.pick_mistakes(connection, quality.directory, part)
        if _listed(quality.metrics, "label_errors"):
            label_errors = picks.pick_label_errors(connection, quality.directory, part)
    return Galleries(
        tuple(picks.pick_per_label(connection, pictured, each, is_multilabel=is_multilabel)),
        picks.pick_least_certain(connection, part, is_multilabel=is_multilabel),
        picks.pick_failed(connection, part, _FAILED_PER_STATUS),
        mistakes,
        label_errors,
    )


def _show_heat_maps(out: str, labeller: Labeller) -> list[tuple[Explanation, str]]:
    """What ``explain`` drew of the labels, and each picture as a ``data:`` URI."""
    found = explanations.load_explanations(out, labeller.run_ids, labeller.model_ids)
    if found is None:
        return []
    files = [storage.join(found.directory, image.file) for image in found.images]
    return [
        (image, shrink_picture(storage.read_bytes(file), _HEAT_MAP_PX))
        for image, file in zip(found.images, files, strict=True)
        if storage.exists(file)
    ]


def _listed(metrics: dict[str, Any], name: str) -> int:
    """Rows of the table that an evaluation wrote under ``name``."""
    return (metrics.get(name) or {}).get("listed", 0)


def _describe_run(paths: RunPaths) -> dict[str, Any]:
    """What is known of a run beyond its rows: its id, and run.json where the run's driver lived to write it."""
    record = storage.read_json(paths.run_json) if storage.exists(paths.run_json) else {}
    plan = storage.read_json(paths.plan)
    return {
        "run_id": paths.run_id,
        "predicted_at": plan["predicted_at"],
        "manifest": plan.get("config", {}).get("input", {}).get("manifest"),
        "model": record.get("model", {}),
        "preprocess": record.get("preprocess"),
        "device": record.get("device"),
        "backend": record.get("backend"),
        "machine": record.get("machine", {}),
        "versions": record.get("versions", {}),
    }
