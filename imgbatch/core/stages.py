"""The job's stages, the same in every engine: a unit's rows come in, a receipt goes out.

    decode    unit index      -> decoded block   (fetch, decode, orient, resize, crop to uint8 NHWC)
    classify  decoded block   -> classified block (normalise on the device, forward, probabilities, result rows)
    commit    classified block -> receipt         (one immutable file per unit, create-if-absent)

Blocks are Arrow tables, one per unit, which an engine passes between processes without serialising pixels. They are
copied three times on their way to the model: into the unit's memory, which the decoding child shares with its parent;
into the engine's object store, which is mapped wherever a block is read; and into the batch, on a GPU in pinned memory.
Where some rows of a unit are left to the GPU (``decode.gpu_share``), the pixels of the others are copied twice more, so
that only these travel.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyarrow as pa

from imgbatch.core import results, storage
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.decoder import DecodedUnit, Payload
from imgbatch.core.failpoints import failpoint
from imgbatch.core.gpu_share import LeftToGpu
from imgbatch.core.manifest import open_manifest
from imgbatch.core.plan import Run
from imgbatch.core.results import LabelRules, Receipt, prediction_columns, unit_table
from imgbatch.core.row_decoder import RowDecoder, image_columns
from imgbatch.core.rows import RowsReader
from imgbatch.errors import RowError, Stage, Status, row_error
from imgbatch.schema import ROW_ID, UNIT_SCHEMA

UNIT = "unit"
PIXELS = "pixels"
ENCODED = "encoded"
"""The image itself, where the GPU is to decode it."""
DECODE_COLUMNS = (UNIT, "started_at", "num_changed", "fetch_s", "decode_s")
"""What a block carries beside its rows, the same in each: the unit, and what it took so far."""
_SHARE_OF_WATCH = 0.8
"""Of the time after which the watchdog ends the job, for one unit's files and pixels."""
_SECONDS = ("fetch_s", "decode_s", "classify_s")
_FEW_FAILED = 1 / 64
"""Of a unit's rows: fewer take less time in the model, as black images, than copying the others together would."""


class DecodeStage:
    """Fetches and decodes units. Holds child processes: close it, or use it as a context manager.

    Several threads may call it: ``processes`` units are decoded at once, and of those that wait the first files are
    on their way.
    """

    row_decoder: ClassVar[type[RowDecoder]] = RowDecoder
    """A simulation puts another in its place."""

    def __init__(self, run: Run, *, processes: int = 1, on_cpu: bool = False, watched: bool = True) -> None:
        """
        Args:
            processes: units decoded at once.
            on_cpu: leave nothing to the GPU, whatever the configuration says.
            watched: a watchdog waits for units, so that each has its time.
        """
        storage.configure(run.config.storage)
        self._run = run
        self._allowed_s = _SHARE_OF_WATCH * run.config.run.no_progress_s if watched else math.inf
        # A model that takes no JPEGs gets error rows for them, whoever would decode them.
        self._for_gpu = run.config.decode.gpu_share > 0 and not on_cpu and "JPEG" in run.spec.decode.formats
        self._rows = RowsReader(run.paths)
        self.columns = image_columns(self._rows.schema.names)
        """What :meth:`decode_rows` needs of a row."""
        embedded = open_manifest(str(run.config.input.manifest)) if run.plan.has_bytes else None
        self._decoder = self.row_decoder(
            run.spec, run.config, columns=self.columns, embedded=embedded, processes=processes
        )
        self._reading, self._counting = threading.Lock(), threading.Lock()
        self._reported_changed = 0

    def __call__(self, unit_index: int) -> pa.Table:
        """The unit's decoded block: row_id, pixels (uint8 HWC, a cell per row, zeros where it failed) and errors.

        With ``decode.gpu_share``, that share's encoded images too, whose pixels are null and take no room.
        """
        started_at = time.time()
        unit = self._run.plan.layout.unit(unit_index)
        with self._reading:
            rows = self._rows.read(unit, self.columns)
        payloads = _Waiting(self._decoder.request(rows), rows.num_rows, allowed_s=self._allowed_s)
        left = LeftToGpu(payloads, rows[ROW_ID].to_pylist(), self._run.config.decode) if self._for_gpu else None
        decoded = self._decoder.decode_requested(payloads if left is None else left, rows.num_rows)
        with self._counting:
            num_changed = self._decoder.num_changed - self._reported_changed
            self._reported_changed += num_changed
        failpoint("decode.after_unit", unit_index)
        is_here_N, encoded = np.ones(unit.num_rows, bool), {}
        if left is not None:
            is_here_N[:] = [image is None for image in left.images]
            encoded[ENCODED] = pa.array(left.images, pa.binary())
            for row, header in left.kept():
                decoded.widths[row], decoded.heights[row] = header.width, header.height
        return pa.table(
            {
                ROW_ID: rows[ROW_ID].combine_chunks(),
                PIXELS: _pixel_column(decoded.pixels_NHWC, is_here_N),
                **encoded,
                "width": decoded.widths,
                "height": decoded.heights,
                **_error_columns(decoded.errors),
                UNIT: _constant(unit.index, unit.num_rows, pa.int32()),
                "started_at": _constant(started_at, unit.num_rows, pa.float64()),
                "num_changed": _constant(num_changed, unit.num_rows, pa.int32()),
                "fetch_s": _constant(payloads.seconds, unit.num_rows, pa.float64()),
                "decode_s": _constant(decoded.decode_s, unit.num_rows, pa.float64()),
            }
        )

    def decode_rows(self, rows: pa.Table) -> DecodedUnit:
        """Any rows with :attr:`columns`, fetched and decoded."""
        return self._decoder.decode(rows)

    def close(self) -> None:
        self._decoder.close()
        self._rows.close()

    def __enter__(self) -> DecodeStage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Waiting:
    """Payloads, and the seconds that whoever takes them has waited for them.

    When a unit's time is up, which counts from its first row, the rows that are left are failures that may pass: a unit
    that took as long as the watchdog waits would be begun anew for ever.
    """

    def __init__(self, payloads: Iterable[Payload], num_rows: int, *, allowed_s: float) -> None:
        self._payloads = iter(payloads)
        self._num_left = num_rows
        self._allowed_s = allowed_s
        self._began: float | None = None
        self.seconds = 0.0

    def __iter__(self) -> _Waiting:
        return self

    def __next__(self) -> Payload:
        if not self._num_left:
            raise StopIteration
        self._num_left -= 1
        started = time.perf_counter()
        self._began = self._began or started
        if started - self._began > self._allowed_s:
            return row_error(
                Status.FETCH_FAILED,
                Stage.FETCH,
                f"the unit took longer than {self._allowed_s:g} s ({_SHARE_OF_WATCH:g} of run.no_progress_s)",
            )
        try:
            return next(self._payloads)
        finally:
            self.seconds += time.perf_counter() - started


