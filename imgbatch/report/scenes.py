"""Runs over scenes: which labels each scene got, and where in it.

Counted in DuckDB over the views. Only the scenes that are pictured have their tiles read.

Legend of the shape suffixes: ``H`` height, ``W`` width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
from PIL import Image, ImageColor

from imgbatch.schema import WINDOW

PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#f0e442", "#e69f00")
"""Okabe and Ito (2008), told apart with any colour vision, on light and on dark."""
OTHER_COLOUR, FAILED_COLOUR = "#8c8c8c", "#d55e00"
_SCENES_LISTED, _SCENES_PICTURED = 30, 12
_MAP_PX = 320
"""Longer side of a map."""
_LABELS_NAMED = 3
_FAILED, _NOT_COLOURED = -1, len(PALETTE)


@dataclass(frozen=True, slots=True)
class Scene:
    """One file that tiles were read from."""

    uri: str
    num_tiles: int
    num_errors: int
    """Of the tiles."""
    labels: tuple[tuple[str, int], ...]
    """The commonest and their tiles."""
    picture: str | None
    """A map of the tiles in the colours of their labels, as a ``data:`` URI; none: not pictured."""


@dataclass(frozen=True, slots=True)
class Scenes:
    """What the page says of them."""

    count: int
    listed: tuple[Scene, ...]
    """Those with the most tiles."""
    legend: tuple[tuple[str, str], ...]
    """Label and colour."""


def summarise_scenes(connection: duckdb.DuckDBPyConnection) -> Scenes | None:
    """None where no windows were classified.

    Args:
        connection: with the views of an output.
    """
    if not _has_windows(connection, "predictions"):
        return None
    tiles = f'select uri, "{WINDOW}", label from predictions where "{WINDOW}" is not null'
    if _has_windows(connection, "errors"):
        tiles += f' union all select uri, "{WINDOW}", null from errors where "{WINDOW}" is not null'
    listed = connection.sql(
        f"""select uri, count(*), count(*) filter (label is null) from ({tiles})
            where uri is not null group by uri order by 2 desc, uri limit {_SCENES_LISTED}"""
    ).fetchall()
    if not listed:
        return None
    commonest = connection.sql(
        f"select label from predictions group by label order by count(*) desc, label limit {len(PALETTE)}"
    ).fetchall()
    names = [label for (label,) in commonest if label is not None]
    scenes = [
        Scene(
            uri,
            num_tiles,
            num_errors,
            _labels_of(connection, uri),
            _draw(connection, tiles, uri, names) if place < _SCENES_PICTURED else None,
        )
        for place, (uri, num_tiles, num_errors) in enumerate(listed)
    ]
    num_scenes = _one(connection.sql(f"select count(distinct uri) from ({tiles})"))
    return Scenes(num_scenes, tuple(scenes), _legend(connection, names, scenes))


def _legend(
    connection: duckdb.DuckDBPyConnection, names: Sequence[str], scenes: Sequence[Scene]
) -> tuple[tuple[str, str], ...]:
    legend = list(zip(names, PALETTE, strict=False))
    if _one(connection.sql("select count(distinct label) from predictions")) > len(names):
        legend.append(("other labels", OTHER_COLOUR))
    if any(scene.num_errors for scene in scenes):
        legend.append(("failed", FAILED_COLOUR))
    return tuple(legend)


def _labels_of(connection: duckdb.DuckDBPyConnection, uri: str) -> tuple[tuple[str, int], ...]:
    query = f"""select label, count(*) from predictions where uri = ? and label is not null
                group by label order by 2 desc, label limit {_LABELS_NAMED}"""
    return tuple((str(label), int(count)) for label, count in connection.execute(query, [uri]).fetchall())


def _draw(connection: duckdb.DuckDBPyConnection, tiles: str, uri: str, names: Sequence[str]) -> str:
    """Tiles as they lie in the file, first row on top; where they overlap, the later one shows."""
    colours = {name: index for index, name in enumerate(names)}
    rows = connection.execute(f'select "{WINDOW}", label from ({tiles}) where uri = ?', [uri]).fetchall()
    placed = [(window, _FAILED if label is None else colours.get(label, _NOT_COLOURED)) for window, label in rows]
    width = max(window["col_off"] + window["width"] for window, _ in placed)
    height = max(window["row_off"] + window["height"] for window, _ in placed)
    scale = _MAP_PX / max(width, height)
    rgba = {index: (*ImageColor.getrgb(colour), 255) for index, colour in enumerate((*PALETTE, OTHER_COLOUR))}
    rgba[_FAILED] = (*ImageColor.getrgb(FAILED_COLOUR), 255)
    map_HW4 = np.zeros((max(1, round(height * scale)), max(1, round(width * scale)), 4), np.uint8)
    for window, index in placed:
        top, left = int(window["row_off"] * scale), int(window["col_off"] * scale)
        bottom = max(top + 1, int((window["row_off"] + window["height"]) * scale))
        right = max(left + 1, int((window["col_off"] + window["width"]) * scale))
        map_HW4[top:bottom, left:right] = rgba[index]
    written = io.BytesIO()
    Image.fromarray(map_HW4).quantize(16).save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _has_windows(connection: duckdb.DuckDBPyConnection, view: str) -> bool:
    return WINDOW in connection.sql(f"select * from {view} limit 0").columns


def _one(relation: duckdb.DuckDBPyRelation) -> int:
    ((value,),) = relation.fetchall()
    return int(value)
