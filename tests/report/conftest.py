"""Finished runs over images that are really there, and pages taken apart."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VOID = {"meta", "img", "link", "input", "br", "wbr"}


@dataclass
class Page(HTMLParser):
    """What a browser would make of a page."""

    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    """(tag, name, value) of every attribute."""
    text: str = ""
    unclosed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.unclosed.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def pictures(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


@pytest.fixture
def read_page() -> Callable[[str | Path], Page]:
    def read(path: str | Path) -> Page:
        page = Page()
        page.feed(Path(path).read_text())
        page.close()
        assert page.unclosed == []
        return page

    return read


def alpha_of(svg: str) -> np.ndarray:
    """0 to 1, of each pixel of a figure's picture."""
    encoded = re.search(r'base64,\s*([^"]+)"', svg)
    assert encoded
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))[..., 3] / 255


def softmax(logits_NK: np.ndarray) -> np.ndarray:
    weights_NK = np.exp(logits_NK)
    return (weights_NK / weights_NK.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def photo_run(store_run, photos) -> Callable[..., Path]:
    """A run of three classes over the photos; those cut short failed."""

    def make(class_names: tuple[str, ...] = ("red", "green", "blue"), *, columns: bool = True) -> Path:
        good = [path for index, path in enumerate(photos) if index % 20 != 5]
        bad = [path for index, path in enumerate(photos) if index % 20 == 5]
        targets = np.arange(len(good)) % 3
        logits = np.random.default_rng(0).normal(size=(len(good), 3)) + 2 * (targets[:, None] == np.arange(3))
        known = {"target": [class_names[k] for k in targets], "site": ["north", "south"] * (len(good) // 2)}
        failed = {
            "image_id": [path.name for path in bad],
            "uri": [str(path) for path in bad],
            "status": ["TRUNCATED"] * len(bad),
            "error_stage": ["decode"] * len(bad),
            "error_message": ["OSError: image file is truncated"] * len(bad),
        }
        if columns:
            failed |= {"target": [class_names[0]] * len(bad), "site": ["north"] * len(bad)}
        return store_run(
            class_names,
            softmax(logits),
            columns={"uri": [str(path) for path in good], **(known if columns else {})},
            failed=failed,
        )

    return make
