"""Fresh weights for proxies that measure an architecture rather than an initialisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["gaussian", "kaiming"]


@torch.no_grad()
def _draw(model: nn.Module, generator: torch.Generator, fan_in: bool) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight: Tensor = module.weight
            scale = (2 / weight[0].numel()) ** 0.5 if fan_in else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            if module.weight is not None:
                module.weight.fill_(1)
            if module.bias is not None:
                module.bias.zero_()
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()


def gaussian(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of convolutions and linear layers from N(0, 1), biases 0, norms as new."""
    _draw(model, generator, fan_in=False)


def kaiming(model: nn.Module, generator: torch.Generator) -> None:
    """Weights from N(0, 2 / fan-in), biases 0, norms as new."""
    _draw(model, generator, fan_in=True)
