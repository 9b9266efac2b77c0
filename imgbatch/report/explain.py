"""Where the model looked, over images of a manifest or over an output's worst mistakes: pictures and a page of them.

choose images -> decode as the model sees them -> draw heat maps -> write
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from imgbatch.config import Config
from imgbatch.core import storage
from imgbatch.core.access import fetch_settings
from imgbatch.core.evaluate import find_mistakes
from imgbatch.core.explain import Explainer
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_bundle
from imgbatch.core.pictures import load_pictures
from imgbatch.core.runs import RunPaths
from imgbatch.core.scored import Scored, open_scored
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, UsageError
from imgbatch.report.explanations import LEGEND, TITLE, Explanation, Explanations, read_explanations, write_list
from imgbatch.report.heatmaps import draw_heat_maps, encode_png

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; break-inside: avoid; width: calc(100% / 3 * var(--panels)); }
figure { display: grid; grid-template-columns: repeat(var(--panels), 1fr); align-content: start; }
figure img { grid-column: 1 / -1; width: 100%; border-radius: 4px; }
figcaption { display: contents; }
figcaption span { overflow-wrap: anywhere; padding: 0.2em 0.5em 0 0; }
.id { font-size: 0.85em; opacity: 0.7; }
"""


@dataclass(frozen=True, slots=True)
class _Source:
    """What to explain: the model, and images of a manifest."""

    bundle: ModelBundle
    model_id: str
    """Of the bundle as it is stored; a run may have preprocessed otherwise."""
    manifest: str
    image_ids: list[str] | None
    """These and no others; none: spread over the manifest."""
    config: Config
    """How images are fetched and decoded."""
    limit: int | None = None
    """At most so many images."""


def explain_images(
    directory: str,
    *,
    model: str,
    manifest: str,
    limit: int,
    image_ids: Sequence[str] = (),
    config: Config | None = None,
) -> tuple[Explanations, dict[str, RowError]]:
    """Explain images of a manifest: ``image_ids``, or else ``limit`` of them spread over the manifest.

    Args:
        config: how images are fetched and decoded; none: the defaults.

    Returns:
        What was written to ``directory``, and by image_id why other images could not be shown.

    Raises:
        UsageError: captum is not installed, no such image, or none could be decoded.
    """
    bundle = load_bundle(model)
    at_most = None if image_ids else limit
    source = _Source(bundle, bundle.model_id, manifest, list(image_ids) or None, config or Config(), at_most)
    return _write(directory, source)


def explain_output(
    out: str,
    *,
    model: str | None = None,
    manifest: str | None = None,
    directory: str | None = None,
    limit: int,
    image_ids: Sequence[str] = (),
    config: Config | None = None,
) -> tuple[Explanations, dict[str, RowError]]:
    """Explain images that an output has labelled: ``image_ids``, or else its ``limit`` most confident mistakes.

    Args:
        model: the bundle; none: where the newest run found it.
        manifest: with the images and their targets; none: the one that the newest run classified, and no mistakes but
            those among its images.
        directory: where to write; none: the newest run's own, where the report finds it.
        config: how images are fetched and decoded, unless the newest run's command said; none: as it said.

    Returns:
        As :func:`explain_images`.

    Raises:
        UsageError: as :func:`explain_images`; the model is not the one that labelled, or it made no mistakes.
    """
    targets = None if image_ids else manifest
    with open_scored(out, manifest=targets, all_predictions=bool(image_ids)) as scored:
        labeller = scored.labeller
        paths = RunPaths(storage.absolute(out), labeller.run_ids[-1])
        plan = storage.read_json(paths.plan)
        bundle = _bundle_of_run(out, plan, model)
        model_id = bundle.model_id
        if model_id not in labeller.model_ids:
            raise UsageError(
                f"model {bundle.path} is {model_id}; {out} was labelled by {', '.join(labeller.model_ids)}"
            )
        if manifest is None and not image_ids:
            _leave_out_other_manifests(scored, out, plan)
        chosen = list(image_ids) or find_mistakes(scored, limit)
    if not chosen:
        where = "there" if manifest else "among the images of its newest manifest"
        raise UsageError(f"{out}: no mistakes {where}; --image-id names images to explain")
    if plan["fields"].get("preprocess"):
        bundle = replace(bundle, preprocess=PreprocessSpec.from_dict(plan["fields"]["preprocess"]))
    manifest = manifest or _configured(plan, "input", "manifest")
    if manifest is None:
        raise UsageError(f"{out}: its plan does not say which manifest was classified; name it with --manifest")
    config = config or Config()
    config = config.model_copy(update={"fetch": fetch_settings(plan, config.fetch)})
    return _write(directory or paths.explanations, _Source(bundle, model_id, manifest, chosen, config))


