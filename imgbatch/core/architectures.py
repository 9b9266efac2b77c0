"""The networks: their names, how to build one, its preprocessing and its head.

Names and heads are plain data; torch and torchvision are imported by the functions that need them.

Shape suffixes: B batch, C channel, H height, W width, D feature, K class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgbatch.core.torchvision_models import import_models
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_ARCHITECTURE = "resnet50"

SIMPLE_CNN = "simple_cnn"
HOG_COLOR = "hog_color"
"""Hand-made features, which need no weights."""
_MIN_HOG_PX = 16
"""Two pixels to each of its 8 x 8 cells."""

_NAMES_BY_HEAD: dict[str, tuple[str, ...]] = {
    "head": (SIMPLE_CNN, HOG_COLOR, "swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"),
    "fc": (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("wide_resnet50_2", "wide_resnet101_2"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        *("googlenet", "inception_v3"),
        *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
        *("regnet_x_400mf", "regnet_x_800mf", "regnet_x_1_6gf", "regnet_x_3_2gf", "regnet_x_8gf", "regnet_x_16gf"),
        *("regnet_x_32gf", "regnet_y_400mf", "regnet_y_800mf", "regnet_y_1_6gf", "regnet_y_3_2gf", "regnet_y_8gf"),
        *("regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"),
    ),
    "classifier": ("densenet121", "densenet161", "densenet169", "densenet201"),
    "classifier.1": (
        *("mobilenet_v2", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
        *(f"efficientnet_b{size}" for size in range(8)),
        *("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l"),
        *("squeezenet1_0", "squeezenet1_1"),
    ),
    "classifier.2": ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    "classifier.3": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "classifier.5": ("maxvit_t",),
    "classifier.6": (
        *("alexnet", "vgg11", "vgg13", "vgg16", "vgg19"),
        *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
    ),
    "heads.head": ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
}

_HEADS = {name: head for head, names in _NAMES_BY_HEAD.items() for name in names}

ARCHITECTURES: tuple[str, ...] = tuple(sorted(_HEADS))
"""Every name that ``--arch`` takes: ``simple_cnn``, ``hog_color`` and torchvision's classification networks."""

_AUXILIARY_HEADS = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


def check_architecture(arch: str) -> None:
    """Raise :class:`UsageError` unless ``arch`` is one of :data:`ARCHITECTURES`."""
    if arch not in _HEADS:
        family = arch.rstrip("0123456789")
        near = [name for name in ARCHITECTURES if family and name.startswith(family)] or list(ARCHITECTURES)
        raise UsageError(f"--arch {arch}: unknown architecture; one of {', '.join(near)}")


def check_crop_size(arch: str, crop_size: int) -> None:
    """Raise :class:`UsageError` if the network cannot take images of that side, px."""
    if arch.startswith("vit_"):
        patch_size = int(arch.rsplit("_", 1)[1])
        if crop_size % patch_size:
            raise UsageError(f"{arch}: crop_size {crop_size} must be a multiple of its patches of {patch_size} px")
    if arch == "maxvit_t" and crop_size != 224:
        raise UsageError(f"maxvit_t: takes images of 224 px only, not crop_size {crop_size}")
    if arch == HOG_COLOR and crop_size < _MIN_HOG_PX:
        raise UsageError(f"{HOG_COLOR}: crop_size {crop_size} must be at least {_MIN_HOG_PX}")


_FIRST_CONVOLUTIONS = {
    "alexnet": "features.0",
    "densenet": "features.conv0",
    "googlenet": "conv1.conv",
    "inception_v3": "Conv2d_1a_3x3.conv",
    "maxvit": "stem.0.0",
    "mnasnet": "layers.0",
    "regnet": "stem.0",
    "resnet": "conv1",
    "resnext": "conv1",
    "shufflenet": "conv1.0",
    SIMPLE_CNN: "features.0",
    "squeezenet": "features.0",
    "vgg": "features.0",
    "vit": "conv_proj",
    "wide_resnet": "conv1",
}
"""By family: the layer that sees the image's channels; ``features.0.0`` in all others."""


def first_convolution_name(arch: str) -> str:
    """The dotted name of the layer that sees the image; its weight is ``[D, C, h, w]``."""
    check_architecture(arch)
    return next((name for family, name in _FIRST_CONVOLUTIONS.items() if arch.startswith(family)), "features.0.0")


def head_module_name(arch: str) -> str:
    """The dotted name of the layer that gives the logits; its weight is ``[K, D]`` (or ``[K, D, 1, 1]``)."""
    check_architecture(arch)
    return _HEADS[arch]


def auxiliary_prefixes(arch: str) -> tuple[str, ...]:
    """Prefixes of weights that only training uses and that are left out: the auxiliary heads."""
    return _AUXILIARY_HEADS.get(arch, ())


