"""A bundle as one graph that takes images as they were decoded, for what runs outside torch.

Shape suffixes: B image of the batch, H height, W width, C channel, K class.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imgbatch.core.model import ModelBundle, load_network
from imgbatch.errors import UsageError, normalise_message


class ImageGraph(nn.Module):
    """The network with its normalisation in front: uint8 ``images_BHWC`` in, float32 ``[B, K]`` out.

    Args:
        probabilities: give these, with temperature and softmax (or sigmoid) applied, instead of logits.
    """

    scale_C11: Tensor
    shift_C11: Tensor
    temperature_K: Tensor

    def __init__(self, bundle: ModelBundle, *, probabilities: bool) -> None:
        super().__init__()
        self.network = load_network(bundle).requires_grad_(False)
        std_C = 255.0 * torch.tensor(bundle.preprocess.std)
        self.register_buffer("scale_C11", std_C.reciprocal().view(-1, 1, 1))
        self.register_buffer("shift_C11", (-255.0 * torch.tensor(bundle.preprocess.mean) / std_C).view(-1, 1, 1))
        self.register_buffer("temperature_K", torch.tensor(bundle.temperature))
        self._multilabel = bundle.task == "multilabel"
        self._probabilities = probabilities
        self.eval()

    def forward(self, images_BHWC: Tensor) -> Tensor:
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        logits_BK = self.network(self.shift_C11 + pixels_BCHW * self.scale_C11)
        if not self._probabilities:
            return logits_BK
        scaled_BK = logits_BK / self.temperature_K
        return scaled_BK.sigmoid() if self._multilabel else scaled_BK.softmax(dim=1)


def trace_graph(bundle: ModelBundle, *, probabilities: bool) -> torch.export.ExportedProgram:
    """:class:`ImageGraph` of a bundle as ``torch.export`` sees it, for batches of any size.

    Raises:
        UsageError: the network decides by the values of its input, as a forest of trees does.
    """
    spec = bundle.preprocess
    # A size of 1 would be taken for a constant.
    example_BHWC = torch.zeros((2, spec.crop_size, spec.crop_size, spec.num_channels), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(
            ImageGraph(bundle, probabilities=probabilities), (example_BHWC,), dynamic_shapes=({0: batch},)
        )
    except Exception as error:  # whatever the tracer stumbles over
        raise UsageError(
            f"{bundle.path}: {bundle.arch} cannot be written as a graph ({normalise_message(error)}); "
            f"it runs in torch only"
        ) from error
