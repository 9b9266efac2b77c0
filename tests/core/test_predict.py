from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imgbatch.core.architectures import build_network, head_module_name
from imgbatch.core.model import ModelBundle, count_features, init_bundle, load_network
from imgbatch.core.predict import Predictor, failure_of
from imgbatch.errors import ImgbatchError, Stage, Status, UsageError

MakeBundle = Callable[..., ModelBundle]


@pytest.fixture(name="images_NHWC")
def draw_images() -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)
    images.setflags(write=False)  # as Ray hands them out
    return images


def plain_logits(bundle: ModelBundle, images_NHWC: np.ndarray) -> torch.Tensor:
    """What anyone would write with torch alone."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (bundle.preprocess.mean, bundle.preprocess.std))
    inputs_NCHW = (torch.from_numpy(images_NHWC.copy()).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.inference_mode():
        return load_network(bundle)(inputs_NCHW.contiguous())


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_probabilities_are_plain_torchs(make_bundle: MakeBundle, images_NHWC: np.ndarray, batch_size: int):
    bundle = make_bundle()
    predictions = Predictor(bundle, batch_size=batch_size, num_threads=1).predict(images_NHWC)
    expected_NK = plain_logits(bundle, images_NHWC).softmax(1).numpy()
    np.testing.assert_allclose(predictions.probs_NK, expected_NK, atol=1e-6)
    assert predictions.probs_NK.dtype == np.float32
    assert predictions.finite_N.all()
    assert predictions.errors == [None] * 11


def test_multilabel_probabilities_do_not_exclude_each_other(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = make_bundle(task="multilabel", temperature=(1.0, 2.0, 0.5))
    predictions = Predictor(bundle).predict(images_NHWC)
    expected_NK = (plain_logits(bundle, images_NHWC) / torch.tensor([1.0, 2.0, 0.5])).sigmoid().numpy()
    np.testing.assert_allclose(predictions.probs_NK, expected_NK, atol=1e-6)


def test_binary_has_two_probabilities_that_add_up(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictions = Predictor(make_bundle(task="binary", class_names=("no", "yes"))).predict(images_NHWC)
    assert predictions.probs_NK.shape == (11, 2)
    np.testing.assert_allclose(predictions.probs_NK.sum(axis=1), 1, atol=1e-6)


def test_temperature_softens_and_keeps_the_label(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    sharp = Predictor(make_bundle("sharp")).predict(images_NHWC).probs_NK
    soft = Predictor(make_bundle("soft", temperature=10.0)).predict(images_NHWC).probs_NK
    assert (sharp.argmax(1) == soft.argmax(1)).all()
    assert (soft.max(1) < sharp.max(1)).all()


def test_no_images_no_predictions(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictions = Predictor(make_bundle()).predict(images_NHWC[:0])
    assert predictions.probs_NK.shape == (0, 3)
    assert predictions.errors == []


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_gives_errors(
    make_bundle: MakeBundle, images_NHWC: np.ndarray, task: str, value: float
):
    weights = build_network("simple_cnn", 3).state_dict()
    weights["head.bias"][1] = value
    predictions = Predictor(make_bundle(state_dict=weights, task=task)).predict(images_NHWC)
    assert not predictions.finite_N.any()
    assert not predictions.probs_NK.any()
    assert {(error.status, error.stage) for error in predictions.errors} == {(Status.NON_FINITE, Stage.CLASSIFY)}


class Fussy(nn.Module):
    """A network that gives no numbers for a black image and raises for a batch that holds a white one."""

    def __init__(self, network: nn.Module, error: type[Exception], largest_batch: int = 1000) -> None:
        super().__init__()
        self.network, self.error, self.largest_batch = network, error, largest_batch
        self.short_once: set[int] = set()
        """Sizes of batches for which memory is short, the first time each."""
        self.batches: list[int] = []

    def forward(self, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(inputs_BCHW))
        if len(inputs_BCHW) > self.largest_batch or len(inputs_BCHW) in self.short_once:
            self.short_once.discard(len(inputs_BCHW))
            raise torch.OutOfMemoryError("CUDA out of memory")
        if (inputs_BCHW.amin(dim=(1, 2, 3)) > 2).any():
            raise self.error("white at 0x7f0012345678\nhurts")
        black_B = inputs_BCHW.amax(dim=(1, 2, 3)) < -1.7
        return torch.where(black_B[:, None], torch.nan, self.network(inputs_BCHW))


def fussy_predictor(bundle: ModelBundle, error: type[Exception] = RuntimeError, largest_batch: int = 1000) -> Predictor:
    predictor = Predictor(bundle, batch_size=8)
    predictor._network = Fussy(predictor._network, error, largest_batch)
    return predictor


def test_one_bad_image_costs_its_own_row(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = make_bundle()
    odd_NHWC = images_NHWC.copy()
    odd_NHWC[3], odd_NHWC[9], odd_NHWC[5] = 255, 255, 0
    predictions = fussy_predictor(bundle).predict(odd_NHWC)
    statuses = {index: error.status for index, error in enumerate(predictions.errors) if error}
    assert statuses == {3: Status.CLASSIFY_FAILED, 5: Status.NON_FINITE, 9: Status.CLASSIFY_FAILED}
    assert predictions.errors[3].message == "white at 0x… hurts"
    assert not predictions.finite_N[[3, 5, 9]].any()
    good = np.setdiff1d(np.arange(11), [3, 5, 9])
    expected_NK = plain_logits(bundle, images_NHWC).softmax(1).numpy()
    np.testing.assert_allclose(predictions.probs_NK[good], expected_NK[good], atol=1e-6)


def test_a_device_out_of_memory_gets_smaller_batches(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = make_bundle()
    predictor = fussy_predictor(bundle, largest_batch=3)
    predictions = predictor.predict(images_NHWC)
    assert predictions.errors == [None] * 11
    assert predictor.batch_size == 2
    np.testing.assert_allclose(predictions.probs_NK, plain_logits(bundle, images_NHWC).softmax(1).numpy(), atol=1e-6)


@pytest.mark.parametrize("size", [3, 8])
def test_a_batch_for_which_memory_was_short_once_is_tried_again_as_it_is(
    make_bundle: MakeBundle, images_NHWC: np.ndarray, size: int
):
    predictor = fussy_predictor(make_bundle())
    predictor._network.short_once = {size}
    assert predictor.predict(images_NHWC).errors == [None] * 11
    assert sorted(predictor._network.batches) == sorted([3, 8, size])
    assert predictor.batch_size == 8


def test_a_short_last_batch_halves_the_batches_and_not_itself(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictor = fussy_predictor(make_bundle(), largest_batch=2)
    assert predictor.predict(images_NHWC[:3]).errors == [None] * 3
    assert predictor._network.batches == [3] * 4 + [2, 1]
    assert predictor.batch_size == 2


def test_batches_grow_again_when_there_is_room(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictor = fussy_predictor(make_bundle(), largest_batch=3)
    many_NHWC = np.resize(images_NHWC, (2 * 64, 32, 32, 3))
    predictor.predict(images_NHWC[:8])
    assert predictor.batch_size == 2
    predictor._network.largest_batch = 1000
    predictor.predict(many_NHWC[:100])
    assert predictor.batch_size == 2
    predictor.predict(many_NHWC)
    assert predictor.batch_size == 4
    for _ in range(10):
        assert predictor.predict(many_NHWC).errors == [None] * len(many_NHWC)
    assert predictor.batch_size == 8
    assert max(predictor._network.batches) == 8


def test_a_size_for_which_there_is_never_room_is_tried_less_and_less(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictor = fussy_predictor(make_bundle(), largest_batch=7)
    many_NHWC = np.resize(images_NHWC, (64, 32, 32, 3))
    tried = []
    for _ in range(4 * (1 + 2 + 4) + 1):
        predictor._network.batches.clear()
        assert predictor.predict(many_NHWC).errors == [None] * len(many_NHWC)
        tried.append(predictor._network.batches.count(8))
    assert np.flatnonzero(tried).tolist() == [0, 4, 12, 28]


def test_a_device_without_room_for_one_image_is_not_blamed_on_the_images(
    make_bundle: MakeBundle, images_NHWC: np.ndarray
):
    bundle = make_bundle()
    told = rf"^{bundle.path}: this machine's memory is too little for a batch of one image of 32 px \(CUDA out of"
    with pytest.raises(ImgbatchError, match=told):
        fussy_predictor(bundle, largest_batch=0).predict(images_NHWC)


def test_the_memory_of_a_gpu_is_named(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (300 * 2**20, 15_000 * 2**20))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    predictor = fussy_predictor(make_bundle(), largest_batch=0)
    predictor.device = torch.device("cuda")
    told = predictor._has_no_room(torch.OutOfMemoryError("CUDA out of memory"))
    assert "the memory of Tesla T4, of which 300 of 15,000 MB are free, is too little" in str(told)


@pytest.mark.parametrize(
    ("message", "device_type", "failure"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuda", "memory"),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", "cuda", "memory"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuda", "memory"),
        ("CUDA error: out of memory", "cuda", "memory"),
        ("Triton Error [CUDA]: out of memory", "cuda", "memory"),
        ("GET was unable to find an engine to execute this computation", "cuda", "memory"),
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory", "cpu", "memory"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`", "cuda", "device"),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "cuda", "device"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "cuda", "device"),
        ("Given groups=1, weight of size [64, 3, 7, 7]", "cuda", None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "cpu", None),
        ("white hurts", "cpu", None),
        ("CUDA error: out of memory", "mps", None),
    ],
)
def test_what_a_message_says_of_the_device(message: str, device_type: str, failure: str | None):
    assert failure_of(message, device_type) == failure


class FailingLibrary(nn.Module):
    """A network of which a library below torch fails for batches of more than ``largest_batch``."""

    def __init__(self, network: nn.Module, message: str, largest_batch: int) -> None:
        super().__init__()
        self.network, self.message, self.largest_batch = network, message, largest_batch

    def forward(self, inputs_BCHW: torch.Tensor) -> torch.Tensor:
        if len(inputs_BCHW) > self.largest_batch:
            raise RuntimeError(self.message)
        return self.network(inputs_BCHW)


def test_memory_that_a_library_lacks_makes_batches_smaller(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictor = Predictor(make_bundle(), batch_size=8)
    predictor._network = FailingLibrary(predictor._network, "DefaultCPUAllocator: can't allocate memory", 3)
    assert predictor.predict(images_NHWC).errors == [None] * 11
    assert predictor.batch_size == 2


def test_what_fails_in_a_library_of_the_gpu_is_not_blamed_on_the_images(
    make_bundle: MakeBundle, images_NHWC: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    message = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"
    monkeypatch.setattr("imgbatch.core.predict.failure_of", lambda text, _device_type: failure_of(text, "cuda"))
    predictor = Predictor(make_bundle(), batch_size=8)
    predictor._network = FailingLibrary(predictor._network, message, 0)
    with pytest.raises(RuntimeError, match=message):
        predictor.predict(images_NHWC)


@pytest.fixture(name="compiles_nothing")
def leave_networks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute; what is made of batches of one size is the same without."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)


@pytest.mark.usefixtures("compiles_nothing")
def test_batches_of_one_size_become_smaller_ones_of_one_size(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = make_bundle()
    predictor = Predictor(bundle, batch_size=8, compiled=True)
    predictor._network = Fussy(predictor._network, RuntimeError, largest_batch=3)
    predictions = predictor.predict(images_NHWC)
    assert predictions.errors == [None] * 11
    assert predictor.batch_size == 2
    assert predictor._network.batches[:5] == [8, 8, 4, 4, 2]
    np.testing.assert_allclose(predictions.probs_NK, plain_logits(bundle, images_NHWC).softmax(1).numpy(), atol=1e-6)
    assert predictor.predict(images_NHWC[:1]).errors == [None]
    assert predictor._network.batches[-1] == 2
    predictor._network.largest_batch = 1000
    predictor.predict(np.resize(images_NHWC, (200, 32, 32, 3)))
    assert predictor.batch_size == 2, "another size would be compiled anew"


@pytest.mark.parametrize(("largest", "batch_size"), [(3, 2), (8, 8)])
def test_what_is_compiled_is_tried_before_there_are_images(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, largest: int, batch_size: int
):
    made: list[Fussy] = []

    def fussy(network: nn.Module, **_: object) -> nn.Module:
        made.append(Fussy(network, RuntimeError, largest))
        return made[0]

    monkeypatch.setattr(torch, "compile", fussy)
    assert Predictor(make_bundle(), batch_size=8, compiled=True).batch_size == batch_size
    assert made[0].batches == ([8, 4, 2] if largest == 3 else [8])


@pytest.mark.parametrize(
    ("error", "told"),
    [(RuntimeError("no C compiler"), "no C compiler"), (torch.OutOfMemoryError("all of it"), "all of it")],
)
def test_a_network_that_cannot_be_compiled_is_told_of_once(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
):
    def failing(_images: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(torch, "compile", lambda _network, **_: failing)
    bundle = make_bundle()
    with pytest.raises(UsageError, match=rf"^{bundle.path}: the network does not run on cpu .*{told}.* to torch$"):
        Predictor(bundle, batch_size=8, compiled=True)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_graph_that_does_not_fit_is_not_blamed_on_the_images(
    make_bundle: MakeBundle, images_NHWC: np.ndarray, error: type[Exception]
):
    calls: list[int] = []

    def graph(images_BHWC: torch.Tensor) -> torch.Tensor:
        calls.append(len(images_BHWC))
        if len(calls) > 1:
            raise error("CUDA out of memory")
        return torch.zeros((len(images_BHWC), 3))

    predictor = Predictor(make_bundle(), batch_size=4, graph=graph)
    with pytest.raises(error):
        predictor.predict(images_NHWC)
    assert calls == [4, 4]
    assert predictor.batch_size == 4


def test_a_broken_device_is_not_blamed_on_the_images(make_bundle: MakeBundle):
    white_NHWC = np.full((2, 32, 32, 3), 255, dtype=np.uint8)
    with pytest.raises(torch.AcceleratorError):
        fussy_predictor(make_bundle(), error=torch.AcceleratorError).predict(white_NHWC)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 32, 32, 3), np.float32), ((2, 3, 32, 32), np.uint8), ((32, 32, 3), np.uint8)]
)
def test_other_arrays_are_refused(make_bundle: MakeBundle, shape: tuple[int, ...], dtype: type):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 32, 32, 3\]"):
        Predictor(make_bundle()).predict(np.zeros(shape, dtype))


def test_no_batch_is_a_mistake(make_bundle: MakeBundle):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Predictor(make_bundle(), batch_size=0)


def test_predictions_travel_between_processes(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = pickle.loads(pickle.dumps(make_bundle()))
    predictions = pickle.loads(pickle.dumps(Predictor(bundle).predict(images_NHWC)))
    assert predictions.finite_N.all()


def test_labels_of_a_real_network_are_plain_torchs(tmp_path: Path, test_data: Path):
    weights = str(test_data / "weights/resnet18-imagenet1k-pq-fp16.safetensors")
    sizes = {"resize_size": 96, "crop_size": 96}
    bundle = init_bundle(str(tmp_path / "m"), arch="resnet18", weights=weights, classes="imagenet1k", **sizes)
    from PIL import Image

    paths = sorted((test_data / "catalog").rglob("*.jpg"))[:96]
    images_NHWC = np.stack([np.asarray(Image.open(path).convert("RGB").resize((96, 96))) for path in paths])
    predictions = Predictor(bundle, batch_size=16).predict(images_NHWC)
    logits_NK = plain_logits(bundle, images_NHWC)
    assert (predictions.probs_NK.argmax(1) == logits_NK.argmax(1).numpy()).mean() >= 0.999
    np.testing.assert_allclose(predictions.probs_NK, logits_NK.softmax(1).numpy(), atol=1e-5)


def test_features_come_from_the_same_pass(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    bundle = make_bundle()
    network_passes = []
    predictor = Predictor(bundle, batch_size=4, features=True)
    predictor._network.register_forward_pre_hook(lambda *_: network_passes.append(1))
    predictions = predictor.predict(images_NHWC)
    assert len(network_passes) == 3
    np.testing.assert_array_equal(predictions.probs_NK, Predictor(bundle, batch_size=4).predict(images_NHWC).probs_NK)
    head = load_network(bundle).get_submodule(head_module_name(bundle.arch))
    assert predictions.features_ND is not None
    assert predictions.features_ND.dtype == np.float32
    assert predictions.features_ND.shape == (11, count_features(bundle))
    with torch.inference_mode():
        logits_NK = head(torch.from_numpy(predictions.features_ND)).numpy()
    np.testing.assert_allclose(logits_NK, plain_logits(bundle, images_NHWC).numpy(), atol=1e-5)
    assert predictor.predict(images_NHWC[:0]).features_ND.shape == (0, 0)
    assert Predictor(bundle).predict(images_NHWC).features_ND is None


def test_threads_that_share_a_model_get_what_one_gets(make_bundle: MakeBundle, images_NHWC: np.ndarray):
    predictor = Predictor(make_bundle(), batch_size=2, num_threads=1)
    expected_NK = predictor.predict(images_NHWC).probs_NK
    with ThreadPoolExecutor(3) as threads:
        for predictions in threads.map(predictor.predict, [images_NHWC] * 12):
            np.testing.assert_array_equal(predictions.probs_NK, expected_NK)
        assert threads.submit(torch.get_num_threads).result() == 1


def test_threads_that_share_a_model_get_the_features_of_their_own_images(
    make_bundle: MakeBundle, images_NHWC: np.ndarray
):
    predictor = Predictor(make_bundle(), batch_size=2, num_threads=1, features=True)
    calls = [np.roll(images_NHWC, shift, axis=0) for shift in range(24)]
    expected = [predictor.predict(images).features_ND for images in calls]
    with ThreadPoolExecutor(3) as threads:
        given = list(threads.map(predictor.predict, calls))
    for predictions, features_ND in zip(given, expected, strict=True):
        assert predictions.errors == [None] * len(images_NHWC)
        np.testing.assert_array_equal(predictions.features_ND, features_ND)