def _leave_out_other_manifests(scored: Scored, out: str, newest: Mapping[str, Any]) -> None:
    """Narrow ``scored`` to the newest run and those over the same manifest, as its retries: its pictures are drawn."""
    plans = {run_id: storage.read_json(RunPaths(out, run_id).plan) for run_id in scored.labeller.run_ids}
    identity = newest["fields"].get("manifest")
    same = [run_id for run_id, plan in plans.items() if plan["fields"].get("manifest") == identity]
    scored.connection.register("runs_of_manifest", pa.table({"run_id": same}))
    scored.connection.execute("alter view scored rename to scored_in_all")
    scored.connection.execute("create temp view scored as from scored_in_all semi join runs_of_manifest using (run_id)")


def _bundle_of_run(out: str, plan: dict[str, Any], model: str | None) -> ModelBundle:
    if model is not None:
        return load_bundle(model)
    configured = _configured(plan, "model", "path")
    if configured is None:
        raise UsageError(f"{out}: its plan does not say where the model was; name it with --model")
    try:
        return load_bundle(configured)
    except UsageError as error:
        raise UsageError(f"{error}; --model names where it is now") from error


def _configured(plan: dict[str, Any], section: str, key: str) -> str | None:
    return plan.get("config", {}).get(section, {}).get(key)


def _write(directory: str, source: _Source) -> tuple[Explanations, dict[str, RowError]]:
    explainer = Explainer(source.bundle)
    manifest = open_manifest(source.manifest)
    pictures = load_pictures(
        manifest, source.bundle.preprocess, source.config, limit=source.limit, image_ids=source.image_ids
    )
    if not pictures.image_ids:
        raise UsageError(f"manifest {source.manifest}: none of the images could be decoded ({pictures.reasons})")
    before = read_explanations(directory)
    images: list[Explanation] = []
    for heat_map in draw_heat_maps(explainer, source.bundle, pictures):
        file = _picture_name(len(images))
        storage.replace(storage.join(directory, file), encode_png(heat_map.picture_HWC))
        images.append(Explanation(heat_map.image_id, file, heat_map.claims))
    written = Explanations(directory, source.model_id, tuple(images))
    write_list(written)
    storage.replace(written.index, _page(source, images).encode())
    for number in range(len(images), len(before.images) if before else 0):
        storage.remove(storage.join(directory, _picture_name(number)))
    return written, pictures.failed


def _picture_name(number: int) -> str:
    return f"{number:03d}.png"


def _page(source: _Source, images: Sequence[Explanation]) -> str:
    figures = "".join(_figure(image) for image in images)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>{TITLE}</h1><p>{html.escape(source.bundle.arch)}, {source.model_id}. {LEGEND}</p>\n"
        f"<main>\n{figures}</main></body></html>\n"
    )


def _figure(image: Explanation) -> str:
    said = [html.escape(claim.caption) for claim in image.claims]
    captions = "".join(f"<span>{each}</span>" for each in said)
    return (
        f'<figure style="--panels: {1 + len(said)}"><img src="{image.file}" alt="{", ".join(said)}">'
        f'<figcaption><span class="id">{html.escape(image.image_id)}</span>{captions}</figcaption></figure>\n'
    )
