"""What ``explain`` leaves behind, as records: the report reads them without a model and without torch.

DIR/index.html           every picture with what was said and what is true
DIR/000.png ...          the image as the model sees it, and a heat map for each class asked about
DIR/explanations.json    which picture shows what
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from imgbatch.core import storage
from imgbatch.core.runs import RunPaths

INDEX_FILE, LIST_FILE = "index.html", "explanations.json"
FORMAT_VERSION = 1
TITLE = "Where the model looked"
LEGEND = (
    "Each picture: the image as the model sees it, then how strongly each part of it speaks for a class, with the "
    "probability that the model gives that class; grey all over where nothing does. ✗ is what the model says and is "
    "wrong, ✓ is what is true."
)


@dataclass(frozen=True, slots=True)
class Claim:
    """A class that an image was asked about."""

    class_name: str
    probability: float
    is_true: bool | None
    """Whether it is a target; none where nobody said, or where the model does not say it and rightly so."""

    @property
    def caption(self) -> str:
        """``✗ mug 0.98``."""
        mark = {True: "✓ ", False: "✗ ", None: ""}[self.is_true]
        return f"{mark}{self.class_name} {self.probability:.2f}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One picture of a directory of explanations."""

    image_id: str
    file: str
    """Name within the directory."""
    claims: tuple[Claim, ...]
    """What the panels right of the image are about, from left to right."""


@dataclass(frozen=True, slots=True)
class Explanations:
    """A directory of explanations."""

    directory: str
    model_id: str
    images: tuple[Explanation, ...]

    @property
    def index(self) -> str:
        return storage.join(self.directory, INDEX_FILE)


def write_list(explanations: Explanations) -> None:
    """Write explanations.json, which :func:`read_explanations` reads."""
    images = [asdict(image) for image in explanations.images]
    listed = {"format_version": FORMAT_VERSION, "model_id": explanations.model_id, "images": images}
    storage.write_json(storage.join(explanations.directory, LIST_FILE), listed)


def read_explanations(directory: str) -> Explanations | None:
    """What explanations.json in ``directory`` says; none where there is no such file."""
    path = storage.join(directory, LIST_FILE)
    if not storage.exists(path):
        return None
    listed = storage.read_json(path)
    images = [
        Explanation(image["image_id"], image["file"], tuple(Claim(**claim) for claim in image["claims"]))
        for image in listed["images"]
    ]
    return Explanations(directory, listed["model_id"], tuple(images))


def load_explanations(out: str, run_ids: Sequence[str], model_ids: Sequence[str]) -> Explanations | None:
    """What ``explain`` left with the newest of ``run_ids``, where one of ``model_ids`` is explained."""
    for run_id in reversed(run_ids):
        found = read_explanations(RunPaths(out, run_id).explanations)
        if found is not None and found.model_id in model_ids:
            return found
    return None