class ClassifyStage:
    """Runs the model over decoded blocks. Loads it once; what runs it is imported here and not before.

    ``streams`` threads may call it at once: they share the weights, but for MNN's.
    """

    def __init__(self, run: Run, *, batch_size: int, num_threads: int | None, streams: int = 1) -> None:
        """``num_threads``: of one unit on a CPU, or none for as many as the library likes."""
        storage.configure(run.config.storage)
        plan = run.plan
        self._spec = run.spec
        self._rules = LabelRules(
            run.bundle.class_names, run.bundle.task, plan.probabilities, plan.config.output.top_k, run.bundle.thresholds
        )
        bundle = replace(run.bundle, preprocess=run.spec)
        self._predictor = build_predictor(
            bundle,
            run.backend,
            device=plan.device,
            batch_size=fitting_batch_size(
                batch_size,
                unit_rows=plan.layout.unit_rows,
                backend=run.backend,
                configured=run.config.classify.batch_size,
            ),
            features=plan.config.output.embeddings,
            num_threads=num_threads,
            streams=streams,
        )
        self._gpu_decoder = None
        if run.config.decode.gpu_share:
            from imgbatch.core.gpu_decode import GpuDecoder

            self._gpu_decoder = GpuDecoder(run.spec, run.config.decode, device=plan.device)

    def __call__(self, block: pa.Table) -> pa.Table:
        """The unit's result rows (:data:`UNIT_SCHEMA`) with the unit's index and seconds beside them."""
        started = time.perf_counter()
        failpoint("classify.unit", block[ROW_ID][0].as_py())
        errors = _errors_of(block)
        images_NHWC, widths, heights = self._images(block), block["width"].to_numpy(), block["height"].to_numpy()
        if ENCODED in block.column_names and block[ENCODED].null_count < block.num_rows:
            widths, heights = widths.copy(), heights.copy()
            self._decode_on_gpu(block[ENCODED], images_NHWC, widths, heights, errors)
        rows = np.arange(block.num_rows)
        ok = np.array([error is None for error in errors], dtype=bool)
        if (~ok).mean() > _FEW_FAILED:
            images_NHWC, rows = images_NHWC[ok], rows[ok]
        predictions = self._predictor.predict(images_NHWC)
        for row, error in zip(rows, predictions.errors, strict=True):
            errors[row] = errors[row] or error
        predicted = np.array([errors[row] is None for row in rows], dtype=bool)
        features_ND = predictions.features_ND
        if features_ND is not None:
            features_ND = features_ND[predicted]
        table = unit_table(
            block[ROW_ID].combine_chunks(),
            errors,
            widths,
            heights,
            prediction_columns(predictions.probs_NK[predicted], self._rules, features_ND),
        )
        for name in DECODE_COLUMNS:
            table = table.append_column(name, block[name])
        elapsed = _constant(time.perf_counter() - started, table.num_rows, pa.float64())
        return table.append_column("classify_s", elapsed)

    def _decode_on_gpu(
        self,
        encoded: pa.ChunkedArray,
        images_NHWC: np.ndarray,
        widths: np.ndarray,
        heights: np.ndarray,
        errors: list[RowError | None],
    ) -> None:
        """Settles the rows that have an encoded image, in what the block says of all rows."""
        assert self._gpu_decoder is not None
        rows = np.flatnonzero(encoded.is_valid())
        sizes = list(zip(widths[rows].tolist(), heights[rows].tolist(), strict=True))
        decoded = self._gpu_decoder.decode(encoded.take(rows).to_pylist(), sizes)
        images_NHWC[rows], widths[rows], heights[rows] = decoded.pixels_NHWC, decoded.widths, decoded.heights
        for row, error in zip(rows, decoded.errors, strict=True):
            errors[row] = error

    def close(self) -> None:
        """End what decoding for the GPU may have started."""
        if self._gpu_decoder is not None:
            self._gpu_decoder.close()

    def _images(self, block: pa.Table) -> np.ndarray:
        """Of all rows; where some are left to the GPU, in memory of their own."""
        column = block[PIXELS]
        # A single chunk stays where it is, in the object store; combine_chunks would copy it even so.
        cells = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        shape_HWC = (self._spec.crop_size, self._spec.crop_size, self._spec.num_channels)
        _, offsets, values = cells.buffers()
        starts = np.frombuffer(offsets, np.int64)[cells.offset :]
        here_NHWC = np.frombuffer(values or b"", np.uint8)[starts[0] : starts[len(cells)]].reshape(-1, *shape_HWC)
        if not cells.null_count:
            return here_NHWC
        images_NHWC = np.zeros((len(cells), *shape_HWC), np.uint8)
        images_NHWC[cells.is_valid().to_numpy(zero_copy_only=False)] = here_NHWC
        return images_NHWC


