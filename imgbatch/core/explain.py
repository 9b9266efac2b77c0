"""Where in an image the model looked: Grad-CAM heat maps.

Selvaraju et al. 2017, through captum, which comes with the ``explain`` extra. A vision transformer has no map of
channels in space; there it is gradient times activation, summed over the features of each patch.

Legend of the shape suffixes: ``N`` images of the call, ``B`` batch, ``H`` height, ``W`` width, ``C`` channel,
``T`` token, ``D`` feature, ``K`` class.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imgbatch.core.architectures import head_module_name
from imgbatch.core.forest import refuse_forest
from imgbatch.core.model import ModelBundle, load_network
from imgbatch.core.predict import Predictor
from imgbatch.core.training.images import Normaliser
from imgbatch.errors import UsageError


class Explainer:
    """A loaded model that says where it looks.

    Raises:
        UsageError: captum is not installed, the model is a random forest, or the network has no map in space at this
            ``crop_size``.
    """

    def __init__(self, bundle: ModelBundle, *, batch_size: int = 8) -> None:
        try:
            from captum.attr import LayerGradCam, LayerGradientXActivation
        except ImportError as error:
            raise UsageError("captum is not installed; pip install 'imgbatch[explain]' brings it") from error
        self._bundle = bundle
        self._batch_size = batch_size
        self._network = load_network(bundle)
        refuse_forest(self._network, bundle.arch, where=f"model {bundle.path}")
        self._normalise = Normaliser(bundle.preprocess, torch.device("cpu"))
        self._is_vit = bundle.arch.startswith("vit_")
        layer = self._last_tokens() if self._is_vit else self._find_layer()
        self._attribution: Any = (LayerGradientXActivation if self._is_vit else LayerGradCam)(self._network, layer)

    def probabilities(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Of each class, float32 [N, K], 0 to 1, for uint8 images cropped as the bundle's preprocessing says."""
        predictions = Predictor(self._bundle, batch_size=self._batch_size).predict(images_NHWC)
        return predictions.probs_NK

    def heat(self, images_NHWC: np.ndarray, class_index_N: np.ndarray) -> np.ndarray:
        """Where each image speaks for a class: float32 [N, H, W], the strongest spot 1, or all 0 if nothing does.

        Args:
            images_NHWC: as for :meth:`probabilities`.
            class_index_N: the class that each image is asked about.
        """
        heats = [np.zeros((0, *images_NHWC.shape[1:3]), np.float32)]
        for start in range(0, len(images_NHWC), self._batch_size):
            images_BHWC = torch.tensor(images_NHWC[start : start + self._batch_size])
            class_B = torch.tensor(class_index_N[start : start + self._batch_size])
            heats.append(self._heat(self._normalise(images_BHWC.permute(0, 3, 1, 2)), class_B).numpy())
        return np.concatenate(heats)

    def _heat(self, inputs_BCHW: Tensor, class_B: Tensor) -> Tensor:
        """[B, H, W], 0 to 1."""
        attribution = self._attribution.attribute(inputs_BCHW, target=class_B)
        if self._is_vit:
            patches_BT = attribution.sum(dim=2)[:, 1:]  # the first token is the class's, not a patch
            side = math.isqrt(patches_BT.shape[1])
            attribution = patches_BT.reshape(-1, 1, side, side)
        coarse_B1HW = attribution.detach().relu()
        size = inputs_BCHW.shape[2:]
        heat_BHW = nn.functional.interpolate(coarse_B1HW, size, mode="bilinear", align_corners=False)[:, 0]
        strongest_B11 = heat_BHW.amax(dim=(1, 2), keepdim=True)
        return heat_BHW / strongest_B11.clamp_min(torch.finfo(torch.float32).tiny)

    def _last_tokens(self) -> nn.Module:
        """What the last attention looks at, ``[1, T, D]``: after it, only the class's token reaches the head."""
        *_, block = self._network.get_submodule("encoder.layers").children()
        return block.get_submodule("ln_1")

    def _find_layer(self) -> nn.Module:
        """The last module before the head whose output still has a place in the image, ``[1, C, H, W]``."""
        head = self._network.get_submodule(head_module_name(self._bundle.arch))
        called: list[tuple[nn.Module, bool]] = []

        def note(module: nn.Module, _: Any, output: Any) -> None:
            in_space = isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1
            called.append((module, in_space))

        handles = [
            module.register_forward_hook(note) for module in self._network.modules() if module is not self._network
        ]
        side, channels = self._bundle.preprocess.crop_size, self._bundle.preprocess.num_channels
        try:
            with torch.inference_mode():
                self._network(torch.zeros(1, channels, side, side))
        finally:
            for handle in handles:
                handle.remove()
        before_head = called[: next(index for index, (module, _) in enumerate(called) if module is head)]
        layer = next((module for module, in_space in reversed(before_head) if in_space), None)
        if layer is None:
            raise UsageError(
                f"model {self._bundle.path}: {self._bundle.arch} keeps no map in space at crop_size {side}; "
                "there is nothing to overlay"
            )
        return layer
