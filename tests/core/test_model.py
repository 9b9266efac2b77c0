from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from imgbatch.core.architectures import build_network
from imgbatch.core.model import ModelBundle, init_bundle, load_bundle, load_metrics, load_network
from imgbatch.core.transforms import DecodePolicy, PreprocessSpec
from imgbatch.errors import UsageError

MakeBundle = Callable[..., ModelBundle]

RESNET18 = "weights/resnet18-imagenet1k-pq-fp16.safetensors"


def rewrite(bundle: ModelBundle, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(bundle.path, "model.json")
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_bundle_comes_back_as_it_was_saved(make_bundle: MakeBundle):
    saved = make_bundle(
        task="multilabel",
        temperature=(1.0, 2.0, 0.5),
        thresholds={"labels": {"cat": 0.4}, "accept": {"cat": 0.9, "dog": 0.8}},
        preprocess=PreprocessSpec(
            resize_size=40,
            crop_size=32,
            interpolation="bicubic",
            decode=DecodePolicy(apply_orientation=False, background=(0, 0, 0), formats=("PNG",)),
        ),
        provenance={"made_by": "a test", "epochs": 3},
        metrics={"validation": {"top1": 0.5}},
    )
    assert load_bundle(saved.path) == saved
    assert load_metrics(saved.path) == {"validation": {"top1": 0.5}}
    assert {path.name for path in Path(saved.path).iterdir()} == {
        *("model.safetensors", "model.json", "metrics.json", "README.md")
    }
    card = Path(saved.path, "README.md").read_text()
    assert saved.model_id in card
    assert "cat, dog, owl" in card
    assert "epochs: 3" in card


def test_the_same_model_gives_the_same_bytes_and_identity(make_bundle: MakeBundle):
    first, second = make_bundle("a"), make_bundle("b")
    assert first.model_id == second.model_id
    for name in ("model.safetensors", "model.json", "README.md"):
        assert Path(first.path, name).read_bytes() == Path(second.path, name).read_bytes()


def test_a_model_keeps_its_identity_in_every_version(make_bundle: MakeBundle):
    """With another one, every unfinished run would be refused and every finished one classified again."""
    names = ("cat", "dog")
    weights = {name: torch.zeros_like(value) for name, value in build_network("simple_cnn", 2).state_dict().items()}
    assert make_bundle(task="binary", class_names=names, state_dict=weights).model_id == "mb4acac2633aa"


def test_identity_follows_what_decides_a_label_and_nothing_else(make_bundle: MakeBundle):
    base = make_bundle("base")
    same = [make_bundle("other", metrics={"top1": 1.0}, provenance={"made_by": "somebody else"})]
    different = [
        make_bundle("weights", seed=1),
        make_bundle("classes", class_names=("cat", "dog", "hen")),
        make_bundle("preprocess", preprocess=PreprocessSpec(resize_size=33, crop_size=32)),
        make_bundle("temperature", temperature=1.5),
        make_bundle("thresholds", thresholds={"accept": {"cat": 0.5}}),
        make_bundle("task", task="multilabel"),
    ]
    assert {bundle.model_id for bundle in same} == {base.model_id}
    assert len({bundle.model_id for bundle in [base, *different]}) == 1 + len(different)
    assert base.model_id[0] == "m"
    assert len(base.model_id) == 13


def test_bundles_live_on_any_filesystem(make_bundle: MakeBundle):
    from imgbatch.core import storage

    local = make_bundle()
    for name in ("model.safetensors", "model.json"):
        storage.replace(f"memory://bundles/m/{name}", Path(local.path, name).read_bytes())
    remote = load_bundle("memory://bundles/m")
    assert remote.model_id == local.model_id
    assert torch.equal(load_network(remote).head.weight, load_network(local).head.weight)


def test_describing_a_model_needs_no_torch(make_bundle: MakeBundle):
    code = f"import sys; from imgbatch.core.model import load_bundle; load_bundle({make_bundle().path!r}); "
    code += "print('torch' in sys.modules or 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_network_is_float32_and_ready(make_bundle: MakeBundle):
    weights = build_network("simple_cnn", 3).half().state_dict()
    bundle = make_bundle(state_dict=weights)
    network = load_network(bundle)
    assert not network.training
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert torch.equal(network.head.weight, weights["head.weight"].float())
    assert Path(bundle.path, "model.safetensors").stat().st_size < 250_000  # kept as float16


def test_tampered_weights_are_refused(make_bundle: MakeBundle):
    bundle = make_bundle()
    path = Path(bundle.path, "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"not the weights that model\.json describes"):
        load_network(load_bundle(bundle.path))


def test_weights_of_another_architecture_are_refused(make_bundle: MakeBundle):
    bundle = make_bundle()
    with pytest.raises(UsageError, match=r"not weights of swin_t: they lack"):
        load_network(replace(bundle, arch="swin_t"))


def test_weights_that_are_no_safetensors_are_refused(make_bundle: MakeBundle):
    bundle = make_bundle()
    torch.save({"head.weight": torch.zeros(3, 128)}, Path(bundle.path, "model.safetensors"))
    with pytest.raises(UsageError, match="not a safetensors file"):
        load_bundle(bundle.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=2), "format_version 2 is unknown; this imgbatch reads 1"),
        (lambda v: v.pop("format_version"), "format_version None is unknown"),
        (lambda v: v.update(weights_file="../../etc/passwd"), "unknown key 'weights_file'"),
        (lambda v: v.pop("arch"), "there is no 'arch'"),
        (lambda v: v.update(arch="../resnet18"), "arch '../resnet18' is unknown"),
        (lambda v: v.update(arch=["resnet18"]), "arch and task must be texts"),
        (lambda v: v.update(task="regression"), "unknown task"),
        (lambda v: v.update(class_names=["a", "a", "b"]), "class 'a' stands there twice"),
        (lambda v: v.update(class_names=["a", "b"]), "2 class names, but the weights' head has 3 outputs"),
        (lambda v: v.update(class_names=["a", "b", "__HIVE_DEFAULT_PARTITION__"]), "Hive's null partition"),
        (lambda v: v.update(weights_sha256="abc"), "weights_sha256 must be 64 hex digits"),
        (lambda v: v.update(temperature=0), "temperature must be a number above 0"),
        (lambda v: v.update(temperature=float("nan")), "temperature must be a number above 0"),
        (lambda v: v.update(temperature=[1.0, 1.0]), "one for each of 3 classes"),
        (lambda v: v.update(thresholds=[0.5]), "thresholds must be an object of objects"),
        (lambda v: v.update(thresholds={"reject": {}}), "unknown kind 'reject'; one of accept, labels"),
        (lambda v: v.update(thresholds={"accept": {"cow": 0.5}}), "'cow' is not one of the model's classes"),
        (lambda v: v.update(thresholds={"accept": {"cat": 2}}), "'cat' needs a number from 0 to 1, not 2"),
        (lambda v: v.update(provenance="me"), "provenance must be an object"),
        (lambda v: v.update(preprocess=None), "preprocess: "),
        (lambda v: v["preprocess"].update(crop_size=64), "preprocess: resize_size 32 must be at least crop_size 64"),
        (lambda v: v["preprocess"].update(crop_size="32"), "preprocess: "),
        (lambda v: v["preprocess"].update(resize_size=10**9), "whole numbers up to 4096"),
        (lambda v: v["preprocess"].update(interpolation="nearest"), "interpolation must be one of bilinear, bicubic"),
        (lambda v: v["preprocess"].update(resize_mode="zoom"), "resize_mode must be one of shorter_side, stretch"),
        (lambda v: v["preprocess"].update(median_size=2), "preprocess: median_size must be one of 0, 3, 5, 7, not 2"),
        (lambda v: v["preprocess"].update(std=[0.0, 1.0, 1.0]), "mean and std must be numbers, std above 0"),
        (lambda v: v["preprocess"].update(mean=[0.5], std=[0.5]), "1 channels, but no bands; RGB has 3"),
        (lambda v: v["preprocess"].update(noise=1), "preprocess: "),
        (lambda v: v["preprocess"]["decode"].update(formats=["JPEG", "EPS"]), "formats must be a list of some of JPEG"),
        (lambda v: v["preprocess"]["decode"].update(formats="JPEG"), "formats must be a list"),
        (lambda v: v["preprocess"]["decode"].update(background=[0, 0, 256]), "background must be three whole numbers"),
        (lambda v: v["preprocess"]["decode"].update(apply_orientation="no"), "apply_orientation must be true or false"),
    ],
)
def test_an_odd_description_is_refused_in_one_line(make_bundle: MakeBundle, change: Callable, message: str):
    bundle = make_bundle()
    rewrite(bundle, change)
    with pytest.raises(UsageError, match=message) as caught:
        load_bundle(bundle.path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{bundle.path}/model.json: ")


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b"3"])
def test_a_model_json_that_is_none_is_refused(make_bundle: MakeBundle, content: bytes):
    bundle = make_bundle()
    Path(bundle.path, "model.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.json: (not valid JSON|format_version None)"):
        load_bundle(bundle.path)


