"""Operations that keep their input's grid: max pooling, reshapes, and a ReLU behind a tensor that is quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.quant import program
from nasq.quant.producers import Activation, Producer, activate, flatten
from nasq.quant.value import Grid, Value

__all__ = ["Clip", "Flatten", "MaxPool", "Same", "Zero"]


class Same(nn.Module):
    """The tensor itself: identity and dropout.

    Args:
        layer: The network's own module, if there is one.
        rate: Of dropout that is a call of the function.
    """

    layer: nn.Module | None

    def __init__(self, layer: nn.Module | None = None, rate: float = 0.0) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.rate = rate

    def forward(self, x: Value) -> Value:
        """Applies dropout in training, nothing otherwise."""
        if x.mode == "integer":
            return x
        if self.layer is not None:
            return x.on(self.layer(x.data), x.grid) if self.layer.training else x
        return x.on(F.dropout(x.data, self.rate), x.grid) if self.training and self.rate else x


class Flatten(nn.Module):
    """Joins everything behind the batch dimension."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` to ``[N, product]``."""
        return flatten(x, self.path)


class MaxPool(nn.Module):
    """Max pooling on whatever the numbers stand for: the order of integers is that of real values."""

    def __init__(self, path: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.path, self.kernel, self.stride, self.padding = path, kernel, stride, padding

    def forward(self, x: Value) -> Value:
        """``[N, C, H, W]`` to ``[N, C, H', W']``."""
        data = F.max_pool2d(x.data, self.kernel, self.stride, self.padding)
        if x.mode != "integer":
            return x.on(data, x.grid)
        assert x.grid is not None
        return Producer.record(
            x,
            data,
            x.grid,
            program.MaxPool,
            (x,),
            self.path,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
        )


class Clip(nn.Module):
    """A ReLU or ReLU6 behind a tensor that is quantized already: a clip of its integers."""

    def __init__(self, path: str, activation: Activation) -> None:
        super().__init__()
        self.path, self.activation = path, activation

    def forward(self, x: Value) -> Value:
        """Same shape; the bounds of the grid move inwards."""
        if x.grid is None:
            return x.on(activate(x.data, self.activation), None)
        top = torch.round(6 / x.grid.step.detach())
        if x.mode != "integer":
            # Six is seldom on the grid: the bound is the grid's nearest value.
            limit = top * x.grid.step if self.activation == "relu6" else None
            return x.on(_relu(x.data, limit), x.grid)
        zero = x.grid.fixed()[1]
        high = x.grid.high if self.activation == "relu" else min(x.grid.high, zero + int(top.clamp_max(255)))
        low = max(x.grid.low, zero)
        if (low, high) == (x.grid.low, x.grid.high):
            return x
        grid = Grid(x.grid.step, x.grid.zero_point, low, high, x.grid.bits)
        return Producer.record(x, x.data.clamp(low, high), grid, program.Clip, (x,), self.path)


class Zero(nn.Module):
    """Zeros in place of a tensor (``torch.zeros_like``): all of its integers are clipped to its zero-point."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Value) -> Value:
        """Same shape and grid, every value 0."""
        if x.mode != "integer":
            return x.on(torch.zeros_like(x.data), x.grid)
        assert x.grid is not None
        zero = x.grid.fixed()[1]
        grid = Grid(x.grid.step, x.grid.zero_point, zero, zero, x.grid.bits)
        return Producer.record(x, torch.full_like(x.data, zero), grid, program.Clip, (x,), self.path)


def _relu(x: Tensor, limit: Tensor | None) -> Tensor:
    y = F.relu(x)
    return y if limit is None else torch.minimum(y, limit.to(y.dtype))
