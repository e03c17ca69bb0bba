"""Producers that combine numbers without weights: sums, average pools and concatenations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nasq.quant import arithmetic, program
from nasq.quant.forms import ActivationForm
from nasq.quant.producers import Activation, Producer, flatten
from nasq.quant.quantizers import ActivationQuantizer
from nasq.quant.value import Grid, Value

__all__ = ["AddProducer", "AvgPoolProducer", "ConcatProducer"]

Quantizer = ActivationQuantizer | ActivationForm


class AddProducer(Producer):
    """The sum of two quantized tensors, and the activation behind it (rule ``add="both"``)."""

    def forward(self, a: Value, b: Value) -> Value:
        """Two tensors of one shape in, their quantized sum out; one that is the same for every image is repeated."""
        if a.mode != "integer":
            return self.finish(a.data + b.data, a)
        assert a.grid is not None and b.grid is not None
        grid = self.output_grid()
        integers = arithmetic.add_integers(
            a.data,
            b.data,
            (a.grid.step, b.grid.step, grid.step),
            (a.grid.zero_point, b.grid.zero_point, grid.zero_point),
            grid.low,
            grid.high,
        )
        return self.record(a, integers, grid, program.Add, (a, b), self.path)


class AvgPoolProducer(Producer):
    """Average pooling with an output step of its own (never tied to its input's: simple ratios make exact ties).

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        activation: What it applies before quantizing.
        window: ``(kernel, stride)``, or ``None`` for the whole map.
        squeeze: Whether the map's dimensions of size one are dropped.
        padding: Real zeros around the map.
        counted: Whether they count in the average.
    """

    def __init__(
        self,
        path: str,
        quantizer: Quantizer,
        activation: Activation,
        window: tuple[tuple[int, int], tuple[int, int]] | None,
        squeeze: bool,
        padding: tuple[int, int] = (0, 0),
        counted: bool = True,
    ) -> None:
        super().__init__(path, quantizer, activation)
        self.window, self.squeeze, self.padding, self.counted = window, squeeze, padding, counted

    def forward(self, x: Value) -> Value:
        """``[N, C, H, W]`` to ``[N, C, H', W']`` (or ``[N, C]``)."""
        kernel, stride = self.window or ((x.data.shape[2], x.data.shape[3]), (1, 1))
        if x.mode != "integer":
            # A window of one pixel changes no number: it only requantizes.
            same = tuple(kernel) == tuple(stride) == (1, 1)
            y = x.data if same else F.avg_pool2d(x.data, kernel, stride, self.padding, False, self.counted)
            return self.finish(y.flatten(1) if self.squeeze else y, x)
        grid = self.output_grid()
        fields = {"kernel": tuple(kernel), "stride": tuple(stride), "padding": self.padding, "counted": self.counted}
        integers = self._integers(x, grid, tuple(kernel), tuple(stride))
        made = self.record(x, integers, grid, program.AvgPool, (x,), self.path, **fields)
        return flatten(made, self.path) if self.squeeze else made

    def _integers(self, x: Value, grid: Grid, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        assert x.grid is not None
        centred = x.centred()
        total = F.avg_pool2d(centred, kernel, stride, self.padding, divisor_override=1)
        if not self.counted:
            share = total / F.avg_pool2d(torch.ones_like(centred[:1]), kernel, stride, self.padding, divisor_override=1)
            # As the runtime's kernel: the quotient of the steps divides, and the zero-point is inside the rounding.
            return share.div_(grid.step / x.grid.step).add_(grid.zero_point).round_().clamp_(grid.low, grid.high)
        whole = kernel == tuple(x.data.shape[2:]) and self.padding == (0, 0)
        multiplier = arithmetic.pool_multiplier(x.grid.step, grid.step, kernel[0] * kernel[1], whole)
        return (total * multiplier).round_().add_(grid.zero_point).clamp_(grid.low, grid.high)


class ConcatProducer(Producer):
    """Joins tensors; each is requantized to the grid of the result.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        activation: What it applies before quantizing.
        dim: The dimension, counted from 0 behind the batch.
    """

    def __init__(self, path: str, quantizer: Quantizer, activation: Activation, dim: int = 0) -> None:
        super().__init__(path, quantizer, activation)
        self.dim = dim

    def forward(self, *values: Value) -> Value:
        """Tensors ``[N, C_i, ...]`` to one ``[N, sum C_i, ...]``; one that is the same for every image is repeated."""
        if values[0].mode != "integer":
            return self.finish(_joined([value.data for value in values], self.dim + 1), values[0])
        grid = self.output_grid()
        whole = _joined([_onto(value, grid) for value in values], self.dim + 1)
        return self.record(values[0], whole, grid, program.Concat, values, self.path, dim=self.dim)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    images = max(len(part) for part in parts)
    return torch.cat([part.expand(images, *part.shape[1:]) for part in parts], dim)


def _onto(value: Value, grid: Grid) -> Tensor:
    assert value.grid is not None
    if value.grid.fixed() == grid.fixed():
        return value.data.clamp(grid.low, grid.high)
    return arithmetic.to_integers(value.real(), grid.step, grid.zero_point, grid.low, grid.high)
