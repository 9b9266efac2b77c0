"""Heat maps over images, as PNG files and a page that shows them: what was said, what is true, where the model looked.

Legend of the shape suffixes: ``N`` images, ``H`` height, ``W`` width, ``C`` channel, ``K`` class.
"""

from __future__ import annotations

import html
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from imgbatch.core import storage
from imgbatch.core.explain import Explainer
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import load_bundle
from imgbatch.core.pictures import Pictures, load_pictures
from imgbatch.core.scored import open_scored
from imgbatch.errors import RowError, UsageError

INDEX_FILE = "index.html"
_HEAT_SHARE = 0.55
"""Of the overlay, where the heat is strongest."""

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); }
figure { margin: 0; break-inside: avoid; }
figure img { width: 100%; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; }
.id { font-size: 0.85em; opacity: 0.7; }
"""


@dataclass(frozen=True, slots=True)
class Explanations:
    """What :func:`write_explanations` wrote."""

    index: str
    num_images: int
    failed: dict[str, RowError]
    """By image_id, why the others could not be shown."""


def write_explanations(
    directory: str,
    *,
    model: str,
    manifest: str,
    limit: int,
    image_ids: list[str] | None = None,
    out: str | None = None,
) -> Explanations:
    """Write a PNG for each image, and index.html over them, to ``directory``.

    A picture is the image as the model sees it, the heat map of the class that it says, and of the target if that is
    another one.

    Args:
        image_ids: these images; none: ``limit`` images spread over the manifest.
        out: the worst mistakes of this output's current predictions instead, by targets of the manifest.

    Raises:
        UsageError: captum is not installed, no image could be decoded, or ``out`` has another model's predictions.
    """
    bundle = load_bundle(model)
    if out is not None:
        image_ids = _worst_mistakes(out, manifest, bundle.model_id, limit)
    explainer = Explainer(bundle)
    pictures = load_pictures(open_manifest(manifest), bundle.preprocess, limit=limit, image_ids=image_ids)
    if not pictures.image_ids:
        reasons = ", ".join(sorted({error.status.value for error in pictures.failed.values()}))
        raise UsageError(f"manifest {manifest}: none of the images could be decoded ({reasons})")
    figures = _draw(directory, explainer, bundle.class_names, pictures)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Where the model looked</title><style>{_STYLE}</style></head>\n<body>"
        f"<h1>Where the model looked</h1><p>{html.escape(bundle.arch)}, {bundle.model_id}. Each picture: the image as "
        "the model sees it, the heat of its label and, where that is wrong, the heat of the target.</p>\n"
        f"<main>\n{''.join(figures)}</main></body></html>\n"
    )
    index = storage.join(directory, INDEX_FILE)
    storage.replace(index, page.encode())
    return Explanations(index, len(figures), pictures.failed)


def overlay(image_HWC: np.ndarray, heat_HW: np.ndarray) -> np.ndarray:
    """The image in grey with the heat in colour over it; uint8 HWC.

    Args:
        image_HWC: uint8.
        heat_HW: 0 to 1.
    """
    from matplotlib import colormaps

    grey_HW1 = image_HWC.mean(axis=2, keepdims=True)
    colour_HWC = colormaps["turbo"](heat_HW)[..., :3] * 255
    share_HW1 = _HEAT_SHARE * heat_HW[..., None]
    return np.clip(grey_HW1 * (1 - share_HW1) + colour_HWC * share_HW1, 0, 255).astype(np.uint8)


def _worst_mistakes(out: str, manifest: str, model_id: str, limit: int) -> list[str]:
    with open_scored(out, manifest=manifest) as scored:
        if scored.labeller.model_ids != (model_id,):
            raise UsageError(
                f"--out {out}: its predictions come from {', '.join(scored.labeller.model_ids)}, not {model_id}"
            )
        rows = scored.connection.execute(
            "select image_id from scored where is_known and not is_right order by probability desc, image_id limit ?",
            [limit],
        ).fetchall()
    if not rows:
        raise UsageError(f"--out {out}: no mistakes there; leave --out away to see other images")
    return [row[0] for row in rows]


def _draw(directory: str, explainer: Explainer, class_names: tuple[str, ...], pictures: Pictures) -> list[str]:
    """Write the PNGs; returns a figure of HTML for each."""
    index_of = {name: index for index, name in enumerate(class_names)}
    images_NHWC = pictures.images_NHWC
    probs_NK = explainer.probabilities(images_NHWC)
    label_N = probs_NK.argmax(axis=1)
    target_N = label_N.copy()
    for row, names in enumerate(pictures.targets):
        known = [index_of[name] for name in names or [] if name in index_of]
        if known and label_N[row] not in known:
            target_N[row] = known[0]  # of several targets, the first stands for the image
    heats = explainer.heat(images_NHWC, label_N), explainer.heat(images_NHWC, target_N)
    figures = []
    for row, image_id in enumerate(pictures.image_ids):
        panels = [images_NHWC[row], overlay(images_NHWC[row], heats[0][row])]
        if target_N[row] != label_N[row]:
            panels.append(overlay(images_NHWC[row], heats[1][row]))
        name = f"{row:03d}.png"
        storage.replace(storage.join(directory, name), _png(np.concatenate(panels, axis=1)))
        said = f"{class_names[label_N[row]]} {probs_NK[row, label_N[row]]:.0%}"
        if target_N[row] != label_N[row]:
            said += f", should be {class_names[target_N[row]]} {probs_NK[row, target_N[row]]:.0%}"
        figures.append(
            f'<figure><img src="{name}" alt="{html.escape(said)}"><figcaption>{html.escape(said)}<br>'
            f'<span class="id">{html.escape(image_id)}</span></figcaption></figure>\n'
        )
    return figures


def _png(image_HWC: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image_HWC).save(encoded, "PNG")
    return encoded.getvalue()
