"""Elastic parameters that are no layer's weight: class tokens, position tables."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nasq.elastic.base import ElasticModule, Size
from nasq.errors import InputError
from nasq.space import maximum_of_size

__all__ = ["Parameter", "PlainParameter"]


class PlainParameter(nn.Module):
    """A parameter as a module: calling it gives the tensor. What :class:`Parameter` becomes on extraction.

    Args:
        value: Its value; copied.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        """The tensor."""
        return self.weight

    def extra_repr(self) -> str:
        """Its shape."""
        return str(tuple(self.weight.shape))


class Parameter(ElasticModule):
    """A learned tensor whose sizes may be choices; a smaller one is the first part along every dimension.

    In a network's forward, call it: ``x + self.position()``. Give it a first dimension of 1, which stands for the batch:
    operations broadcast over it, and tracing takes the first dimension of every tensor for the batch.

    Args:
        sizes: One size per dimension: ints, choices, or expressions of choices.
        std: Standard deviation of its initial values, a normal distribution cut off at two of them (ViT draws class
            token and position table so, with 0.02); 0 for zeros.

    Raises:
        InputError: No size is given, or ``std`` is negative.
    """

    def __init__(self, *sizes: Size, std: float = 0.02) -> None:
        super().__init__()
        if not sizes:
            raise InputError("a Parameter was given no size. Give one per dimension, such as Parameter(1, 1, width).")
        if not std >= 0:
            raise InputError(f"the standard deviation of a Parameter is {std}. Give a number of at least 0.")
        self.sizes, self.std = sizes, std
        self.holds(*sizes)
        self.weight = nn.Parameter(torch.empty(*map(maximum_of_size, sizes)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values."""
        if self.std:
            nn.init.trunc_normal_(self.weight, std=self.std, a=-2 * self.std, b=2 * self.std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self) -> Tensor:
        """The active slice, contiguous."""
        # A copy: without gradients, torch marks a view of a parameter as one that needs them, and its tools stumble on it.
        active = self.weight[tuple(slice(self.value(size)) for size in self.sizes)]
        return active.clone(memory_format=torch.contiguous_format)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active slice as a :class:`PlainParameter`."""
        return PlainParameter(self()).train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Number of elements of the active slice."""
        return prod(lookup(size) for size in self.sizes)

    def extra_repr(self) -> str:
        """Sizes as given."""
        return ", ".join(map(str, self.sizes))
