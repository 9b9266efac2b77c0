"""Runs over scenes: which labels each scene got, and where in it.

Counted in DuckDB over the views. Only the scenes that are pictured have their tiles read.

Legend of the shape suffixes: ``H`` height, ``W`` width.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
from PIL import Image, ImageColor

from imgbatch.core.bands import RASTER_SUFFIXES
from imgbatch.core.palette import class_colour
from imgbatch.report.summary import UNLABELLED
from imgbatch.schema import WINDOW

FAILED_COLOUR = "#d55e00"
_SCENES_LISTED, _SCENES_PICTURED = 30, 12
_LABELS_IN_LEGEND = 12
_MAP_PX = 320
"""Longer side of a map."""
_LABELS_NAMED = 3
_IS_PLACED = " and ".join(f'"{WINDOW}".{side}' for side in ("col_off >= 0", "row_off >= 0", "width > 0", "height > 0"))
"""Of a tile that can be drawn; the windows of rows that failed may be anything, null included."""
_IS_WHOLE = f'coalesce("{WINDOW}".width = 0 and "{WINDOW}".height = 0, "{WINDOW}" is null)'
"""Of a row that stands for a whole file: tiling gives one with an empty window to a scene that it cannot open."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One file that tiles were read from."""

    uri: str
    num_tiles: int
    """0 of a scene that could not be opened, which was not cut into any."""
    num_errors: int
    """Rows without a label."""
    labels: tuple[tuple[str, int], ...]
    """The commonest and their tiles."""
    picture: str | None
    """A map of the tiles in the colours of their labels, as a ``data:`` URI; none: not pictured."""
    failure: str | None = None
    """Why a scene could not be opened: the status of its row."""


@dataclass(frozen=True, slots=True)
class Scenes:
    """What the page says of them."""

    count: int
    """Those that could not be opened are counted too."""
    listed: tuple[Scene, ...]
    """Those with the most tiles, then those that could not be opened."""
    legend: tuple[tuple[str, str], ...]
    """Label and colour, the commonest labels first."""
    num_unopened: int
    num_labels_unnamed: int
    """On the maps perhaps, but not in the legend."""


def summarise_scenes(connection: duckdb.DuckDBPyConnection) -> Scenes | None:
    """None where no windows were classified.

    Args:
        connection: with the views of an output.
    """
    if not _has_windows(connection, "predictions"):
        return None
    tiles = f'select uri, "{WINDOW}", label from predictions where "{WINDOW}" is not null'
    unopened: list[Scene] = []
    if _has_windows(connection, "errors"):
        tiles += f' union all select uri, "{WINDOW}", null from {UNLABELLED} where not {_IS_WHOLE}'
        unopened = _unopened(connection, tiles)
    opened = connection.sql(
        f"""select uri, count(*), count(*) filter (label is null) from ({tiles})
            where uri is not null group by uri order by 2 desc, uri limit {_SCENES_LISTED}"""
    ).fetchall()
    if not opened and not unopened:
        return None
    # Where models with other classes labelled some of the images, the newest one's order counts.
    classes = connection.sql(
        """select label, arg_max(label_index, predicted_at) from predictions where label is not null
           group by label order by count(*) desc, label"""
    ).fetchall()
    colours = {str(label): class_colour(int(index)) for label, index in classes}
    scenes = [
        Scene(
            uri,
            num_tiles,
            num_errors,
            _labels_of(connection, uri),
            _draw(connection, tiles, uri, colours) if place < _SCENES_PICTURED else None,
        )
        for place, (uri, num_tiles, num_errors) in enumerate(opened)
    ]
    legend = [(label, "#{:02x}{:02x}{:02x}".format(*colour)) for label, colour in colours.items()][:_LABELS_IN_LEGEND]
    num_unnamed = len(colours) - len(legend)
    if any(scene.num_errors for scene in scenes):
        legend.append(("failed", FAILED_COLOUR))
    num_opened = _one(connection.sql(f"select count(distinct uri) from ({tiles})"))
    listed = (*scenes, *unopened[:_SCENES_LISTED])
    return Scenes(num_opened + len(unopened), listed, tuple(legend), len(unopened), num_unnamed)


def _unopened(connection: duckdb.DuckDBPyConnection, tiles: str) -> list[Scene]:
    """Files that look like rasters and failed as a whole."""
    suffixes = " or ".join(f"lower(uri) like '%{suffix}'" for suffix in RASTER_SUFFIXES)
    rows = connection.sql(
        f"""select uri, count(*), min(status) from {UNLABELLED} where {_IS_WHOLE} and ({suffixes})
            and uri not in (select uri from ({tiles}) where uri is not null) group by uri order by 2 desc, uri"""
    ).fetchall()
    return [Scene(uri, 0, num_errors, (), None, status) for uri, num_errors, status in rows]


def _labels_of(connection: duckdb.DuckDBPyConnection, uri: str) -> tuple[tuple[str, int], ...]:
    query = f"""select label, count(*) from predictions where uri = ? and label is not null
                group by label order by 2 desc, label limit {_LABELS_NAMED}"""
    return tuple((str(label), int(count)) for label, count in connection.execute(query, [uri]).fetchall())


def _draw(
    connection: duckdb.DuckDBPyConnection, tiles: str, uri: str, colours: Mapping[str, tuple[int, int, int]]
) -> str | None:
    """Tiles as they lie in the file, first row on top; where they overlap, the later one shows."""
    query = f'select "{WINDOW}", label from ({tiles}) where uri = ? and {_IS_PLACED}'
    placed = connection.execute(query, [uri]).fetchall()
    if not placed:
        return None
    width = max(window["col_off"] + window["width"] for window, _ in placed)
    height = max(window["row_off"] + window["height"] for window, _ in placed)
    scale = _MAP_PX / max(width, height)
    failed = ImageColor.getrgb(FAILED_COLOUR)
    map_HW4 = np.zeros((max(1, round(height * scale)), max(1, round(width * scale)), 4), np.uint8)
    for window, label in placed:
        top, left = int(window["row_off"] * scale), int(window["col_off"] * scale)
        bottom = max(top + 1, int((window["row_off"] + window["height"]) * scale))
        right = max(left + 1, int((window["col_off"] + window["width"]) * scale))
        map_HW4[top:bottom, left:right] = (*(failed if label is None else colours[label]), 255)
    written = io.BytesIO()
    Image.fromarray(map_HW4).save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()


def _has_windows(connection: duckdb.DuckDBPyConnection, view: str) -> bool:
    return WINDOW in connection.sql(f"select * from {view} limit 0").columns


def _one(relation: duckdb.DuckDBPyRelation) -> int:
    ((value,),) = relation.fetchall()
    return int(value)
