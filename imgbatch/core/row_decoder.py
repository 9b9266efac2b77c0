"""From rows of a manifest to crops, whether the images are files, embedded bytes or parts of rasters."""

from __future__ import annotations

import queue
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from imgbatch.config import Config, FetchConfig
from imgbatch.core import storage
from imgbatch.core.access import Refused, allowed_path, check_scheme
from imgbatch.core.bands import require_rasterio
from imgbatch.core.byte_ranges import split_range
from imgbatch.core.decoder import DecodedUnit, Decoder, Payload
from imgbatch.core.fetch import Fetcher
from imgbatch.core.manifest import Manifest
from imgbatch.core.raster_request import RasterRequest, Window
from imgbatch.core.rows import EmbeddedImages
from imgbatch.core.s3 import unquoted_etag
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import RowError, Stage, Status, row_error
from imgbatch.schema import BANDS, ETAG, ROW_ID, URI, WINDOW

_NO_BYTES = row_error(Status.EMPTY, Stage.FETCH, "the bytes column is null")


def image_columns(names: Iterable[str]) -> list[str]:
    """Those of a table's columns that say where a row's image is, and what it was when it was listed."""
    return [name for name in names if name in (ROW_ID, URI, ETAG, WINDOW, BANDS)]


def reads_rasters(names: Iterable[str], spec: PreprocessSpec) -> bool:
    """Whether rows with these columns are, for this model, to be read as rasters: by rasterio, without fetching."""
    return spec.bands is not None or not {WINDOW, BANDS}.isdisjoint(names)


