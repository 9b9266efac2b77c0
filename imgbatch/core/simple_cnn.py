"""A small network of our own, for images of 32 to 64 px and for tests that want a model in no time."""

from __future__ import annotations

from torch import Tensor, nn

_WIDTHS = (32, 64, 128)


class SimpleCNN(nn.Module):
    """Three convolutions with batch norm, each halving the image, then the mean over space and one linear layer.

    Takes images of any size from 8 px, ``[B, 3, H, W]`` float32; gives logits ``[B, num_classes]``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 3
        for width in _WIDTHS:
            blocks += [
                nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            channels = width
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BCHW = self.features(images_BCHW)
        return self.head(features_BCHW.mean(dim=(2, 3)))