def test_no_model_at_all(tmp_path: Path):
    with pytest.raises(UsageError, match=r"model\.json: there is no model; make one with imgbatch model init"):
        load_bundle(str(tmp_path))


def test_saving_what_does_not_fit_together_writes_nothing(make_bundle: MakeBundle, tmp_path: Path):
    weights = build_network("simple_cnn", 3).state_dict()
    with pytest.raises(UsageError, match="2 class names, but the weights' head has 3 outputs"):
        make_bundle("bad", class_names=("a", "b"), state_dict=weights)
    with pytest.raises(UsageError, match="temperature must be"):
        make_bundle("bad", temperature=-1.0)
    assert not (tmp_path / "bad").exists()


@pytest.fixture
def weights_file(tmp_path: Path) -> str:
    torch.manual_seed(0)
    safetensors.torch.save_file(build_network("simple_cnn", 2).state_dict(), tmp_path / "w.safetensors")
    return str(tmp_path / "w.safetensors")


@pytest.fixture
def classes_file(tmp_path: Path) -> str:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    return str(tmp_path / "classes.txt")


def test_init_takes_sizes_and_says_where_it_came_from(tmp_path: Path, weights_file: str, classes_file: str):
    path = str(tmp_path / "model")
    bundle = init_bundle(path, arch="simple_cnn", weights=weights_file, classes=classes_file, crop_size=48)
    assert (bundle.preprocess.resize_size, bundle.preprocess.crop_size) == (48, 48)
    assert bundle.class_names == ("cat", "dog")
    assert bundle.provenance == {
        "made_by": "imgbatch model init",
        "weights": "w.safetensors",
        "classes": "classes.txt",
    }
    assert load_bundle(path) == bundle


