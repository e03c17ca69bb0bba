"""Operations that keep their input's grid: max pooling, reshapes, and a ReLU behind a tensor that is quantized already."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

from nasq.quant import program
from nasq.quant.producers import Activation, Producer, activate, flatten
from nasq.quant.value import Grid, Value

__all__ = ["Clip", "Flatten", "MaxPool", "Same"]


class Same(nn.Module):
    """The tensor itself: identity and dropout."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)

    layer: nn.Module | None

    def forward(self, x: Value) -> Value:
        """Applies dropout in training, nothing otherwise."""
        if self.layer is None or x.mode == "integer" or not self.layer.training:
            return x
        return x.on(self.layer(x.data), x.grid)


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
        if x.mode != "integer":
            return x.on(activate(x.data, self.activation), x.grid)
        assert x.grid is not None
        step, zero = x.grid.fixed()
        high = x.grid.high if self.activation == "relu" else min(x.grid.high, zero + round(6 / step))
        low = max(x.grid.low, zero)
        if (low, high) == (x.grid.low, x.grid.high):
            return x
        grid = Grid(x.grid.step, x.grid.zero_point, low, high, x.grid.bits)
        return Producer.record(x, x.data.clamp(low, high), grid, program.Clip, (x,), self.path)
