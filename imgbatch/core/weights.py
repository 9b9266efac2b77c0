"""Weights: read from a file or from torchvision, checked, and fitted to a network. Nothing is ever unpickled.

The header of a safetensors file is read without torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from imgbatch.core import storage
from imgbatch.core.architectures import (
    auxiliary_prefixes,
    build_network,
    first_convolution_name,
    head_module_name,
    published_weights,
)
from imgbatch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

_MAX_HEADER_BYTES = 16 * 2**20
"""The header of the largest network here has about 100 KB."""

_NOT_PARAMETERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\.\w+)$")
"""Names in the published densenet weights, of before PyTorch 0.4: ``norm.1`` for what is ``norm1`` now."""
_CONNECT_TIMEOUT_S = 20.0


def read_header(uri: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a safetensors file, name to shape, from its header alone.

    Raises:
        UsageError: the file is not there or its header is not a safetensors header.
    """
    try:
        with storage.open_input(uri) as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise UsageError(f"{uri}: not a safetensors file (its header would have {length} bytes)")
            header = file.read(length)
    except OSError as error:
        raise UsageError(f"{uri}: {error.strerror or error}") from error
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        if not all(isinstance(size, int) and size >= 0 for shape in shapes.values() for size in shape):
            raise ValueError("a shape is not a list of sizes")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{uri}: not a safetensors file (its header cannot be read)") from error
    return shapes


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Trainable values among tensors; statistics and indices do not count."""
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_NOT_PARAMETERS))


def num_head_outputs(arch: str, shapes: Mapping[str, tuple[int, ...]], *, where: str) -> int:
    """How many logits the weights give; raises :class:`UsageError` if they have no head of ``arch``."""
    name = f"{head_module_name(arch)}.weight"
    if forest := shapes.get(f"{head_module_name(arch)}.shares"):
        return forest[-1]
    if not shapes.get(name):
        raise UsageError(f"{where}: not weights of {arch} (there is no {name}); give the --arch they were made for")
    return shapes[name][0]


def num_head_inputs(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many features the head sees, from the shapes of weights that :func:`num_head_outputs` has accepted."""
    head = head_module_name(arch)
    return shapes[f"{head}.importances"][0] if f"{head}.importances" in shapes else shapes[f"{head}.weight"][1]


