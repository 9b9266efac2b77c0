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

import numpy as np
from PIL import Image

from imgbatch.config import Config, DecodeConfig, FetchConfig, parse_config
from imgbatch.core import storage
from imgbatch.core.decoder import Decoder
from imgbatch.core.fetch import Fetcher
from imgbatch.core.manifest import open_manifest
from imgbatch.core.rows import EmbeddedImages
from imgbatch.core.runs import RunPaths
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, UsageError, row_error
from imgbatch.report.picks import Pick

SIZE = 144
"""Side of a thumbnail, px: 112 on the page, a little more for dense screens."""
_QUALITY = 80
_FETCH_TIMEOUT_S = 10.0
_FETCH_RETRIES = 1
_DECODE_TIMEOUT_S = 5.0

Thumbnail = str | RowError
"""A ``data:`` URI, or why there is none."""
RowKey = tuple[str, int]
"""run_id and row_id."""


def make_thumbnails(out: str, picks: Iterable[Pick]) -> dict[RowKey, Thumbnail]:
    """A centre crop of every image of ``picks``, by run_id and row_id; each image is read once.

    Reading is less patient than the job's: a page can do without a picture.
    """
    by_run: dict[str, dict[int, Pick]] = {}
    for pick in picks:
        by_run.setdefault(pick.run_id, {})[pick.row_id] = pick
    made: dict[RowKey, Thumbnail] = {}
    for run_id, wanted in by_run.items():
        # In row order, so that a row group of embedded images is read once.
        in_order = [wanted[row_id] for row_id in sorted(wanted)]
        thumbnails = _of_run(RunPaths(storage.absolute(out), run_id), in_order)
        made |= {(run_id, pick.row_id): thumbnail for pick, thumbnail in zip(in_order, thumbnails, strict=True)}
    return made


def _of_run(paths: RunPaths, picks: Sequence[Pick]) -> Iterator[Thumbnail]:
    plan = storage.read_json(paths.plan)
    # A retry classifies rows of the same manifest under the parent's row_ids.
    config = parse_config(plan["config"]) if "config" in plan else Config()
    spec = _spec(plan["fields"].get("preprocess"))
    limits = DecodeConfig(
        timeout_s=min(config.decode.timeout_s, _DECODE_TIMEOUT_S),
        memory_mb=config.decode.memory_mb,
        max_pixels=config.decode.max_pixels,
    )
    with Decoder(spec, limits) as decoder:
        if plan.get("has_bytes"):
            unit = decoder.decode(_embedded(config, picks), len(picks))
        else:
            with Fetcher(_impatient(config.fetch)) as fetcher:
                unit = decoder.decode(fetcher.fetch([pick.uri for pick in picks]), len(picks))
    for error, pixels_HWC in zip(unit.errors, unit.pixels_NHWC, strict=True):
        yield error or data_uri(pixels_HWC)


def _spec(stored: dict[str, object] | None) -> PreprocessSpec:
    spec = PreprocessSpec.from_dict(stored) if stored else PreprocessSpec()
    return replace(spec, resize_size=SIZE, crop_size=SIZE, interpolation="bicubic")


def _impatient(config: FetchConfig) -> FetchConfig:
    return config.model_copy(
        update={
            "timeout_s": min(config.timeout_s, _FETCH_TIMEOUT_S),
            "retries": min(config.retries, _FETCH_RETRIES),
        }
    )


def _embedded(config: Config, picks: Sequence[Pick]) -> Iterator[bytes | RowError]:
    try:
        images = EmbeddedImages(open_manifest(str(config.input.manifest)))
    except UsageError as error:
        yield from [row_error(Status.NOT_FOUND, Stage.FETCH, error)] * len(picks)
        return
    for data in images.read([pick.row_id for pick in picks]):
        yield data or row_error(Status.EMPTY, Stage.FETCH, "no bytes in the manifest")


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
