"""What NNCF's options do to post-training int8.

    python -m jobs.bench.int8 --model BUNDLE --calibration MANIFEST --test MANIFEST

Without accuracy control, so that what is seen is the options' doing: each of them quantises the bundle's network
with every second image of the calibration manifest, as `imgbatch model optimize` does, and its labels and
probabilities on the test images, which must have targets, are compared with the network's in float32.
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import nncf
import numpy as np
from nncf.quantization.advanced_parameters import OverflowFix
from nncf.quantization.range_estimator import RangeEstimatorParametersSet

from imgbatch.config import Config
from imgbatch.core.manifest import open_manifest
from imgbatch.core.model import ModelBundle, load_bundle
from imgbatch.core.openvino_build import convert_network
from imgbatch.core.openvino_predict import OpenVinoPredictor
from imgbatch.core.pictures import Pictures, load_pictures
from jobs.bench.common import describe_machine

BATCH_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model bundle")
    parser.add_argument("--calibration", required=True, help="manifest of images to quantise with")
    parser.add_argument("--test", required=True, help="manifest of images with targets to measure with")
    arguments = parser.parse_args()
    nncf.set_log_level(logging.ERROR)
    bundle = load_bundle(arguments.model)
    calibration, test = (
        load_pictures(open_manifest(path), bundle.preprocess, Config())
        for path in (arguments.calibration, arguments.test)
    )
    images_NHWC = calibration.images_NHWC[::2]
    print(f"{bundle.arch}, {len(images_NHWC)} images to quantise with, {len(test.image_ids)} to measure with")
    print(f"{describe_machine()}\n")
    expected_NK = probabilities(bundle, convert_network(bundle), test.images_NHWC)
    print("| options of nncf.quantize | accuracy | labels as in fp32 | mean difference of a probability | seconds |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| none, float32 | {accuracy(bundle, test, expected_NK):.4f} | | | |")
    for name, options in cases().items():
        started = time.perf_counter()
        items = nncf.Dataset([image_HWC[None] for image_HWC in images_NHWC])
        quantised = nncf.quantize(
            convert_network(bundle),
            items,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images_NHWC),
            **options,
        )
        seconds = time.perf_counter() - started
        given_NK = probabilities(bundle, quantised, test.images_NHWC)
        same = (given_NK.argmax(axis=1) == expected_NK.argmax(axis=1)).mean()
        difference = np.abs(given_NK - expected_NK).mean()
        print(f"| {name} | {accuracy(bundle, test, given_NK):.4f} | {same:.4f} | {difference:.4f} | {seconds:.0f} |")


def cases() -> dict[str, dict[str, Any]]:
    """Options of ``nncf.quantize`` by what they are called in the table."""

    def ranges(estimator: Any) -> dict[str, Any]:
        return {
            "advanced_parameters": nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=estimator, weights_range_estimator_params=estimator
            )
        }

    unfixed = nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE)
    return {
        "the defaults": {},
        "preset MIXED": {"preset": nncf.QuantizationPreset.MIXED},
        "fast_bias_correction=False": {"fast_bias_correction": False},
        "both": {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False},
        "ranges by mean minimum and maximum": ranges(RangeEstimatorParametersSet.MEAN_MINMAX),
        "ranges by mean quantile": ranges(RangeEstimatorParametersSet.MEAN_QUANTILE),
        "no overflow fix": {"advanced_parameters": unfixed},
    }


def probabilities(bundle: ModelBundle, network: Any, images_NHWC: np.ndarray) -> np.ndarray:
    """float32 [N, K] of an ``openvino.Model``."""
    predictions = OpenVinoPredictor(bundle, network, batch_size=BATCH_SIZE, num_threads=None).predict(images_NHWC)
    if any(predictions.errors):
        raise SystemExit("rows failed")
    return predictions.probs_NK


def accuracy(bundle: ModelBundle, pictures: Pictures, probs_NK: np.ndarray) -> float:
    """Of the images whose target is one of the model's classes."""
    index = {name: k for k, name in enumerate(bundle.class_names)}
    truth_N = np.array([index.get((names or [""])[0], -1) for names in pictures.targets])
    known_N = truth_N >= 0
    if not known_N.any():
        raise SystemExit("--test: no image has a target that is one of the model's classes")
    return float((probs_NK.argmax(axis=1) == truth_N)[known_N].mean())


if __name__ == "__main__":
    main()
