from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from imgbatch.config import ClassifyConfig, Config, OutputConfig, RayConfig
from imgbatch.core import backends
from imgbatch.core.backends import Backend, build_predictor, choose_backend, planned_backend, variant_predictor
from imgbatch.core.machine import Gpu
from imgbatch.core.model import ModelBundle
from imgbatch.core.variants import Agreement, Variant, load_variants, read_files, save_variant
from imgbatch.errors import UsageError

MakeBundle = Callable[..., ModelBundle]
CONTENTS = {"model.xml": b"<net/>", "model.bin": b"\0\1"}


def plant_variant(bundle: ModelBundle, target: str = "openvino-fp32", *, labels: float = 1.0, **parts: Any) -> Variant:
    """Writes a variant whose network nothing could run."""
    agreement = Agreement(
        images=200, labels=labels, largest_difference=0.01, mean_difference=0.001, images_with_target=0
    )
    contents = CONTENTS if target.startswith("openvino") else {}
    if target.startswith("onnx"):
        contents = {"model.onnx": b"graph"}
    values = {
        "target": target,
        "device": "cpu",
        "weights_sha256": bundle.weights_sha256,
        "crop_size": bundle.preprocess.crop_size,
        "mean": bundle.preprocess.mean,
        "std": bundle.preprocess.std,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "batch_size": 4,
        "images_per_s": {"original": 1.0, "variant": 2.0},
        "agreement": agreement,
        "provenance": {},
    }
    variant = Variant(**{**values, **parts})
    save_variant(bundle, variant, contents)
    return variant