class CommitStage:
    """Writes the unit file of a classified block. Several threads may call it."""

    def __init__(self, run: Run, *, defer: bool) -> None:
        """``defer``: leave units that failed for reasons that may pass to a later pass."""
        storage.configure(run.config.storage)
        self._run = run
        self._rows = RowsReader(run.paths)
        self._reading = threading.Lock()
        self._defer_above = run.config.errors.max_rate if defer else None

    def __call__(self, block: pa.Table) -> Receipt:
        started = time.perf_counter()
        unit_index = block[UNIT][0].as_py()
        unit = self._run.plan.layout.unit(unit_index)
        with self._reading:
            planned = self._rows.read(unit, [ROW_ID])[ROW_ID].combine_chunks()
        failpoint("commit.before", unit_index)
        receipt = results.commit_unit(
            self._run.paths, unit_index, planned, block.select(UNIT_SCHEMA.names), defer_above=self._defer_above
        )
        failpoint("commit.after", unit_index)
        seconds = {name.removesuffix("_s"): block[name][0].as_py() for name in _SECONDS}
        seconds["commit"] = time.perf_counter() - started
        started_at, num_changed = (block[name][0].as_py() for name in ("started_at", "num_changed"))
        return replace(receipt, seconds=seconds, started_at=started_at, num_changed=num_changed)

    def close(self) -> None:
        self._rows.close()


def _pixel_column(pixels_NHWC: np.ndarray, is_here_N: np.ndarray) -> pa.Array:
    """A cell for each row, null where ``is_here_N`` is false; pixels are copied only where there is such a row."""
    validity = None
    if not is_here_N.all():
        pixels_NHWC, validity = pixels_NHWC[is_here_N], pa.array(is_here_N).buffers()[1]
    offsets = np.zeros(len(is_here_N) + 1, np.int64)
    offsets[1:] = is_here_N.cumsum() * math.prod(pixels_NHWC.shape[1:])
    buffers = [validity, pa.py_buffer(offsets), pa.py_buffer(pixels_NHWC)]
    return pa.Array.from_buffers(pa.large_binary(), len(is_here_N), buffers)


def _error_columns(errors: Sequence[RowError | None]) -> dict[str, pa.Array]:
    return {
        "status": pa.array([e.status.value if e else None for e in errors], pa.string()),
        "error_stage": pa.array([e.stage.value if e else None for e in errors], pa.string()),
        "error_message": pa.array([e.message if e else None for e in errors], pa.string()),
        "attempts": pa.array([e.attempts if e else None for e in errors], pa.int32()),
    }


def _errors_of(block: pa.Table) -> list[RowError | None]:
    columns = (block[name].to_pylist() for name in ("status", "error_stage", "error_message", "attempts"))
    return [
        RowError(Status(status), Stage(stage), message, attempts) if status is not None else None
        for status, stage, message, attempts in zip(*columns, strict=True)
    ]


def fitting_batch_size(batch_size: int, *, unit_rows: int, backend: Backend, configured: int | str) -> int:
    """What is compiled for larger batches than a unit would fill all of them up.

    Args:
        configured: ``classify.batch_size``.
    """
    variant = backend.variant
    if variant is not None and variant.target == "onnx-int8" and variant.device == "cuda":
        # TensorRT builds an engine for each size, in minutes; that of the variant's own is there already.
        return configured if isinstance(configured, int) else variant.batch_size
    return min(batch_size, unit_rows)


def _constant(value: float, num_rows: int, arrow_type: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, arrow_type), num_rows)
