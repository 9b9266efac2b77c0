"""Small pictures of rows, made from the images as they are now.

Images are fetched and decoded by the job's own parts, in the child process that can be killed. What cannot be shown
is a reason in place of a picture.

Legend of the shape suffixes: ``H`` height, ``W`` width, ``C`` channel.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from imgbatch.config import Config, FetchConfig, parse_config
from imgbatch.core import storage
from imgbatch.core.access import fetch_settings
from imgbatch.core.bands import visible_rgb
from imgbatch.core.manifest import open_manifest
from imgbatch.core.row_decoder import RowDecoder, image_columns
from imgbatch.core.rows import select_rows
from imgbatch.core.runs import RunPaths
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, UsageError, row_error
from imgbatch.report.picks import Pick
from imgbatch.schema import ROW_ID, URI

SIZE = 144
"""Side of a thumbnail, px: 112 on the page, a little more for dense screens."""
_QUALITY = 80
_FETCH_TIMEOUT_S = 10.0
_FETCH_RETRIES = 1
_DECODE_TIMEOUT_S = 5.0
_RASTER_FIELD = "geo.max_nodata"
"""In the fingerprint of runs that read rasters."""

Thumbnail = str | RowError
"""A ``data:`` URI, or why there is none."""
RowKey = tuple[str, int]
"""run_id and row_id."""


def make_thumbnails(out: str, picks: Iterable[Pick], config: Config | None = None) -> dict[RowKey, Thumbnail]:
    """A centre crop of every image of ``picks``, by run_id and row_id; each image is read once.

    Reading is less patient than the job's: a page can do without a picture.

    Args:
        config: its section ``fetch`` holds where the runs' commands said nothing else; none: as they said.
    """
    access = (config or Config()).fetch
    by_run: dict[str, dict[int, Pick]] = {}
    for pick in picks:
        by_run.setdefault(pick.run_id, {})[pick.row_id] = pick
    made: dict[RowKey, Thumbnail] = {}
    for run_id, wanted in by_run.items():
        # In row order, so that a row group of embedded images is read once.
        in_order = [wanted[row_id] for row_id in sorted(wanted)]
        thumbnails = _of_run(RunPaths(storage.absolute(out), run_id), in_order, access)
        made |= {(run_id, pick.row_id): thumbnail for pick, thumbnail in zip(in_order, thumbnails, strict=True)}
    return made


def _of_run(paths: RunPaths, picks: Sequence[Pick], access: FetchConfig) -> Iterator[Thumbnail]:
    plan = storage.read_json(paths.plan)
    # A retry classifies rows of the same manifest under the parent's row_ids.
    config = parse_config(plan["config"]) if "config" in plan else Config()
    config = config.model_copy(update={"fetch": fetch_settings(plan, access)})
    spec = _spec(plan["fields"].get("preprocess"))
    try:
        embedded = open_manifest(str(config.input.manifest)) if plan.get("has_bytes") else None
    except UsageError as error:
        yield from [row_error(Status.NOT_FOUND, Stage.FETCH, error)] * len(picks)
        return
    if embedded is not None and embedded.content_identity() != plan["fields"].get("manifest"):
        changed = row_error(Status.CHANGED, Stage.FETCH, f"{embedded.path}: is not the manifest that was classified")
        yield from [changed] * len(picks)
        return
    rows = pa.table({ROW_ID: [pick.row_id for pick in picks], URI: pa.array([pick.uri for pick in picks], pa.string())})
    if _RASTER_FIELD in plan["fields"]:
        rows = _read_rows(paths, rows[ROW_ID].combine_chunks())
    with RowDecoder(spec, _impatient(config), columns=rows.column_names, embedded=embedded) as decoder:
        unit = decoder.decode(rows)
    for failed, pixels_HWC in zip(unit.errors, visible_rgb(unit.pixels_NHWC), strict=True):
        yield failed or data_uri(pixels_HWC)


def _read_rows(paths: RunPaths, row_ids: pa.Array) -> pa.Table:
    """Where the images of rows of a run are, in the order of the rows."""
    return pa.concat_tables(select_rows(_stored_rows(paths), row_ids)).sort_by(ROW_ID)


def _stored_rows(paths: RunPaths) -> Iterator[pa.Table]:
    """A file at a time: there are as many rows as images."""
    for info in storage.list_files(paths.rows, ".parquet"):
        with storage.open_ranges(info.uri) as file:
            stored = pq.ParquetFile(file)
            yield stored.read(image_columns(stored.schema_arrow.names))


def _spec(stored: dict[str, Any] | None) -> PreprocessSpec:
    spec = PreprocessSpec.from_dict(stored) if stored else PreprocessSpec()
    return replace(spec, resize_size=SIZE, crop_size=SIZE, interpolation="bicubic")


def _impatient(config: Config) -> Config:
    fetch = {
        "timeout_s": min(config.fetch.timeout_s, _FETCH_TIMEOUT_S),
        "retries": min(config.fetch.retries, _FETCH_RETRIES),
    }
    decode = {"timeout_s": min(config.decode.timeout_s, _DECODE_TIMEOUT_S)}
    return config.model_copy(
        update={
            "fetch": config.fetch.model_copy(update=fetch),
            "decode": config.decode.model_copy(update=decode),
        }
    )


def data_uri(pixels_HWC: np.ndarray) -> str:
    """A uint8 image as a JPEG that can stand in a page."""
    encoded = io.BytesIO()
    Image.fromarray(pixels_HWC).save(encoded, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def shrink_picture(png: bytes, max_height: int) -> str:
    """A PNG file as a smaller JPEG that can stand in a page.

    Args:
        max_height: px; a picture that is no taller keeps its size.
    """
    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        picture.thumbnail((picture.width, max_height))
        return data_uri(np.asarray(picture.convert("RGB")))