@pytest.fixture(autouse=True)
def has_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing asks only whether the package could be imported."""
    package = ModuleType("openvino")
    package.__spec__ = ModuleSpec("openvino", None)
    monkeypatch.setitem(sys.modules, "openvino", package)


def choose(
    bundle: ModelBundle,
    *,
    device: str = "cpu",
    features: bool = False,
    address: str | None = None,
    gpus: Sequence[Gpu] | None = None,
    **settings: Any,
) -> Backend:
    config = Config(
        classify=ClassifyConfig(**settings), output=OutputConfig(embeddings=features), ray=RayConfig(address=address)
    )
    return choose_backend(config, bundle, bundle.preprocess, device, gpus)


def test_variants_come_back_fastest_first_and_leave_the_model_id_alone(make_bundle: MakeBundle):
    bundle = make_bundle()
    assert load_variants(bundle) == []
    model_id = bundle.model_id
    written = [
        plant_variant(bundle, target, images_per_s={"original": 20.0, "variant": rate})
        for target, rate in (("openvino-fp32", 30.0), ("torch-compile", 25.0), ("torch-bf16", 40.0))
    ]
    assert load_variants(bundle) == [written[2], written[0], written[1]]
    assert len({variant.variant_id for variant in written}) == 3
    assert bundle.model_id == model_id
    assert read_files(bundle, written[0]) == CONTENTS


def test_auto_takes_the_fastest_that_agrees_well_enough(make_bundle: MakeBundle):
    bundle = make_bundle()
    assert choose(bundle) == Backend()
    plant_variant(bundle, "openvino-fp32", labels=1.0)
    plant_variant(bundle, "openvino-int8", labels=0.985, images_per_s={"original": 1.0, "variant": 3.0})
    backend = choose(bundle)
    assert backend.name == "openvino_fp32"
    assert backend.left_out == (
        "openvino-int8 is left out: its labels agree with torch on 98.50% of 200 images, below "
        "classify.min_agreement 0.99",
    )
    assert choose(bundle, min_agreement=0.98).name == "openvino_int8"
    assert choose(bundle, backend="openvino").name == "openvino_fp32"
    assert choose(bundle, backend="openvino_int8", min_agreement=0.9).name == "openvino_int8"
    assert choose(bundle, backend="torch") == Backend()


@pytest.mark.parametrize(
    ("parts", "settings", "reason"),
    [
        ({"weights_sha256": "0" * 64}, {}, "made from other weights; make it again with `imgbatch model optimize"),
        ({"crop_size": 48}, {}, "takes images of 48 px, and this run has 32"),
        ({"mean": (0.0, 0.0, 0.0)}, {}, "normalises otherwise than model.json says"),
        ({"device": "cuda"}, {}, "is for cuda, and this run is on cpu"),
        ({}, {"device": "cuda"}, "is for cpu, and this run is on cuda"),
        ({}, {"features": True}, "embeddings come from torch only"),
    ],
)
def test_a_variant_that_does_not_fit_is_left_out_and_refused_by_name(
    make_bundle: MakeBundle, parts: dict[str, Any], settings: dict[str, Any], reason: str
):
    bundle = make_bundle()
    plant_variant(bundle, **parts)
    backend = choose(bundle, **settings)
    assert backend.name == "torch"
    assert reason in backend.left_out[0]
    with pytest.raises(UsageError, match=r"^classify.backend openvino: openvino-fp32 is left out: ") as refused:
        choose(bundle, backend="openvino", **settings)
    assert reason in str(refused.value)


def test_without_the_package_torch_runs_the_model(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle()
    plant_variant(bundle)
    monkeypatch.setitem(sys.modules, "openvino", None)
    backend = choose(bundle)
    assert backend.name == "torch"
    assert backend.left_out == (
        "openvino-fp32 is left out: openvino is not installed here; pip install 'imgbatch[openvino]'",
    )


def test_auto_leaves_out_what_was_slower_than_torch(make_bundle: MakeBundle):
    bundle = make_bundle()
    plant_variant(bundle, images_per_s={"original": 20.0, "variant": 15.0})
    assert choose(bundle).left_out == ("openvino-fp32 is left out: where it was made it had 0.75 of torch's speed",)
    assert choose(bundle, backend="openvino_fp32").name == "openvino_fp32"


@pytest.mark.parametrize("target", ["torch-bf16", "openvino-bf16"])
def test_bfloat16_is_for_processors_that_have_it(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, target: str):
    bundle = make_bundle()
    plant_variant(bundle, target)
    monkeypatch.setattr(backends, "has_bfloat16", lambda: True)
    assert choose(bundle).name == target.replace("-", "_")
    monkeypatch.setattr(backends, "has_bfloat16", lambda: False)
    assert choose(bundle).left_out == (f"{target} is left out: this processor has no bfloat16 arithmetic",)
    # What the head's processor lacks says nothing of a GPU elsewhere.
    plant_variant(bundle, "torch-bf16", device="cuda")
    assert choose(bundle, device="cuda").name == "torch_bf16"


def test_a_cluster_may_have_the_arithmetic_that_its_head_lacks(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
):
    bundle = make_bundle()
    plant_variant(bundle, "openvino-bf16")
    monkeypatch.setattr(backends, "has_bfloat16", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose(bundle, address="auto", backend="openvino_bf16").name == "openvino_bf16"
    for settings in (
        {"address": "auto", "backend": "openvino"},
        {"address": "auto", "backend": "openvino_bf16", "engine": "local"},
        {"backend": "openvino_bf16"},
    ):
        with pytest.raises(UsageError, match="openvino-bf16 is left out: this processor has no bfloat16 arithmetic"):
            choose(bundle, **settings)
    assert choose(bundle, address="auto").name == "torch"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert choose(bundle, backend="openvino_bf16").name == "openvino_bf16"


V100, T4, A100 = Gpu("V100", (7, 0)), Gpu("T4", (7, 5)), Gpu("A100", (8, 0))


@pytest.fixture
def on_gpus(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelBundle:
    """A bundle with three variants for GPUs, and this machine as if it had what runs them but for the GPU."""
    bundle = make_bundle()
    for rate, target in enumerate(("onnx-int8", "torch-compile", "torch-bf16"), start=2):
        plant_variant(bundle, target, device="cuda", images_per_s={"original": 1.0, "variant": float(rate)})
    for name in ("onnxruntime", "tensorrt"):
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(backends, "local_gpus", tuple)
    monkeypatch.setenv("CC", sys.executable)
    (tmp_path / "Python.h").touch()
    plant_headers(monkeypatch, "venv", {"venv": tmp_path})
    return bundle


def plant_headers(monkeypatch: pytest.MonkeyPatch, scheme: str, places: dict[str, Path]) -> None:
    """A Python of this scheme, with its headers at these places."""
    planted = SimpleNamespace(get_default_scheme=lambda: scheme, get_path=lambda _name, scheme: str(places[scheme]))
    monkeypatch.setattr(backends, "sysconfig", planted)


@pytest.mark.parametrize(
    ("gpus", "name", "left_out"),
    [
        ([A100], "torch_bf16", ()),
        ([], "torch_bf16", ()),
        ([Gpu("H9000", None)], "torch_bf16", ()),
        ([T4], "torch_compile", ("bfloat16 arithmetic needs a GPU of compute capability 8.0, and T4 has 7.5",)),
        ([A100, T4], "torch_compile", ("bfloat16 arithmetic needs a GPU of compute capability 8.0, and T4 has 7.5",)),
        (
            [V100, T4, V100],
            "torch_compile",
            ("bfloat16 arithmetic needs a GPU of compute capability 8.0, and T4 has 7.5, V100 has 7.0",),
        ),
        (
            [Gpu("P4", (6, 1))],
            "torch",
            (
                "bfloat16 arithmetic needs a GPU of compute capability 8.0, and P4 has 6.1",
                "Triton needs a GPU of compute capability 7.0, and P4 has 6.1",
                "TensorRT needs a GPU of compute capability 7.5, and P4 has 6.1",
            ),
        ),
    ],
)
def test_auto_takes_the_next_best_that_every_gpu_runs(
    on_gpus: ModelBundle, gpus: list[Gpu], name: str, left_out: tuple[str, ...]
):
    backend = choose(on_gpus, device="cuda", gpus=gpus)
    assert backend.name == name
    targets = ("torch-bf16", "torch-compile", "onnx-int8")
    said = tuple(f"{target} is left out: {reason}" for target, reason in zip(targets, left_out, strict=False))
    assert backend.left_out == said


def test_a_named_variant_that_the_gpu_does_not_run_is_refused_in_one_line(
    on_gpus: ModelBundle, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(backends, "local_gpus", lambda: (V100,))
    assert choose(on_gpus, device="cuda").name == "torch_compile"
    expected = (
        r"^classify.backend torch_bf16: torch-bf16 is left out: bfloat16 arithmetic needs a GPU of compute capability "
        r"8\.0, and V100 has 7\.0$"
    )
    with pytest.raises(UsageError, match=expected):
        choose(on_gpus, device="cuda", backend="torch_bf16")


def test_of_a_clusters_gpus_nothing_is_asked_here(on_gpus: ModelBundle, monkeypatch: pytest.MonkeyPatch):
    """The head's own say nothing of the nodes'; and what is named, nodes that join later may run."""
    monkeypatch.setattr(backends, "local_gpus", lambda: (V100,))
    assert choose(on_gpus, device="cuda", address="auto").name == "torch_bf16"
    mixed = choose(on_gpus, device="cuda", address="auto", gpus=[A100, T4])
    assert mixed.name == "torch_compile"
    assert mixed.left_out[0].endswith("; resources.classify_labels can keep the model to others")
    assert not choose(on_gpus, device="cuda", address="auto", gpus=[T4]).left_out[0].endswith("to others")
    assert choose(on_gpus, device="cuda", address="auto", gpus=[T4], backend="torch_bf16").name == "torch_bf16"


def test_float16_is_what_gpus_have_that_lack_bfloat16(on_gpus: ModelBundle):
    plant_variant(on_gpus, "torch-fp16", device="cuda", images_per_s={"original": 1.0, "variant": 3.5})
    assert choose(on_gpus, device="cuda", gpus=[A100]).name == "torch_bf16"
    assert choose(on_gpus, device="cuda", gpus=[T4, V100]).name == "torch_fp16"
    assert choose(on_gpus, device="cuda", gpus=[A100, T4], backend="torch_fp16").name == "torch_fp16"
    expected = r"torch-fp16 is left out: float16 arithmetic needs a GPU of compute capability 7\.0, and P4 has 6\.1"
    with pytest.raises(UsageError, match=expected):
        choose(on_gpus, device="cuda", gpus=[Gpu("P4", (6, 1))], backend="torch_fp16")


@pytest.mark.parametrize(
    ("target", "device", "part"), [("openvino-bf16", "cpu", "processor"), ("torch-bf16", "cuda", "GPU")]
)
def test_a_machine_that_would_compute_in_float32_does_not_load_what_is_reduced(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, target: str, device: str, part: str
):
    bundle = make_bundle()
    variant = plant_variant(bundle, target, device=device)
    monkeypatch.setattr(backends, "has_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    expected = rf"^this machine's {part} has no bfloat16 arithmetic, and the run was planned with {target}; keep"
    with pytest.raises(UsageError, match=expected):
        build_predictor(bundle, Backend(variant, device=device), device=device, batch_size=4, num_threads=1)


@pytest.mark.parametrize(
    ("device", "missing", "extra"),
    [("cpu", "onnxruntime", "onnxruntime"), ("cuda", "onnxruntime", "tensorrt"), ("cuda", "tensorrt", "tensorrt")],
)
def test_without_onnx_runtime_the_extra_of_the_device_is_named(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, device: str, missing: str, extra: str
):
    bundle = make_bundle()
    plant_variant(bundle, "onnx-int8", device=device)
    for name in ("onnxruntime", "tensorrt"):
        package = ModuleType(name)
        package.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, package)
    assert choose(bundle, device=device).name == "onnx_int8"
    monkeypatch.setitem(sys.modules, missing, None)
    expected = f"onnx-int8 is left out: {missing} is not installed here; pip install 'imgbatch[{extra}]'"
    assert choose(bundle, device=device).left_out == (expected,)


def test_torch_compile_needs_a_compiler(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch):
    bundle = make_bundle()
    plant_variant(bundle, "torch-compile")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in choose(bundle).left_out[0]


def test_a_gpu_needs_a_c_compiler_beside_it(on_gpus: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose(on_gpus, device="cuda").left_out == (), (
        "a head without a GPU knows nothing of the nodes that have one"
    )
    monkeypatch.setattr(backends, "local_gpus", lambda: (A100,))
    missing = "torch-bf16 is left out: torch.compile needs a C compiler; install gcc or name one in CC"
    assert choose(on_gpus, device="cuda").left_out[0] == missing
    for name, variable in (("clang", None), ("nvcc-cc", "nvcc-cc")):
        compiler = tmp_path / name
        compiler.touch(mode=0o755)
        if variable:
            monkeypatch.setenv("CC", variable)
        assert choose(on_gpus, device="cuda").name == "torch_bf16"
        compiler.unlink()
        assert choose(on_gpus, device="cuda").left_out[0] == missing


def test_a_gpu_needs_pythons_headers_where_triton_looks_for_them(
    on_gpus: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    places = {"posix_local": tmp_path / "local", "posix_prefix": tmp_path / "prefix", "venv": tmp_path / "venv"}
    monkeypatch.setattr(backends, "local_gpus", lambda: (A100,))
    for scheme, looked_in in (("posix_local", places["posix_prefix"]), ("venv", places["venv"])):
        plant_headers(monkeypatch, scheme, places)
        expected = f"torch-bf16 is left out: torch.compile needs Python's headers in {looked_in};"
        assert choose(on_gpus, device="cuda").left_out[0].startswith(expected)
        looked_in.mkdir()
        (looked_in / "Python.h").touch()
        assert choose(on_gpus, device="cuda").name == "torch_bf16"


def test_inductor_starts_few_processes_unless_it_is_told_otherwise(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
):
    from torch._inductor import config

    def compilers(target: str = "torch-compile", *, cores: int = 64) -> int:
        monkeypatch.setattr(backends, "num_cpus", lambda: cores)
        monkeypatch.setattr("imgbatch.core.predict.Predictor", lambda *_, **__: config.compile_threads)
        with config.patch(compile_threads=32):
            return variant_predictor(make_bundle(), target, {}, device="cpu", batch_size=4, num_threads=1)

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    assert [compilers(), compilers(cores=2), compilers("torch-bf16")] == [4, 2, 32]
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "32")
    assert compilers() == 32


def test_a_gpu_computes_fp32_with_what_torch_allows_it(make_bundle: MakeBundle):
    bundle = make_bundle()
    assert choose(bundle).describe() == "the model runs in torch, fp32"
    on_gpu = "the model runs in torch, fp32, convolutions in TF32 where the GPU has it"
    for chosen in (choose(bundle, device="cuda"), choose(bundle, device="cuda", backend="torch")):
        assert chosen.describe() == on_gpu
    assert planned_backend(Backend().fields, bundle, "cuda").describe() == on_gpu


def test_a_name_without_its_variant_says_how_to_make_it(make_bundle: MakeBundle):
    bundle = make_bundle()
    with pytest.raises(UsageError, match=rf"imgbatch model optimize {bundle.path} --target torch-compile"):
        choose(bundle, backend="torch_compile")


def test_a_changed_file_is_refused(make_bundle: MakeBundle):
    bundle = make_bundle()
    plant_variant(bundle)
    path = Path(bundle.path, "variants", "openvino-fp32", "model.bin")
    path.write_bytes(b"\0\2")
    with pytest.raises(UsageError, match=r"model.bin: not the file that variant.json describes \(sha256 differs\)"):
        choose(bundle)
    path.unlink()
    with pytest.raises(UsageError, match=r"model.bin: No such file or directory; make it again"):
        choose(bundle)
    assert choose(bundle, backend="torch") == Backend()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "openvino-fp16"}, "variant.json: target: "),
        ({"target": "openvino-int8"}, "variant.json: describes openvino-int8; make it again"),
        ({"files": {"../model.safetensors": "0"}}, "variant.json: files"),
        ({"format_version": 2}, "variant.json: format_version: "),
        ({"agreement": {"labels": 1.0}}, "variant.json: agreement.images: "),
        ({"batch_size": 0}, "variant.json: batch_size: "),
    ],
)
def test_a_description_that_is_odd_is_refused(make_bundle: MakeBundle, change: dict[str, Any], message: str):
    bundle = make_bundle()
    plant_variant(bundle)
    path = Path(bundle.path, "variants", "openvino-fp32", "variant.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError) as refused:
        load_variants(bundle)
    assert message in str(refused.value)


def test_a_description_that_is_no_json_is_refused(make_bundle: MakeBundle):
    bundle = make_bundle()
    plant_variant(bundle)
    Path(bundle.path, "variants", "openvino-fp32", "variant.json").write_text("{")
    with pytest.raises(UsageError, match=r"variant.json: its text: "):
        load_variants(bundle)


def test_a_run_keeps_the_variant_that_it_was_planned_with(make_bundle: MakeBundle):
    bundle = make_bundle()
    planned = plant_variant(bundle)
    fields = Backend(planned).fields
    assert fields == {"backend": "openvino_fp32", "variant": planned.variant_id}
    assert planned_backend(fields, bundle, "cpu") == Backend(planned)
    assert planned_backend(Backend().fields, bundle, "cpu") == Backend()
    with pytest.raises(UsageError, match=r"is for cpu and not for cuda; give --set resources\.device=cpu, or classify"):
        planned_backend(fields, bundle, "cuda")
    plant_variant(bundle, crop_size=48)
    with pytest.raises(UsageError, match=rf"with variant {planned.variant_id} \(openvino_fp32\), .* put it back"):
        planned_backend(fields, bundle, "cpu")


def agreement_of(labels: float, images: int) -> Agreement:
    return Agreement(images=images, labels=labels, largest_difference=0.1, mean_difference=0.01, images_with_target=0)


@pytest.mark.parametrize(
    ("target", "right", "images", "told"),
    [
        ("openvino-int8", 169, 170, "170 images say between 96.7% and 99.9% (95%), and classify asks for 99%"),
        ("openvino-int8", 57, 57, "57 images say between 93.7% and 100.0% (95%)"),
        ("openvino-int8", 999, 1000, None),
        ("openvino-int8", 160, 170, None),  # it is left out, and that is what is said
        ("mnn-fp32", 57, 57, None),
        ("torch-compile", 57, 57, None),
    ],
)
def test_few_images_leave_a_doubt(
    make_bundle: MakeBundle, target: str, right: int, images: int, told: str | None
) -> None:
    variant = plant_variant(make_bundle(), target, agreement=agreement_of(right / images, images))
    doubt = variant.doubt(0.99)
    assert (doubt is None) if told is None else (doubt is not None and doubt.startswith(told))
