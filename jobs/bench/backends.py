"""What runs the model on a CPU: torch, OpenVINO in float32, int8 and (where the processor has it) bfloat16, or MNN.

    python -m jobs.bench.backends --model BUNDLE --test MANIFEST [--calibration MANIFEST] [--repeats 3] [--images 0]

Measures the variants that the bundle holds, or with ``--calibration`` makes these in a copy of it. On
the test images, which none of them has seen: images/s of the forward pass alone, for one and two threads and several
batch sizes, backends taking turns within a round; labels against torch's; and accuracy, paired, where the manifest
has targets. A product of two large matrices in float32 takes its turn too: no direct convolution gets more arithmetic
out of the cores, though Winograd's makes do with less. With ``--images`` the installed ``classify`` command labels the
test images too, repeated to so many, on every backend in turn. A failed row fails the benchmark.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.flop_counter import FlopCounterMode

from imgbatch.config import Config
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.machine import has_bfloat16
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_bundle, load_network
from imgbatch.core.optimize import measure_rate, optimize_bundle
from imgbatch.core.pictures import Pictures, load_pictures
from imgbatch.core.variants import Target, load_variants
from jobs.bench.common import describe_machine, spread
from jobs.bench.efficiency import run_pipeline

THREADS, BATCH_SIZES = (1, 2), (1, 8, 32)
RATE_IMAGES = 64
PRODUCT_SIDE = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model bundle")
    parser.add_argument("--calibration", help="manifest of images to make variants with")
    parser.add_argument("--test", required=True, help="manifest of images to measure with")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of a forward pass")
    parser.add_argument("--images", type=int, default=0, help="of each run of the classify command; 0: none")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        bundle = load_bundle(arguments.model)
        if arguments.calibration:
            bundle = make_variants(bundle.path, arguments.calibration, str(scratch / "model"))
        pictures = load_pictures(open_manifest(arguments.test), bundle.preprocess, Config())
        print(f"{bundle.arch}, {bundle.preprocess.describe()}; {len(pictures.image_ids)} test images")
        print(f"{describe_machine()}\n")
        backends = [Backend(), *(Backend(variant) for variant in reversed(load_variants(bundle)))]
        report_rates(bundle, backends, pictures.images_NHWC[:RATE_IMAGES], arguments.repeats, arguments.seconds)
        report_agreement(bundle, backends, pictures)
        if arguments.images:
            report_runs(bundle, backends, arguments.test, scratch, arguments.images, arguments.repeats)


def make_variants(model: str, calibration: str, output: str) -> ModelBundle:
    """A copy of the bundle with its variants, and a line about each."""
    targets: list[Target] = ["openvino-fp32", "openvino-int8", "mnn-fp32"]
    if has_bfloat16():
        targets.append("openvino-bf16")
    for target in targets:
        started = time.perf_counter()
        bundle, variant = optimize_bundle(model, target=target, calibration=calibration, output=output)
        seconds = time.perf_counter() - started
        print(f"{target}: made in {seconds:.0f} s, batches of {variant.batch_size}, {variant.agreement.describe()}")
        model = output
    return bundle


def report_rates(
    bundle: ModelBundle, backends: list[Backend], images_NHWC: np.ndarray, repeats: int, seconds: float
) -> None:
    """Prints a table: images/s by backend, threads and batch size; of the best batch size, times torch and GFLOP/s."""
    cases = [(backend, threads, size) for threads in THREADS for size in BATCH_SIZES for backend in backends]
    predictors = [
        build_predictor(bundle, backend, device="cpu", batch_size=size, num_threads=threads)
        for backend, threads, size in cases
    ]
    rates: dict[tuple[str, int, int], list[float]] = {}
    products: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for _ in range(repeats):
        for threads, of_product in products.items():
            torch.set_num_threads(threads)
            of_product.append(measure_product(seconds))
        for (backend, threads, size), predictor in zip(cases, predictors, strict=True):
            torch.set_num_threads(threads)
            # MNN gives each thread a batch.
            rate = measure_rate(predictor, images_NHWC[: threads * size], seconds)
            rates.setdefault((backend.name, threads, size), []).append(rate)
    print(
        "| forward pass, images/s | threads |",
        " | ".join(f"batch {size}" for size in BATCH_SIZES),
        "| best / torch | GFLOP/s | of the product's |",
    )
    print("| --- | --- |", " | ".join("---" for _ in BATCH_SIZES), "| --- | --- | --- |")
    gflops_of_image = count_flops(bundle) / 1e9
    for num_threads in THREADS:
        best = {
            backend.name: max(statistics.median(rates[backend.name, num_threads, size]) for size in BATCH_SIZES)
            for backend in backends
        }
        for backend in backends:
            cells = [spread(rates[backend.name, num_threads, size]) for size in BATCH_SIZES]
            ratio = best[backend.name] / best[backends[0].name]
            gflops = best[backend.name] * gflops_of_image
            share = gflops / statistics.median(products[num_threads])
            print(
                f"| {backend.name} | {num_threads} | {' | '.join(cells)} | {ratio:.2f} | {gflops:,.0f} | {share:.2f} |"
            )
    for num_threads, of_product in products.items():
        print(f"\nProduct of matrices, {num_threads} threads: {spread(of_product)} GFLOP/s.")


def count_flops(bundle: ModelBundle) -> int:
    """Of the forward pass of one image; a multiplication and an addition are two."""
    spec = bundle.preprocess
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        load_network(bundle)(torch.zeros(1, spec.num_channels, spec.crop_size, spec.crop_size))
    return int(counter.get_total_flops())


def measure_product(seconds: float) -> float:
    """GFLOP/s of the product of two square float32 matrices."""
    left, right = (torch.rand(PRODUCT_SIDE, PRODUCT_SIDE) for _ in range(2))
    product = left @ right
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        torch.mm(left, right, out=product)
        count += 1
    return count * 2 * PRODUCT_SIDE**3 / (time.perf_counter() - started) / 1e9


def report_agreement(bundle: ModelBundle, backends: list[Backend], pictures: Pictures) -> None:
    """Prints labels and probabilities against torch's, and paired accuracy where targets are known."""
    index = {name: k for k, name in enumerate(bundle.class_names)}
    truth_N = np.array([index.get((names or [""])[0], -1) for names in pictures.targets])
    probs_NK = {backend.name: _probabilities(bundle, backend, pictures.images_NHWC) for backend in backends}
    expected_NK = probs_NK[backends[0].name]
    print("\n| test images | label as torch's | largest, mean difference | accuracy | gained, lost against torch |")
    print("| --- | --- | --- | --- | --- |")
    for name, given_NK in probs_NK.items():
        same = (given_NK.argmax(axis=1) == expected_NK.argmax(axis=1)).mean()
        difference_NK = np.abs(given_NK - expected_NK)
        accuracy, changes = "none known", ""
        if (truth_N >= 0).any():
            right_N, was_right_N = (probs.argmax(axis=1) == truth_N for probs in (given_NK, expected_NK))
            accuracy = f"{right_N[truth_N >= 0].mean():.4f}"
            changes = f"{(right_N & ~was_right_N).sum()}, {(was_right_N & ~right_N).sum()}"
        print(
            f"| {name} | {same:.4f} | {difference_NK.max():.2g}, {difference_NK.mean():.2g} | {accuracy} | {changes} |"
        )


