"""Weight distribution regularization: weights as flat as a uniform distribution lose least when they are rounded.

Source: EQ-Net (Xu et al., ICCV 2023), equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nasq.elastic.conv import Conv2d
from nasq.elastic.linear import Linear
from nasq.errors import InputError

__all__ = ["UNIFORM_KURTOSIS", "WeightDistribution", "moments"]

UNIFORM_KURTOSIS = 1.8
"""Kurtosis of a uniform distribution."""

_LAYERS = (Conv2d, Linear, nn.Conv2d, nn.Linear)


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Skewness and kurtosis of all values of a tensor, 0-d each: the means of ``((w - mu) / sigma)^3`` and ``^4``.

    ``sigma`` is the unbiased standard deviation, as in EQ-Net's released code. A constant tensor has no distribution to
    speak of: both are those of a uniform one, 0 and 1.8, with a gradient of 0.

    Args:
        weight: Any shape, two values or more.
    """
    values = weight.float()
    centred = values - values.mean()
    variance = centred.square().sum() / max(weight.numel() - 1, 1)
    # Below this the differences are what rounding the mean left.
    if not bool(variance > 1e-12 * values.square().mean()):
        nothing = 0 * values.sum()
        return nothing, nothing + UNIFORM_KURTOSIS
    unit = centred * torch.rsqrt(variance)
    square = unit.square()
    return (square * unit).mean(), square.square().mean()


class WeightDistribution:
    """The penalty ``(1 / L) sum_l (skewness(w_l)^2 * a + (kurtosis(w_l) - 1.8)^2 * b)`` on shared, unquantized weights.

    The paper gives no weights; the defaults are the released code's, which also leaves out the first layer. A layer
    whose weight has fewer than 16 values is left out as well: its moments say nothing.

    Args:
        module: Whose convolutions and linear layers, in the order of the network; the first one is left out.
        skewness, kurtosis: ``a`` and ``b``, 0 or more.

    Raises:
        InputError: A weight is negative, or the network has only one layer.
    """

    def __init__(self, module: nn.Module, skewness: float = 1.0, kurtosis: float = 0.015) -> None:
        for name, value in (("skewness", skewness), ("kurtosis", kurtosis)):
            if not value >= 0:
                raise InputError(f"the weight of {name} is {value!r}; allowed: a number, 0 or more")
        layers = [part for part in module.modules() if isinstance(part, _LAYERS)]
        self.weights: Sequence[Tensor] = [layer.weight for layer in layers[1:] if layer.weight.numel() >= 16]
        if not self.weights:
            raise InputError(
                "weight distribution regularization needs a convolution or linear layer behind the first one, and there "
                "is none. Set skewness and kurtosis to 0."
            )
        self.skewness, self.kurtosis = skewness, kurtosis

    def __call__(self) -> Tensor:
        """The penalty, 0-d; its gradient goes to the weights."""
        found = [moments(weight) for weight in self.weights]
        skewness = torch.stack([skew.square() for skew, _ in found]).mean()
        kurtosis = torch.stack([(kurt - UNIFORM_KURTOSIS).square() for _, kurt in found]).mean()
        return self.skewness * skewness + self.kurtosis * kurtosis
