"""What is asked of a raster: which file, which part of it, which bands; as a value that travels to the decoder."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

_LENGTH = struct.Struct("<I")


class Window(NamedTuple):
    """A part of a raster, px, as the manifest's column ``window`` has it."""

    col_off: int
    row_off: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class RasterRequest:
    """One image to read from a raster."""

    uri: str | None = None
    """A local path or an ``s3://`` URI; none: the raster itself is in ``data``."""
    window: Window | None = None
    """None: all of it."""
    bands: tuple[int, ...] | None = None
    """From 1, in the order of the channels; none: what the model or the raster says."""
    data: bytes | None = None
    """The encoded raster, where the manifest embeds it."""

    def to_bytes(self) -> bytes:
        described = json.dumps(asdict(replace(self, data=None))).encode()
        return b"".join((_LENGTH.pack(len(described)), described, self.data or b""))

    @classmethod
    def from_bytes(cls, message: bytes) -> RasterRequest:
        """The inverse of :meth:`to_bytes`."""
        end = _LENGTH.size + _LENGTH.unpack_from(message)[0]
        values: dict[str, Any] = json.loads(message[_LENGTH.size : end])
        values["window"] = Window(*values["window"]) if values["window"] else None
        values["bands"] = tuple(values["bands"]) if values["bands"] else None
        return cls(**values | {"data": message[end:] if values["uri"] is None else None})
