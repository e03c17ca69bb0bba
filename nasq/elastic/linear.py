"""Elastic fully connected layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.elastic.segments import active_part
from nasq.space import maximum_of_size

__all__ = ["Linear", "plain_linear"]


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A torch linear layer that owns copies of ``weight`` ``[out, in]`` and ``bias`` ``[out]``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


class Linear(ElasticModule):
    """A linear layer whose features may be choices; a smaller one uses the first rows and columns.

    Args:
        in_features, out_features: Sizes: an int, a choice, or an expression of choices (:class:`Segments` for what is
            concatenated).
        bias: Whether a bias is added.

    Shape:
        ``[..., in_features]`` to ``[..., out_features]``.
    """

    def __init__(self, in_features: Size, out_features: Size, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.holds(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(maximum_of_size(out_features), maximum_of_size(in_features)))
        self.bias = nn.Parameter(torch.empty(self.weight.shape[0])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights as torch's own linear layer does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight.shape[1]))
            nn.init.uniform_(self.bias, -bound, bound)

    def active_weight(self) -> Tensor:
        """The active slice ``[out, in]``, contiguous: a strided slice takes another kernel and other last bits."""
        rows = active_part(self.weight, 0, self.out_features, self.value)
        return active_part(rows, 1, self.in_features, self.value).contiguous()

    def active_bias(self) -> Tensor | None:
        """The active slice ``[out]`` of the bias."""
        return None if self.bias is None else active_part(self.bias, 0, self.out_features, self.value).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies by the active slice."""
        try:
            return F.linear(x, self.active_weight(), self.active_bias())
        except RuntimeError:
            self.misfit(x, -1, "input features", self.value(self.in_features))
            raise

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.Linear`."""
        return plain_linear(self.active_weight(), self.active_bias()).train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Weights and biases of the active slice."""
        out = lookup(self.out_features)
        return out * lookup(self.in_features) + (out if self.bias is not None else 0)

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.in_features}, {self.out_features}"
