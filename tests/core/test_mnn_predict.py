from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from imgbatch.config import Config
from imgbatch.core import mnn_build
from imgbatch.core.manifest import open_manifest
from imgbatch.core.mnn_predict import MnnPredictor, import_mnn
from imgbatch.core.model import ModelBundle
from imgbatch.core.pictures import load_pictures
from imgbatch.core.predict import Predictor
from imgbatch.core.predictions import Predictions
from imgbatch.core.variants import load_variants, read_files
from imgbatch.errors import Status, UsageError


@pytest.fixture(name="images_NHWC", scope="module")
def load_images(photo_manifest: Path, tiny_model: ModelBundle) -> np.ndarray:
    return load_pictures(open_manifest(str(photo_manifest)), tiny_model.preprocess, Config(), limit=60).images_NHWC


@pytest.fixture(name="contents", scope="module")
def read_contents(mnn_model: ModelBundle) -> dict[str, bytes]:
    (variant,) = load_variants(mnn_model)
    return read_files(mnn_model, variant)


@pytest.mark.parametrize(("batch_size", "num_threads"), [(1, 1), (7, 2), (64, 1)])
def test_it_says_what_torch_says(
    mnn_model: ModelBundle, contents: dict[str, bytes], images_NHWC: np.ndarray, batch_size: int, num_threads: int
):
    images_NHWC.setflags(write=False)  # as Ray hands them out
    predictor = MnnPredictor(mnn_model, contents, batch_size=batch_size, num_threads=num_threads)
    given = predictor.predict(images_NHWC)
    expected_NK = Predictor(mnn_model).predict(images_NHWC).probs_NK
    np.testing.assert_allclose(given.probs_NK, expected_NK, atol=1e-5)
    assert np.ptp(given.probs_NK, axis=0).max() > 0.02  # images of which all say the same would show nothing
    assert given.errors == [None] * len(images_NHWC)
    assert given.features_ND is None


def test_threads_that_share_it_get_what_one_gets(
    mnn_model: ModelBundle, contents: dict[str, bytes], images_NHWC: np.ndarray
):
    shared = MnnPredictor(mnn_model, contents, batch_size=8, num_threads=2, streams=2)
    expected_NK = shared.predict(images_NHWC).probs_NK
    # What each thread asks for is different, so that one which got another's would be seen.
    with ThreadPoolExecutor(4) as threads:
        turned: list[Predictions] = list(
            threads.map(lambda k: shared.predict(np.roll(images_NHWC, k, axis=0)), range(12))
        )
    for k, predictions in enumerate(turned):
        np.testing.assert_allclose(predictions.probs_NK, np.roll(expected_NK, k, axis=0), atol=1e-6)


def test_a_batch_that_fails_costs_the_images_at_fault(
    mnn_model: ModelBundle, contents: dict[str, bytes], images_NHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    predictor = MnnPredictor(mnn_model, contents, batch_size=8, num_threads=2)
    expected_NK = predictor.predict(images_NHWC).probs_NK
    run = predictor._run

    def run_but_for_one(images_BHWC: np.ndarray) -> np.ndarray:
        if any(np.array_equal(image_HWC, images_NHWC[13]) for image_HWC in images_BHWC):
            raise RuntimeError("MNN's error code 2")
        return run(images_BHWC)

    monkeypatch.setattr(predictor, "_run", run_but_for_one)
    given = predictor.predict(images_NHWC)
    failed = {index: error for index, error in enumerate(given.errors) if error is not None}
    assert {index: error.status for index, error in failed.items()} == {13: Status.CLASSIFY_FAILED}
    assert "MNN's error code 2" in failed[13].message
    others = np.arange(len(images_NHWC)) != 13
    np.testing.assert_allclose(given.probs_NK[others], expected_NK[others], atol=1e-6)
    assert not given.probs_NK[13].any()


@pytest.mark.usefixtures("mnn_model")
def test_it_prints_nothing():
    """MNN says on standard output what the processor has, where commands print their results."""
    program = "from imgbatch.core.mnn_predict import import_mnn; import_mnn(); print('mine')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "mine\n"


def test_nothing_is_reported_to_the_makers_of_the_converter(mnn_model: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    """Their command installs a package and sends what was converted; our program must not import it."""
    afterwards = (
        "names = [name for name in sys.modules if name.startswith(('MNN.tools', 'aliyun', 'urllib.request'))]; "
        "sys.exit(f'imported: {names}' if names else 0)"
    )
    monkeypatch.setattr(mnn_build, "_CONVERT", f"{mnn_build._CONVERT}; {afterwards}")
    assert mnn_build.convert_network(mnn_model).keys() == {"model.mnn", "model.mnn.weight"}


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('working\\nno such operator: Conv7')", "exit code 1; no such operator: Conv7"),
        ("import os; print('Start to convert', flush=True); os.abort()", "signal 6; Start to convert"),
        ("", "exit code 0"),
    ],
)
def test_a_network_that_is_not_converted_is_one_line(
    mnn_model: ModelBundle, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
):
    monkeypatch.setattr(mnn_build, "_CONVERT", program)
    with pytest.raises(UsageError) as refused:
        mnn_build.convert_network(mnn_model)
    assert str(refused.value).endswith(f": MNN cannot convert simple_cnn ({reason}); use another target")


def test_a_folder_of_the_users_is_not_what_converts(
    mnn_model: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Path(tmp_path, "_tools.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert "model.mnn" in mnn_build.convert_network(mnn_model)


def test_a_process_that_is_ending_costs_no_image(
    mnn_model: ModelBundle, contents: dict[str, bytes], images_NHWC: np.ndarray
):
    """Rows would be written as failed for good; a unit that raises is done again."""
    predictor = MnnPredictor(mnn_model, contents, batch_size=8, num_threads=1)
    predictor._threads.shutdown()
    with pytest.raises(Exception, match="cannot schedule new futures after shutdown"):
        predictor.predict(images_NHWC)


def test_a_network_that_does_not_run_is_known_when_it_is_loaded(
    mnn_model: ModelBundle, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    class OutOfMemory(import_mnn().Interpreter):  # type: ignore[misc]
        def runSession(self, session: object) -> int:  # noqa: N802, ARG002
            return 1

    monkeypatch.setattr(import_mnn(), "Interpreter", OutOfMemory)
    with pytest.raises(RuntimeError, match="MNN's error code 1"):
        MnnPredictor(mnn_model, contents, batch_size=8, num_threads=1)


def test_without_the_package_one_line_says_what_to_install(tiny_model: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "MNN", None)
    with pytest.raises(UsageError, match=r"MNN is not installed; pip install 'imgbatch\[mnn\]'"):
        mnn_build.convert_network(tiny_model)
