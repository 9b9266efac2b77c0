"""Which rows a decode actor leaves to the GPU (``decode.gpu_share``), without torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sequence

from imgbatch.config import DecodeConfig
from imgbatch.core.decoder import Payload
from imgbatch.core.jpeg_header import JpegHeader, read_plain_header
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError

_GOLDEN = 0x9E3779B1
"""2^32 divided by the golden ratio: multiples of it spread evenly, whatever part of the rows a unit holds."""
MAX_ENCODED_BYTES = 80 * 2**20
"""Of a unit's images that are left to the GPU: as many as its pixels may have. What is beyond, the CPU decodes."""


def check_gpu_share(config: DecodeConfig, spec: PreprocessSpec) -> None:
    """Raises :class:`UsageError` where ``decode.gpu_share`` cannot be had."""
    if not config.gpu_share:
        return
    if spec.bands is not None or spec.median_size or spec.reducing_gap:
        what = "a median filter (preprocess.median_size)"
        if spec.bands is not None:
            what = "bands of rasters"
        elif spec.reducing_gap:
            what = "reduced decoding (preprocess.reducing_gap)"
        raise UsageError(
            f"decode.gpu_share: this model's images go through {what}, which only the CPU does; set it to 0"
        )
    if importlib.util.find_spec("torchcodec") is None:
        raise UsageError("decode.gpu_share: torchcodec is not installed; pip install 'imgbatch[nvjpeg]'")


def is_for_gpu(row_id: int, share: float) -> bool:
    """Whether a row is among the ``share`` of rows that is left to the GPU if its image allows."""
    return (row_id * _GOLDEN) % 2**32 < share * 2**32


class LeftToGpu:
    """Payloads as they pass by, less those that are left to the GPU, which it keeps.

    Args:
        payloads: of a unit's rows.
        row_ids: of the same rows.
        config: its ``gpu_share`` and ``max_pixels``.
    """

    def __init__(self, payloads: Iterable[Payload], row_ids: Sequence[int], config: DecodeConfig) -> None:
        self._payloads = zip(payloads, row_ids, strict=True)
        self._config = config
        self.images: list[bytes | None] = []
        """One per row so far: the encoded image, if it is left to the GPU."""
        self._headers: list[JpegHeader | None] = []
        self._num_bytes = 0

    def __iter__(self) -> Iterator[Payload]:
        for payload, row_id in self._payloads:
            image = payload if isinstance(payload, bytes) and is_for_gpu(row_id, self._config.gpu_share) else None
            header = self._take(image) if image is not None else None
            self._headers.append(header)
            self.images.append(image if header is not None else None)
            yield payload if header is None else None

    def _take(self, image: bytes) -> JpegHeader | None:
        """Its header, if the GPU is to decode it."""
        header = read_plain_header(image)
        if header is None or header.width * header.height > self._config.max_pixels:
            return None
        if self._num_bytes + len(image) > MAX_ENCODED_BYTES:
            return None
        self._num_bytes += len(image)
        return header

    def kept(self) -> Iterator[tuple[int, JpegHeader]]:
        """Row and header of each image that is left to the GPU."""
        return ((row, header) for row, header in enumerate(self._headers) if header is not None)