def test_init_again_changes_nothing_and_another_model_is_not_overwritten(
    tmp_path: Path, weights_file: str, classes_file: str
):
    parts = {"arch": "simple_cnn", "weights": weights_file, "classes": classes_file}
    path = str(tmp_path / "model")
    first = init_bundle(path, **parts)
    assert init_bundle(path, **parts) == first
    with pytest.raises(UsageError, match=f"holds another model \\({first.model_id}\\)"):
        init_bundle(path, **parts, crop_size=32)
    assert load_bundle(path) == first
    assert init_bundle(path, **parts, crop_size=32, overwrite=True).model_id != first.model_id


def test_init_turns_one_logit_into_two_classes(tmp_path: Path, classes_file: str):
    torch.save(build_network("simple_cnn", 1).state_dict(), tmp_path / "one.pth")
    bundle = init_bundle(
        str(tmp_path / "model"),
        arch="simple_cnn",
        weights=str(tmp_path / "one.pth"),
        classes=classes_file,
        task="binary",
    )
    assert load_network(bundle).head.out_features == 2


def test_init_names_both_counts_when_classes_do_not_match(tmp_path: Path, weights_file: str):
    (tmp_path / "three.json").write_text('["a", "b", "c"]')
    classes = str(tmp_path / "three.json")
    with pytest.raises(UsageError, match=r"w\.safetensors: its head has 2 outputs, but --classes .*three.json names 3"):
        init_bundle(str(tmp_path / "model"), arch="simple_cnn", weights=weights_file, classes=classes)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"arch": "resnet18"}, "not weights of resnet18"),
        ({"arch": "lenet"}, "--arch lenet: unknown architecture; one of alexnet"),
        ({"weights": "imagenet"}, "simple_cnn: there are no published weights; give a file"),
        ({"resize_size": 32, "crop_size": 64}, "preprocess: resize_size 32 must be at least"),
        ({"task": "odd"}, "unknown task 'odd'"),
    ],
)
def test_init_refuses_in_one_line(
    tmp_path: Path, weights_file: str, classes_file: str, parts: dict[str, Any], message: str
):
    given = {"arch": "simple_cnn", "weights": weights_file, "classes": classes_file, **parts}
    with pytest.raises(UsageError, match=message):
        init_bundle(str(tmp_path / "model"), **given)


def test_real_weights_become_a_bundle(tmp_path: Path, test_data: Path):
    bundle = init_bundle(
        str(tmp_path / "model"), arch="resnet18", weights=str(test_data / RESNET18), classes="imagenet1k"
    )
    assert bundle.num_classes == 1000
    assert bundle.preprocess == PreprocessSpec(resize_size=256, crop_size=224)
    assert load_network(load_bundle(bundle.path))(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
