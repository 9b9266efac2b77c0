"""Which library runs which network fastest in float32 on one core: torch, OpenVINO or MNN.

    python -m jobs.bench.architectures [NAME ...] [--folder IMAGES]

Networks of torchvision with random weights, at 224 px, each made into both variants by what ``imgbatch model optimize``
does, which measures torch and the variant in turns of five rounds; the table has these medians. A variant
that disagrees on a label with torch fails the benchmark.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from imgbatch.core.machine import has_bfloat16
from imgbatch.core.optimize import optimize_bundle
from imgbatch.core.variants import Target
from jobs.bench.common import describe_machine, find_photographs, save_random_model

ARCHITECTURES = (
    "resnet18",
    "resnet50",
    "densenet121",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "regnet_y_400mf",
    "swin_t",
)
TARGETS: tuple[Target, ...] = ("openvino-fp32", "mnn-fp32", *(("openvino-bf16",) if has_bfloat16() else ()))
NUM_IMAGES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", metavar="NAME", default=ARCHITECTURES)
    parser.add_argument("--folder", type=Path, help="JPEG files, in folders named after their class")
    arguments = parser.parse_args()
    print(f"{describe_machine()}\n\n| images/s of one core | torch | {' | '.join(TARGETS)} | probabilities within |")
    print(f"|{' --- |' * (len(TARGETS) + 3)}")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        uris = [str(path) for path in find_photographs(arguments.folder, scratch)[:NUM_IMAGES]]
        manifest = str(scratch / "manifest.parquet")
        pq.write_table(pa.table({"uri": uris}), manifest)
        for arch in arguments.architectures:
            print(measure(arch, scratch / arch, manifest), flush=True)


def measure(arch: str, path: Path, manifest: str) -> str:
    """A row of the table."""
    model = save_random_model(path, arch, 10, resize_size=256, crop_size=224)
    variants = [optimize_bundle(model, target=target, calibration=manifest)[1] for target in TARGETS]
    differing = [variant.target for variant in variants if variant.agreement.labels < 1]
    if differing:
        raise SystemExit(f"{arch}: {', '.join(differing)} and torch disagree on a label")
    torch_rate = statistics.mean(variant.images_per_s["original"] for variant in variants)
    rates = " | ".join(f"{variant.images_per_s['variant']:.1f} ({variant.speedup:.2f})" for variant in variants)
    difference = max(variant.agreement.largest_difference for variant in variants)
    return f"| {arch} | {torch_rate:.1f} | {rates} | {difference:.1g} |"


if __name__ == "__main__":
    main()