def build_network(
    arch: str, num_classes: int, *, crop_size: int | None = None, num_channels: int = 3, empty: bool = False
) -> nn.Module:
    """The network with fresh weights, in training mode.

    Args:
        crop_size: side of the images it will see, px; only ``vit_*`` depend on it (default: as published).
        num_channels: of those images, 3 as published.
        empty: leave the weights out (on the meta device), for weights that are assigned at once.

    Raises:
        UsageError: an unknown architecture, or a crop that it cannot take.
    """
    import torch

    from imgbatch.core.hog_color import HogColor
    from imgbatch.core.simple_cnn import SimpleCNN

    check_architecture(arch)
    options: dict[str, Any] = {}
    if arch in _AUXILIARY_HEADS:
        options = {"aux_logits": False, "init_weights": not empty}
    if crop_size is not None:
        check_crop_size(arch, crop_size)
        if arch.startswith("vit_"):
            options = {"image_size": crop_size}
    if arch == HOG_COLOR and num_channels != 3:
        raise UsageError(f"{HOG_COLOR}: describes RGB, not {num_channels} bands; take another --arch")
    # regnet computes its widths with tensors, which the meta device cannot.
    with torch.device("meta" if empty and not arch.startswith("regnet_") else "cpu"):
        if arch == HOG_COLOR:
            return HogColor(num_classes)
        if arch == SIMPLE_CNN:
            network: nn.Module = SimpleCNN(num_classes)
        else:
            network = import_models().get_model(arch, weights=None, num_classes=num_classes, **options)
        return network if num_channels == 3 else _replace_first_convolution(network, arch, num_channels)


def _replace_first_convolution(network: nn.Module, arch: str, num_channels: int) -> nn.Module:
    """A fresh first layer for so many channels; its outputs spread as those of the old one do."""
    from torch import nn

    parent_name, _, name = first_convolution_name(arch).rpartition(".")
    parent = network.get_submodule(parent_name)
    old = parent.get_submodule(name)
    assert isinstance(old, nn.Conv2d)
    size: dict[str, Any] = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
    new = nn.Conv2d(num_channels, old.out_channels, bias=old.bias is not None, **size)
    if not old.weight.is_meta:
        nn.init.normal_(new.weight, std=float(old.weight.detach().std()) * (old.in_channels / num_channels) ** 0.5)
    parent.register_module(name, new)
    return network


def default_preprocess(arch: str, weights_name: str = "DEFAULT") -> PreprocessSpec:
    """The preprocessing that torchvision publishes with ``arch``'s weights of that name.

    googlenet and inception_v3 are published with a first layer that turns ImageNet's normalisation into
    ``(x - 0.5) / 0.5`` (``transform_input``); here that is the normalisation.

    Raises:
        UsageError: an unknown architecture or name of weights.
    """
    if arch == SIMPLE_CNN:
        return PreprocessSpec(resize_size=64, crop_size=64)
    if arch == HOG_COLOR:
        return PreprocessSpec(resize_size=128, crop_size=128, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    transform = published_weights(arch, weights_name).transforms()
    mean, std = tuple(transform.mean), tuple(transform.std)
    if arch in _AUXILIARY_HEADS:
        mean = std = (0.5, 0.5, 0.5)
    return PreprocessSpec(
        resize_size=transform.resize_size[0],
        crop_size=transform.crop_size[0],
        interpolation=transform.interpolation.value,
        mean=mean,
        std=std,
    )


def published_weights(arch: str, weights_name: str = "DEFAULT") -> Any:
    """torchvision's ``WeightsEnum`` member for ``arch``; raises :class:`UsageError` where there is none."""
    check_architecture(arch)
    if arch in (SIMPLE_CNN, HOG_COLOR):
        raise UsageError(f"{arch}: there are no published weights; give a file")
    members = import_models().get_model_weights(arch)
    name = members.DEFAULT.name if weights_name.upper() == "DEFAULT" else weights_name
    if name not in members.__members__:
        raise UsageError(f"{arch}: no published weights {weights_name!r}; one of {', '.join(members.__members__)}")
    return members[name]


def replace_head(network: nn.Module, arch: str, num_classes: int) -> nn.Module:
    """Put a fresh layer of ``num_classes`` logits in place of the last one; changes and returns ``network``."""
    from torch import nn

    old = network.get_submodule(head_module_name(arch))
    weight = old.weight
    assert isinstance(weight, nn.Parameter)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, kernel_size=1, device=weight.device, dtype=weight.dtype)
    else:
        new = nn.Linear(weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype)
    return set_head(network, arch, new)


def set_head(network: nn.Module, arch: str, head: nn.Module) -> nn.Module:
    """Make ``head`` the last layer; changes and returns ``network``."""
    parent_name, _, name = head_module_name(arch).rpartition(".")
    network.get_submodule(parent_name).register_module(name, head)
    return network


def forward_features(network: nn.Module, arch: str, images_BCHW: Tensor) -> Tensor:
    """What the head sees, ``features_BD``: the network's own description of each image.

    The gradient mode and training mode are the caller's. Features that still have a place in the image
    (squeezenet) are averaged over it.
    """
    captured: list[Tensor] = []
    head = network.get_submodule(head_module_name(arch))
    handle = head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    try:
        network(images_BCHW)
    finally:
        handle.remove()
    return pooled(captured[0])


def pooled(features: Tensor) -> Tensor:
    """``features_BD`` of what a head sees: averaged over the image where it still has places there."""
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features
