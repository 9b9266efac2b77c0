from __future__ import annotations

import subprocess
import sys

from imgbatch.core.model import ModelBundle

TWO_THREADS_AT_ONCE = """
import sys, threading
import numpy as np
from imgbatch.core.backends import Backend, build_predictor
from imgbatch.core.model import load_bundle
from imgbatch.core.variants import load_variants

bundle = load_bundle(sys.argv[1])
backend = Backend(next(variant for variant in load_variants(bundle) if variant.target == "openvino-fp32"))
predictor = build_predictor(bundle, backend, device="cpu", batch_size=1, num_threads=1, streams=2)
images_NHWC = np.zeros((1, bundle.preprocess.crop_size, bundle.preprocess.crop_size, 3), np.uint8)
both_ready = threading.Barrier(2)


def predict():
    both_ready.wait()
    predictor.predict(images_NHWC)


sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=predict) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_the_first_two_batches_of_a_process_may_come_at_once(optimized_model: ModelBundle) -> None:
    """Without a batch before, OpenVINO's bindings stop for ever in three of four such processes."""
    command = [sys.executable, "-c", TWO_THREADS_AT_ONCE, optimized_model.path]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
