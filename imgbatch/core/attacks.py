"""Changes of an image that a person hardly sees and that are made to mislead the model.

Legend of the shape suffixes: ``B`` batch, ``C`` channel, ``H`` height, ``W`` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PGD_STEPS = 10

Loss = Callable[[Tensor], Tensor]
"""pixels_BCHW, float 0 to 1, to one number: the sum of the losses of the batch."""


def fgsm(loss: Loss, pixels_BCHW: Tensor, epsilon: float) -> Tensor:
    """One step of ``epsilon`` up the loss, in every channel of every pixel (Goodfellow et al. 2015).

    Args:
        pixels_BCHW: float, 0 to 1; so is what is returned.
        epsilon: largest change of a value.
    """
    return _step(loss, pixels_BCHW, epsilon).clamp(0, 1)


def pgd(loss: Loss, pixels_BCHW: Tensor, epsilon: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Steps of ``2.5 * epsilon / PGD_STEPS`` up the loss that stay within ``epsilon`` (Madry et al. 2018).

    Args:
        pixels_BCHW: float, 0 to 1; so is what is returned.
        generator: where in reach of ``epsilon`` to begin; none: at the image itself.
    """
    attacked_BCHW = pixels_BCHW
    if generator is not None:
        start_BCHW = torch.empty_like(pixels_BCHW).uniform_(-epsilon, epsilon, generator=generator)
        attacked_BCHW = (pixels_BCHW + start_BCHW).clamp(0, 1)
    for _ in range(PGD_STEPS):
        stepped_BCHW = _step(loss, attacked_BCHW, 2.5 * epsilon / PGD_STEPS)
        change_BCHW = (stepped_BCHW - pixels_BCHW).clamp(-epsilon, epsilon)
        attacked_BCHW = (pixels_BCHW + change_BCHW).clamp(0, 1)
    return attacked_BCHW


def _step(loss: Loss, pixels_BCHW: Tensor, size: float) -> Tensor:
    pixels_BCHW = pixels_BCHW.detach().requires_grad_()
    (gradient_BCHW,) = torch.autograd.grad(loss(pixels_BCHW), pixels_BCHW)
    return pixels_BCHW.detach() + size * gradient_BCHW.sign()