def num_image_channels(arch: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many channels the first layer takes; 3 where the weights have no such layer."""
    shape = shapes.get(f"{first_convolution_name(arch)}.weight", ())
    return shape[1] if len(shape) == 4 else 3


def adapt_channels(arch: str, state_dict: Mapping[str, Tensor], num_channels: int) -> dict[str, Tensor]:
    """Weights for RGB made weights for ``num_channels``; those for as many already stay as they are.

    The filters of red, green and blue are repeated over the channels in turn and scaled by ``3 / num_channels``, so
    that an image of equal channels gives what it gave in grey (as timm's ``adapt_input_conv``, Wightman). One channel
    gets their sum.
    """
    name = f"{first_convolution_name(arch)}.weight"
    weight_DChw = state_dict.get(name)
    if weight_DChw is None or weight_DChw.ndim != 4 or weight_DChw.shape[1] == num_channels:
        return dict(state_dict)
    given = weight_DChw.shape[1]
    if num_channels == 1:
        return {**state_dict, name: weight_DChw.sum(dim=1, keepdim=True)}
    repeated = weight_DChw.repeat(1, -(-num_channels // given), 1, 1)[:, :num_channels]
    return {**state_dict, name: (repeated * (given / num_channels)).contiguous()}


def load_safetensors(uri: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file: mapped from a local disk, read whole from elsewhere."""
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        if storage.is_local(uri):
            return safetensors.torch.load_file(storage.local_path(uri))
        return safetensors.torch.load(storage.read_bytes(uri))
    except SafetensorError as error:
        raise UsageError(f"{uri}: not a sound safetensors file ({error})") from error
    except OSError as error:
        raise UsageError(f"{uri}: {error.strerror or error}") from error


def read_state_dict(source: str, arch: str) -> dict[str, Tensor]:
    """The state dict of ``arch`` in a safetensors or ``.pth`` file, or torchvision's published one.

    Args:
        source: a path or URI; or ``imagenet``, ``DEFAULT`` or the name of published weights (``IMAGENET1K_V1``).
        arch: what the weights are for: auxiliary heads are dropped and old names brought up to date.

    Raises:
        UsageError: the file is missing, unreadable or holds more than tensors; published weights cannot be had.
    """
    name = published_name(source)
    state_dict = _download(arch, name) if name else _unwrapped(_read_file(source))
    dropped = auxiliary_prefixes(arch)
    return {
        _OLD_DENSENET.sub(r"\1\2", name) if arch.startswith("densenet") else name: tensor
        for name, tensor in state_dict.items()
        if not name.startswith(dropped or ("\0",))
    }


def published_name(source: str) -> str | None:
    """The name of published weights that ``source`` stands for, or none if it is a file."""
    if source.lower() in ("imagenet", "default"):
        return "DEFAULT"
    return source if re.fullmatch(r"IMAGENET1K_[A-Z0-9_]+", source) else None


def fit_network(arch: str, state_dict: Mapping[str, Tensor], *, crop_size: int, where: str) -> nn.Module:
    """The network of ``arch`` with exactly these weights, in evaluation mode; the weights keep their type.

    A ``vit_*`` for another ``crop_size`` than its weights has its position embeddings interpolated (bicubic).

    Raises:
        UsageError: a weight is missing, left over or of another shape.
    """
    from imgbatch.core.forest import adopt_forest

    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    network = build_network(
        arch,
        num_head_outputs(arch, shapes, where=where),
        crop_size=crop_size,
        num_channels=num_image_channels(arch, shapes),
        empty=True,
    )
    adopt_forest(network, arch, shapes)
    state_dict = dict(state_dict)
    if arch.startswith("vit_"):
        state_dict = _resize_positions(arch, state_dict, crop_size)
    wanted = network.state_dict()
    # A batch norm fills in its counter, which checkpoints from before PyTorch 0.4 do not have.
    missing = [name for name in wanted if name not in state_dict and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state_dict if name not in wanted]
    common = [(name, tensor, state_dict[name]) for name, tensor in wanted.items() if name in state_dict]
    other_shape = [name for name, want, have in common if want.shape != have.shape]
    other_kind = [name for name, want, have in common if want.is_floating_point() != have.is_floating_point()]
    for what, names in (
        ("lack", missing),
        ("also have", unexpected),
        ("have another shape of", other_shape),
        ("hold integers for decimals, or the reverse, in", other_kind),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(f"{where}: not weights of {arch}: they {what} {names[0]}{more}")
    network.load_state_dict(state_dict, assign=True)
    return network.eval()


def expand_binary_head(arch: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head of one logit z (sigmoid) as two logits (softmax): [0, z] gives the probabilities [1 - s(z), s(z)]."""
    import torch

    head = head_module_name(arch)
    expanded = dict(state_dict)
    for name in (f"{head}.weight", f"{head}.bias"):
        if name in expanded:
            expanded[name] = torch.cat([torch.zeros_like(expanded[name]), expanded[name]])
    return expanded


def _read_file(source: str) -> dict[str, Tensor]:
    try:
        with storage.open_input(source) as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(f"--weights {source}: {error.strerror or error}") from error
    # A zip archive or a bare pickle: what torch.save writes.
    if (magic == b"PK\x03\x04" or magic[:1] == b"\x80") and not source.endswith(".safetensors"):
        return _tensors(_load_torch_file(source), source)
    read_header(source)
    return load_safetensors(source)


def _load_torch_file(source: str) -> Any:
    import pickle

    import torch

    try:
        with storage.open_input(source) as file, warnings.catch_warnings():
            # What it warns of, an unusual pickle protocol, it also refuses if need be.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"--weights {source}: holds Python objects besides tensors, which are never loaded; "
            "save the state dict alone, best as safetensors"
        ) from error
    except Exception as error:  # a damaged file raises anything, IndexError and struct.error among them
        raise UsageError(f"--weights {source}: cannot be read ({type(error).__name__}); is it whole?") from error


def _tensors(loaded: Any, source: str) -> dict[str, Tensor]:
    """The state dict in what a checkpoint holds."""
    import torch

    for key in _WRAPPER_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise UsageError(f"--weights {source}: not a state dict (names to tensors); save network.state_dict()")
    return {str(name): tensor.detach() for name, tensor in loaded.items()}


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the names that wrappers of a network put in front, one inside the other in any order."""
    for prefix in _WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _download(arch: str, name: str) -> dict[str, Tensor]:
    weights = published_weights(arch, name)
    try:
        with _socket_timeout(_CONNECT_TIMEOUT_S):
            return dict(weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--weights {name}: cannot download {weights.url} ({getattr(error, 'reason', error)}); "
            "download it where there is a network and give the file"
        ) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _resize_positions(arch: str, state_dict: dict[str, Tensor], crop_size: int) -> dict[str, Tensor]:
    from torchvision.models.vision_transformer import interpolate_embeddings

    patch_size = int(arch.rsplit("_", 1)[1])
    positions = state_dict.get("encoder.pos_embedding")
    num_patches = 0 if positions is None or positions.ndim != 3 else positions.shape[1] - 1
    if num_patches in (0, (crop_size // patch_size) ** 2) or math.isqrt(num_patches) ** 2 != num_patches:
        return state_dict
    return dict(interpolate_embeddings(crop_size, patch_size, dict(state_dict)))
