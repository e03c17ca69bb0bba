"""Weights as training leaves them, without training."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["randomise"]

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def randomise(module: _Module, seed: int = 0) -> _Module:
    """Gives norms what training gives them, so that an error in any of their four tensors shows: in place.

    Means are near 0, variances and scales near 1 (some scales negative); biases, and other one-dimensional parameters that
    are constant, get small noise. Convolutions and linear layers keep their initial weights.

    Args:
        module: A network with or without choices.
        seed: Of the noise.

    Returns:
        ``module``.
    """
    rng = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng).to(like)

    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.2 * noise(buffer))
            elif name == "running_var":
                buffer.copy_(0.3 + 1.4 * torch.rand(buffer.shape, generator=rng).to(buffer))
        for name, parameter in part.named_parameters(recurse=False):
            constant = parameter.ndim == 1 and bool((parameter == parameter[:1]).all())
            if name == "weight" and constant and getattr(part, "running_mean", None) is not None:
                parameter.add_(0.7 * noise(parameter) - 0.3)
            elif constant:
                parameter.add_(0.2 * noise(parameter))
    return module
