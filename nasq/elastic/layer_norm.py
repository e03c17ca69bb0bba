"""Elastic layer normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.space import maximum_of_size

__all__ = ["LayerNorm"]


class LayerNorm(ElasticModule):
    """Layer normalisation (Ba et al. 2016) over a last dimension that may be a choice; a smaller one uses the first features.

    Mean and variance are those of the active features: a smaller layer norm is not a slice of the larger one's output.

    Args:
        normalized_shape: Size of the last dimension: an int, a choice, or an expression of choices.
        eps: Added to the variance.
        elementwise_affine: Whether scale and shift are learned.

    Shape:
        ``[..., normalized_shape]``, unchanged.
    """

    def __init__(self, normalized_shape: Size, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        self.holds(normalized_shape)
        features = maximum_of_size(normalized_shape)
        self.weight = nn.Parameter(torch.ones(features)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if elementwise_affine else None

    def active_features(self) -> int:
        """Number of active features."""
        return self.value(self.normalized_shape)

    def active_weight(self) -> Tensor | None:
        """The active slice ``[features]`` of the scale."""
        return None if self.weight is None else self.weight[: self.active_features()]

    def active_bias(self) -> Tensor | None:
        """The active slice ``[features]`` of the shift."""
        return None if self.bias is None else self.bias[: self.active_features()]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each vector of active features."""
        return F.layer_norm(x, (self.active_features(),), self.active_weight(), self.active_bias(), self.eps)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.LayerNorm`."""
        weight, bias = self.active_weight(), self.active_bias()
        plain = nn.LayerNorm(self.active_features(), self.eps, weight is not None, device="meta")
        if weight is not None and bias is not None:
            plain.weight = nn.Parameter(weight.detach().clone())
            plain.bias = nn.Parameter(bias.detach().clone())
        return plain.train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Scale and shift of the active features."""
        return 2 * lookup(self.normalized_shape) if self.weight is not None else 0

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}"
