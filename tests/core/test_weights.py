from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from imgbatch.core.architectures import build_network
from imgbatch.core.weights import (
    count_parameters,
    expand_binary_head,
    fit_network,
    published_name,
    read_header,
    read_state_dict,
)
from imgbatch.errors import UsageError


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_network("simple_cnn", 3).state_dict()


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_safetensors_pth_and_wrapped_checkpoints_give_the_same(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    safetensors.torch.save_file(state_dict, tmp_path / "w.safetensors")
    torch.save(state_dict, tmp_path / "zip.pth")
    torch.save(state_dict, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state_dict.items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "checkpoint.pt")
    for name in ("w.safetensors", "zip.pth", "old.pth", "checkpoint.pt"):
        assert_same(read_state_dict(str(tmp_path / name), "simple_cnn"), state_dict)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize(("save", "suffix"), [(torch.save, "pth"), (safetensors.torch.save_file, "safetensors")])
def test_wrappers_of_a_network_may_be_inside_each_other(tmp_path: Path, state_dict, prefix, save, suffix):
    path = tmp_path / f"w.{suffix}"
    save({prefix + name: tensor for name, tensor in state_dict.items()}, path)
    assert_same(read_state_dict(str(path), "simple_cnn"), state_dict)


def test_weights_come_from_any_filesystem(state_dict: dict[str, torch.Tensor]):
    import fsspec

    with fsspec.open("memory://weights/w.safetensors", "wb") as file:
        file.write(safetensors.torch.save(state_dict))
    assert_same(read_state_dict("memory://weights/w.safetensors", "simple_cnn"), state_dict)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Payload()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="holds Python objects besides tensors, which are never loaded"):
        read_state_dict("evil.pth", "resnet18")
    assert not Path("unpickled").exists()


def test_a_pickled_network_is_refused(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(UsageError, match="save the state dict alone"):
        read_state_dict(str(tmp_path / "network.pth"), "resnet18")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "not a safetensors file"),
        ("a.safetensors", struct.pack("<Q", 2**62) + b"{}", "its header would have 4611686018427387904 bytes"),
        ("a.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000, "its header cannot be read"),
        ("a.safetensors", struct.pack("<Q", 2) + b"[]", "its header cannot be read"),
        ("a.safetensors", struct.pack("<Q", 15) + b'{"a":{"shape":3', "its header cannot be read"),
        ("a.bin", b"hello, I am a text", "not a safetensors file"),
        ("a.pth", b"PK\x03\x04 not a zip", "cannot be read"),
        ("a.pth", b"\x80\x04]q\x00.", "a.pth: "),
    ],
)
def test_odd_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_state_dict(str(tmp_path / name), "resnet18")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save(state_dict)[:-100])
    with pytest.raises(UsageError, match="not a sound safetensors file"):
        read_state_dict(str(path), "simple_cnn")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"w\.pth: No such file or directory"):
        read_state_dict(str(tmp_path / "w.pth"), "resnet18")


def test_something_else_than_a_state_dict_is_refused(tmp_path: Path):
    torch.save({"best": 0.9}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="not a state dict"):
        read_state_dict(str(tmp_path / "w.pth"), "resnet18")


def test_published_names():
    assert published_name("imagenet") == published_name("DEFAULT") == "DEFAULT"
    assert published_name("IMAGENET1K_V2") == "IMAGENET1K_V2"
    assert published_name("weights/IMAGENET1K_V2.pth") is None


def test_header_gives_shapes_without_the_data(tmp_path: Path, state_dict: dict[str, torch.Tensor]):
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state_dict, path, metadata={"made": "here"})
    shapes = read_header(str(path))
    assert shapes == {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    assert count_parameters(shapes) == sum(p.numel() for p in build_network("simple_cnn", 3).parameters())


def test_auxiliary_heads_and_old_names_are_brought_up_to_date(tmp_path: Path):
    from torchvision.models import googlenet

    with_aux = googlenet(weights=None, init_weights=False, num_classes=3)
    torch.save(with_aux.state_dict(), tmp_path / "g.pth")
    fit_network("googlenet", read_state_dict(str(tmp_path / "g.pth"), "googlenet"), crop_size=224, where="g.pth")

    now = build_network("densenet121", 3).state_dict()
    old = {}
    for name, tensor in now.items():
        for digit in "12":
            name = name.replace(f".norm{digit}.", f".norm.{digit}.").replace(f".conv{digit}.", f".conv.{digit}.")
        old[name] = tensor
    assert old.keys() != now.keys()
    torch.save(old, tmp_path / "d.pth")
    assert_same(read_state_dict(str(tmp_path / "d.pth"), "densenet121"), now)


def test_batch_norm_counters_may_be_missing(state_dict: dict[str, torch.Tensor]):
    old = {name: tensor for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}
    assert fit_network("simple_cnn", old, crop_size=32, where="w").state_dict().keys() == state_dict.keys()


def test_fitting_keeps_the_type_and_leaves_nothing_empty(state_dict: dict[str, torch.Tensor]):
    half = {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}
    network = fit_network("simple_cnn", half, crop_size=32, where="w")
    assert not network.training
    assert_same(network.state_dict(), half)


@pytest.mark.parametrize("arch", ["swin_v2_t", "regnet_x_400mf", "shufflenet_v2_x0_5"])
def test_networks_with_computed_buffers_survive_being_built_empty(arch: str):
    torch.manual_seed(0)
    network = build_network(arch, 3).eval()
    fitted = fit_network(arch, network.state_dict(), crop_size=224, where="w")
    images_BCHW = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(fitted(images_BCHW), network(images_BCHW))


def test_position_embeddings_follow_the_crop():
    torch.manual_seed(0)
    weights = build_network("vit_b_32", 3, crop_size=96).state_dict()
    assert weights["encoder.pos_embedding"].shape[1] == 10
    network = fit_network("vit_b_32", weights, crop_size=64, where="w")
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "not weights of simple_cnn: they lack head.bias$"),
        (lambda s: s.pop("head.weight"), "there is no head.weight"),
        (lambda s: s.update(extra=torch.zeros(1), more=torch.zeros(1)), "they also have extra and 1 more"),
        (lambda s: s.update({"features.0.weight": torch.zeros(32, 3, 5, 5)}), "another shape of features.0.weight"),
        (lambda s: s.update({"head.bias": torch.zeros(3, dtype=torch.int8)}), "hold integers for decimals"),
    ],
)
def test_weights_that_do_not_fit_are_named(state_dict: dict[str, torch.Tensor], change, message: str):
    change(state_dict)
    with pytest.raises(UsageError, match=message):
        fit_network("simple_cnn", state_dict, crop_size=32, where="w")


def test_one_logit_becomes_two_with_the_same_probability():
    torch.manual_seed(0)
    one = build_network("simple_cnn", 1).eval()
    two = fit_network("simple_cnn", expand_binary_head("simple_cnn", one.state_dict()), crop_size=32, where="w")
    images_BCHW = torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(two(images_BCHW).softmax(1)[:, 1], one(images_BCHW).sigmoid()[:, 0])


def test_the_header_of_a_file_written_by_hand(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UsageError, match="its header cannot be read"):
        read_header(str(tmp_path / "w.safetensors"))