def _probabilities(bundle: ModelBundle, backend: Backend, images_NHWC: np.ndarray) -> np.ndarray:
    predictor = build_predictor(bundle, backend, device="cpu", batch_size=8, num_threads=2)
    predictions = predictor.predict(images_NHWC)
    if any(predictions.errors):
        raise SystemExit(f"{backend.name}: rows failed")
    return predictions.probs_NK


def report_runs(
    bundle: ModelBundle, backends: list[Backend], test: str, scratch: Path, num_images: int, repeats: int
) -> None:
    """Prints images/s of the classify command, from the engine's readiness to the end, on each backend in turn."""
    manifest = scratch / "test.parquet"
    uris = pa.concat_tables(open_manifest(test).iter_batches(["uri"]))["uri"].to_pylist()
    repeated = [uris[index % len(uris)] for index in range(num_images)]
    pq.write_table(pa.table({"uri": repeated, "image_id": [str(index) for index in range(num_images)]}), manifest)
    runs: dict[str, list[dict[str, float]]] = {backend.name: [] for backend in backends}
    for number in range(repeats):
        for backend in backends:
            settings = (f"classify.backend={backend.name}", "classify.min_agreement=0")
            out = scratch / f"{backend.name}{number}"
            runs[backend.name].append(run_pipeline(manifest, bundle.path, out, settings))
    first = statistics.median(run["steady_images_per_s"] for run in runs[backends[0].name])
    print(f"\n| classify, {num_images:,} images | images/s, steady | from the first unit's start | steady / torch |")
    print("| --- | --- | --- | --- |")
    for name, of_backend in runs.items():
        steady = [run["steady_images_per_s"] for run in of_backend]
        whole = [run["images_per_s"] for run in of_backend]
        print(f"| {name} | {spread(steady)} | {spread(whole)} | {statistics.median(steady) / first:.2f} |")


if __name__ == "__main__":
    main()