class RowDecoder:
    """Rows of a manifest in, their crops out. Holds child processes: close it, or use it as a context manager.

    A row is a raster where the model states its bands, or where the row has a ``window`` or ``bands``. Any other is
    fetched whole and decoded as a photograph.

    Args:
        config: its sections ``fetch``, ``decode`` and ``geo``, and ``input.if_changed``.
        columns: of the rows to come.
        embedded: the manifest whose ``bytes`` hold the images; none: they are behind ``uri``.
        processes: children, and so units that are decoded at once.

    Raises:
        UsageError: there will be rasters, and the extra ``geo`` is not installed.
    """

    def __init__(
        self,
        spec: PreprocessSpec,
        config: Config,
        *,
        columns: Iterable[str],
        embedded: Manifest | None = None,
        processes: int = 1,
    ) -> None:
        self.spec = spec
        self.max_pixels = config.decode.max_pixels
        self._only_rasters = spec.bands is not None
        self._has_rasters = reads_rasters(columns, spec)
        if self._has_rasters:
            require_rasterio()
        self._fetch_config = config.fetch
        self._if_changed = config.input.if_changed
        self._num_changed = 0
        self._lock = threading.Lock()
        self._fetcher = Fetcher(config.fetch, if_changed=config.input.if_changed)
        max_nodata = config.geo.max_nodata if self._has_rasters else None
        self._decoders = [Decoder(spec, config.decode, max_nodata=max_nodata) for _ in range(processes)]
        self._idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._embedded = EmbeddedImages(embedded) if embedded is not None else None

    def __enter__(self) -> RowDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the children and give up what is in flight; for good."""
        for decoder in self._decoders:
            decoder.close()
        self._fetcher.close()

    @property
    def fetch_s(self) -> float:
        """Seconds waited for files, in all; for one thread at a time."""
        return self._fetcher.fetch_s

    @property
    def num_changed(self) -> int:
        """Objects that were not what the manifest lists, in all."""
        return self._fetcher.num_changed + self._num_changed

    def request(self, rows: pa.Table) -> Iterable[Payload]:
        """What to decode of rows with the columns of :func:`image_columns`; the first files are on their way."""
        return self._mixed(rows) if self._has_rasters else self._whole(rows)

    def decode(self, rows: pa.Table) -> DecodedUnit:
        """Rows with the columns of :func:`image_columns`, fetched and decoded."""
        return self.decode_requested(self.request(rows), rows.num_rows)

    def decode_requested(self, payloads: Iterable[Payload], num_rows: int) -> DecodedUnit:
        """What :meth:`request` gave for ``num_rows`` rows, decoded; waits while every child is at work for others."""
        decoder = self._idle.get()
        try:
            return decoder.decode(payloads, num_rows)
        finally:
            self._idle.put(decoder)

    def _whole(self, rows: pa.Table) -> Iterable[bytes | RowError]:
        if self._embedded is None:
            return self._fetcher.fetch(rows[URI].to_pylist(), _etags(rows))
        images = self._embedded.read(rows[ROW_ID].to_pylist())
        return (data if data is not None else _NO_BYTES for data in images)

    def _mixed(self, rows: pa.Table) -> Iterator[Payload]:
        windows, bands = (_cells(rows, name) for name in (WINDOW, BANDS))
        is_raster = [self._only_rasters or part is not None or bool(b) for part, b in zip(windows, bands, strict=True)]
        # Everything that has bytes, in order: what is embedded, and photographs among rasters.
        photographs = rows.filter(pa.array([not raster for raster in is_raster], pa.bool_()))
        whole = iter(self._whole(rows if self._embedded else photographs))
        found: dict[tuple[str | None, str | None], str | RowError] = {}
        objects = zip(_cells(rows, URI), _etags(rows) or [None] * rows.num_rows, strict=True)
        for listed, part, row_bands, raster in zip(objects, windows, bands, is_raster, strict=True):
            data = next(whole) if self._embedded or not raster else None
            if data is not None and (not raster or isinstance(data, RowError)):
                yield data
                continue
            if data is None and listed not in found:
                found[listed] = self._find_listed(*listed)
            place = None if data is not None else found[listed]
            if isinstance(place, RowError):
                yield place
                continue
            window = Window(**part) if part is not None else None
            yield RasterRequest(place, window, tuple(row_bands) if row_bands else None, data)

    def _find_listed(self, uri: str | None, etag: str | None) -> str | RowError:
        """As :func:`find_raster`; an object is compared with what the manifest lists, which takes a request."""
        place = find_raster(uri, self._fetch_config)
        if isinstance(place, RowError) or not etag or self._if_changed == "ignore" or not storage.is_s3(place):
            return place
        try:
            found = unquoted_etag(storage.file_info(place).version)
        except Exception:  # of every kind; whoever opens the object says what is wrong
            return place
        if not found or found == unquoted_etag(etag):
            return place
        with self._lock:
            self._num_changed += 1
        if self._if_changed == "warn":
            return place
        return row_error(Status.CHANGED, Stage.FETCH, f"the object's etag is {found}, the manifest's {etag}")


def _etags(rows: pa.Table) -> Sequence[str | None] | None:
    known = ETAG in rows.column_names and pa.types.is_string(rows.schema.field(ETAG).type)
    return rows[ETAG].to_pylist() if known else None


def _cells(rows: pa.Table, name: str) -> Sequence:
    return rows[name].to_pylist() if name in rows.column_names else [None] * rows.num_rows


def find_raster(uri: str | None, config: FetchConfig) -> str | RowError:
    """Where a raster is to be opened, or why it is not: what is not allowed, not there, or no plain file.

    One in an object store is looked for by whoever opens it.
    """
    if not uri:
        return row_error(Status.NOT_FOUND, Stage.FETCH, "the uri is empty")
    if split_range(uri)[1] is not None:
        return row_error(Status.REFUSED, Stage.FETCH, "rasters are not read out of tar files; unpack the shard")
    try:
        if storage.is_s3(uri):
            check_scheme(uri, config)
            return uri
        if not storage.is_local(uri):
            return row_error(Status.REFUSED, Stage.FETCH, "rasters are read from local files and s3:// only")
        path = allowed_path(uri, config)
        mode = path.stat().st_mode
    except Refused as error:
        return row_error(Status.REFUSED, Stage.FETCH, error)
    except PermissionError as error:
        return row_error(Status.FORBIDDEN, Stage.FETCH, f"{type(error).__name__}: {error}")
    except (FileNotFoundError, NotADirectoryError) as error:
        return row_error(Status.NOT_FOUND, Stage.FETCH, f"{type(error).__name__}: {error}")
    except OSError as error:  # as a share has that is away for the moment
        return row_error(Status.FETCH_FAILED, Stage.FETCH, f"{type(error).__name__}: {error}")
    # Anything else may hang whoever opens it, as a named pipe does.
    return str(path) if stat.S_ISREG(mode) else row_error(Status.REFUSED, Stage.FETCH, "not a regular file")
