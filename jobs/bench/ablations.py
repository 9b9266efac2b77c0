"""What each part of the job costs: the same job once more without it.

    python -m jobs.bench.ablations [--images 8000] [--repeats 3] [--model BUNDLE] [--folder IMAGES]
        [--unit-rows 128] [--set classify.backend=openvino_int8 ...] [-o RESULT]

The engine is the real one, in one Ray, with actors of which a part does nothing:

    no decode      files are not even read; blocks of zeros go the same way
    no model       every image gets the same probabilities
    no write       receipts come back, and no unit file is written
    no protection  images are decoded in the actor's own threads instead of in child processes that can be killed

Runs alternate; the rate is that of the middle of each, by the times of its receipts, and its ratio is taken to the
whole job of the same round. What does not get faster without a part is not held up by it: where stages share the
cores, the rates without them say how the cores' time is divided.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.config import load_config
from imgbatch.core.decoder import DecodedUnit, Payload
from imgbatch.core.images import decode_image
from imgbatch.core.plan import Run, plan_run
from imgbatch.core.results import Receipt
from imgbatch.core.row_decoder import RowDecoder
from imgbatch.core.stages import UNIT, DecodeStage
from imgbatch.errors import RowError
from imgbatch.runtime.actors import ClassifyActor, DecodeActor
from imgbatch.runtime.own_ray import without_data_actors
from imgbatch.runtime.pools import choose_pools, this_machine
from imgbatch.runtime.ray_data import RayEngine
from imgbatch.runtime.session import ray_session
from jobs.bench.common import describe_machine, find_photographs, save_trivial_model, spread
from jobs.bench.scale import NoModel

WHOLE = "whole job"


class ZerosDecoder(RowDecoder):
    """Asks for nothing and says that everything is black."""

    def request(self, rows: pa.Table) -> Iterable[Payload]:
        return [b""] * rows.num_rows

    def decode_requested(self, payloads: Iterable[Payload], num_rows: int) -> DecodedUnit:
        side, channels = self.spec.crop_size, self.spec.num_channels
        sizes = np.full(num_rows, side, np.int32)
        pixels_NHWC = np.zeros((num_rows, side, side, channels), np.uint8)
        return DecodedUnit(pixels_NHWC, sizes, sizes, [None for _ in payloads], decode_s=0.0)


class BareDecoder(RowDecoder):
    """Decodes in the thread that calls."""

    def decode_requested(self, payloads: Iterable[Payload], num_rows: int) -> DecodedUnit:
        side = self.spec.crop_size
        unit = DecodedUnit(
            np.zeros((num_rows, side, side, 3), np.uint8),
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.int32),
            [None] * num_rows,
            decode_s=0.0,
        )
        for row, payload in enumerate(payloads):
            assert isinstance(payload, bytes), payload
            decoded = decode_image(payload, self.spec, max_pixels=self.max_pixels)
            if isinstance(decoded, RowError):
                unit.errors[row] = decoded
            else:
                unit.pixels_NHWC[row], unit.widths[row], unit.heights[row] = (
                    decoded.pixels_HWC,
                    decoded.width,
                    decoded.height,
                )
        return unit


class ZerosStage(DecodeStage):
    row_decoder: ClassVar[type[RowDecoder]] = ZerosDecoder


class BareStage(DecodeStage):
    row_decoder: ClassVar[type[RowDecoder]] = BareDecoder


class NoDecodeActor(DecodeActor):
    decode_stage: ClassVar[type[DecodeStage]] = ZerosStage


class NoProtectionActor(DecodeActor):
    decode_stage: ClassVar[type[DecodeStage]] = BareStage


class NoModelActor(ClassifyActor):
    classify_stage = NoModel


class ReceiptOnly:
    """Says that a unit is committed, which is all the driver hears anyway."""

    def __init__(self, run: Run, *, defer: bool) -> None:
        del run, defer

    def __call__(self, block: pa.Table) -> Receipt:
        counts = dict(Counter(block["status"].to_pylist()))
        return Receipt(block[UNIT][0].as_py(), "committed", block.num_rows, counts)


class NoWriteActor(ClassifyActor):
    commit_stage = ReceiptOnly


class NoDecodeEngine(RayEngine):
    decode_actor = NoDecodeActor


class NoProtectionEngine(RayEngine):
    decode_actor = NoProtectionActor


class NoModelEngine(RayEngine):
    classify_actor = NoModelActor


class NoWriteEngine(RayEngine):
    classify_actor = NoWriteActor


ENGINES: dict[str, type[RayEngine]] = {
    WHOLE: RayEngine,
    "no decode": NoDecodeEngine,
    "no model": NoModelEngine,
    "no write": NoWriteEngine,
    "no protection": NoProtectionEngine,
}


def measure(engine_class: type[RayEngine], manifest: Path, model: str, out: Path, settings: Sequence[str]) -> float:
    """Images per second in the middle of a run."""
    flags = {"input.manifest": str(manifest), "model.path": model, "output.path": str(out), "resources.device": "cpu"}
    run = plan_run(load_config(None, settings, flags), "cpu")
    pools = choose_pools(run.config.resources, "cpu", this_machine())
    engine = engine_class(run, lambda: pools)
    times, counts = [], Counter[str]()
    for receipt in engine.classify_units(run.pending_units(), defer=False):
        times.append(time.perf_counter())
        counts.update(receipt.counts)
    engine.close()
    if set(counts) != {"OK"}:
        raise SystemExit(f"rows failed: {dict(counts)}")
    first, last = len(times) // 5, len(times) * 9 // 10
    return (last - first) * run.plan.layout.unit_rows / (times[last] - times[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="a model bundle; default: a trivial one")
    parser.add_argument("--folder", type=Path, help="JPEG files")
    parser.add_argument("--unit-rows", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings")
    parser.add_argument("-o", "--output", type=Path, help="a Markdown file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        photographs = find_photographs(arguments.folder, scratch)
        manifest = scratch / "manifest.parquet"
        uris = [str(photographs[index % len(photographs)].resolve()) for index in range(arguments.images)]
        pq.write_table(pa.table({"uri": uris, "image_id": [str(index) for index in range(len(uris))]}), manifest)
        model = arguments.model or save_trivial_model(scratch / "model")
        settings = [*arguments.settings, f"classify.unit_rows={arguments.unit_rows}"]
        rates: dict[str, list[float]] = {ablation: [] for ablation in ENGINES}
        config = load_config(None, settings)
        with ray_session(config, choose_pools(config.resources, "cpu", this_machine())), without_data_actors():
            for number in range(arguments.repeats):
                for ablation in ENGINES if number % 2 == 0 else reversed(ENGINES):
                    out = scratch / f"{ablation} {number}".replace(" ", "-")
                    rates[ablation].append(measure(ENGINES[ablation], manifest, model, out, settings))
                    print(f"round {number + 1}, {ablation}: {rates[ablation][-1]:,.0f} images/s", flush=True)
    lines = [f"{arguments.images:,} images; {describe_machine()}", "", "| | images/s | of the whole job |"]
    lines.append("| --- | --- | --- |")
    for ablation, found in rates.items():
        ratios = [rate / whole for rate, whole in zip(found, rates[WHOLE], strict=True)]
        lines.append(f"| {ablation} | {spread(found)} | {spread(ratios)} |")
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
