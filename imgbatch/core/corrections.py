"""What a person said is true: a filled review list, or Label Studio's export, read and turned into a manifest.

A row of the list stands for an image; what is in its ``corrected`` cell is the image's target from now on.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from imgbatch.core import storage
from imgbatch.core.review import CORRECTED, LABEL, LABELS, SEPARATOR
from imgbatch.errors import UsageError
from imgbatch.schema import IMAGE_ID, TARGET, TARGETS, URI


@dataclass(frozen=True, slots=True)
class Correction:
    """The truth about one image."""

    where: str
    """``row 7`` of a CSV, counted as a spreadsheet does, or ``task 7`` of Label Studio's list, from 1."""
    image_id: str
    uri: str | None
    truth: tuple[str, ...]
    """One class name; for multi-label any number, also none."""
    changed: bool
    """Whether it differs from what the model had said."""


@dataclass(frozen=True, slots=True)
class Corrections:
    """A whole list, each image once."""

    path: str
    multilabel: bool
    by_image_id: dict[str, Correction]
    num_empty: int
    """Images that nothing was said about; they are not in ``by_image_id``."""

    @property
    def column(self) -> str:
        """The manifest's column for them."""
        return TARGETS if self.multilabel else TARGET


@dataclass(frozen=True, slots=True)
class _Entry:
    where: str
    image_id: str
    uri: str | None
    said: list[str]
    truth: list[str] | None
    """None: nothing was filled in."""


def read_corrections(
    path: str, *, class_names: Collection[str] | None = None, accept_empty: bool = False
) -> Corrections:
    """The corrections in a CSV from ``review export``, or in Label Studio's JSON export of its tasks.

    Args:
        class_names: the classes that there are; none: any name is one.
        accept_empty: an image that nothing was said about is what the model had said, instead of being left out.

    Raises:
        UsageError: one line that names the file and the row.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text; save the list as CSV UTF-8") from error
    if text.lstrip().startswith(("[", "{")):
        multilabel, entries = _read_tasks(path, text)
    else:
        multilabel, entries = _read_csv(path, text)
    by_image_id: dict[str, Correction] = {}
    num_empty = 0
    for entry in entries:
        truth = entry.said if entry.truth is None and accept_empty else entry.truth
        if truth is None:
            num_empty += 1
            continue
        if entry.image_id in by_image_id:
            first = by_image_id[entry.image_id].where
            raise UsageError(f"{path}: {entry.where}: image_id {entry.image_id!r} stands in {first} too; keep one")
        _check_truth(path, entry.where, truth, multilabel, class_names)
        changed = sorted(truth) != sorted(entry.said)
        by_image_id[entry.image_id] = Correction(entry.where, entry.image_id, entry.uri, tuple(truth), changed)
    if not by_image_id:
        raise UsageError(f"{path}: nothing is filled in ({num_empty} images); write what is true into {CORRECTED!r}")
    return Corrections(path, multilabel, by_image_id, num_empty)


def _check_truth(
    path: str, where: str, truth: Sequence[str], multilabel: bool, class_names: Collection[str] | None
) -> None:
    if not multilabel and len(truth) != 1:
        raise UsageError(f"{path}: {where}: {len(truth)} classes where an image has one: {', '.join(truth) or 'none'}")
    for name in truth:
        if class_names is not None and name not in class_names:
            known = ", ".join(list(class_names)[:20])
            raise UsageError(f"{path}: {where}: unknown class {name!r}; the model's classes are {known}")
        if truth.count(name) > 1:
            raise UsageError(f"{path}: {where}: class {name!r} stands there twice; keep one")


def _read_csv(path: str, text: str) -> tuple[bool, Iterator[_Entry]]:
    header_line = text.partition("\n")[0]
    # Spreadsheets write the list separator of the country that they run in.
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = next(reader, [])
    for needed in (IMAGE_ID, CORRECTED):
        if needed not in header:
            raise UsageError(f"{path}: row 1: no column {needed!r} (columns: {', '.join(header) or 'none'})")
    multilabel = LABELS in header
    return multilabel, _iter_csv(path, header, reader, multilabel)


def _iter_csv(path: str, header: list[str], reader: Iterator[list[str]], multilabel: bool) -> Iterator[_Entry]:
    for number, cells in enumerate(reader, start=2):
        if not any(cells):
            continue
        where = f"row {number}"
        if len(cells) != len(header):
            raise UsageError(f"{path}: {where}: {len(cells)} cells where the header has {len(header)}")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        corrected, said = row[CORRECTED], row.get(LABELS if multilabel else LABEL, "")
        yield _Entry(
            where,
            _require_image_id(path, where, row[IMAGE_ID]),
            row.get(URI) or None,
            _cell_names(path, where, said, multilabel),
            _cell_names(path, where, corrected, multilabel) if corrected else None,
        )


def _cell_names(path: str, where: str, cell: str, multilabel: bool) -> list[str]:
    """The class names in a cell: one, or for multi-label a list; see ``review.join_labels``."""
    if not multilabel:
        return [cell] if cell else []
    if not cell.startswith("["):
        return [name.strip() for name in cell.split(SEPARATOR) if name.strip()]
    try:
        names = json.loads(cell)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: {where}: {cell!r} is no JSON list of class names") from error
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: {where}: {cell!r} holds something that is no class name")
    return names


def _require_image_id(path: str, where: str, image_id: Any) -> str:
    if not image_id:
        raise UsageError(f"{path}: {where}: {IMAGE_ID} is empty; it says which image the row is about")
    return str(image_id)


def _read_tasks(path: str, text: str) -> tuple[bool, Iterator[_Entry]]:
    try:
        tasks = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tasks, list) or not tasks:
        raise UsageError(f"{path}: no tasks; expected the list that Label Studio exports as JSON")
    for number, task in enumerate(tasks, start=1):
        if not isinstance(task, dict) or not isinstance(task.get("data"), dict) or "annotations" not in task:
            raise UsageError(
                f"{path}: task {number}: no 'data' and 'annotations'; export the project as JSON, not another format"
            )
    multilabel = LABELS in tasks[0]["data"]
    return multilabel, _iter_tasks(path, tasks, multilabel)


def _iter_tasks(path: str, tasks: Sequence[Mapping[str, Any]], multilabel: bool) -> Iterator[_Entry]:
    for number, task in enumerate(tasks, start=1):
        where, data = f"task {number}", task["data"]
        said = data.get(LABELS) or [] if multilabel else [data[LABEL]] if data.get(LABEL) else []
        truth = _annotated(task["annotations"])
        if not truth and not multilabel:
            truth = None
        yield _Entry(where, _require_image_id(path, where, data.get(IMAGE_ID)), data.get(URI), said, truth)


def _annotated(annotations: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """What the annotation that counts chose: the ground truth if one is marked, or else the latest not skipped."""
    submitted = [annotation for annotation in annotations if not annotation.get("was_cancelled")]
    if not submitted:
        return None
    counts = max(submitted, key=lambda each: (bool(each.get("ground_truth")), each.get("updated_at") or ""))
    chosen = [result["value"]["choices"] for result in counts.get("result", []) if result.get("type") == "choices"]
    return list(dict.fromkeys(name for names in chosen for name in names))
