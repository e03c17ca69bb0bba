"""Producers that work on every element alone: functions as tables, products and differences of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasq.elastic.functions import unary
from nasq.quant import arithmetic, program
from nasq.quant.combining import Quantizer
from nasq.quant.producers import Producer
from nasq.quant.value import Grid, Value

__all__ = ["MulProducer", "SubProducer", "TableProducer", "table_of"]


def table_of(function: Callable[[Tensor], Tensor], before: Grid, after: Grid) -> Tensor:
    """What a function makes of every integer of a container: fp32 ``[256]`` integers on the grid ``after``.

    The function runs in float64, and its value is rounded once, so the table is the same on every machine but for values
    within 1e-15 of a tie.
    """
    step, zero = before.fixed()
    real = function((torch.arange(256, dtype=torch.float64) - zero) * step)
    scale, origin = after.fixed()
    steps = (torch.nan_to_num(real) / scale).clamp(-1024, 1024).round() + origin
    return steps.clamp(after.low, after.high).float().to(after.step.device)


class TableProducer(Producer):
    """A function of every element alone, such as hard-swish: a table of 256 entries on the integers.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        function: Its name (:mod:`nasq.elastic.functions`).
        arguments: Its numbers.
    """

    def __init__(self, path: str, quantizer: Quantizer, function: str, arguments: dict[str, Any]) -> None:
        super().__init__(path, quantizer, "none")
        self.function, self.arguments = function, arguments

    def forward(self, x: Value) -> Value:
        """A tensor to one of the same shape."""
        function = unary(self.function, self.arguments)
        if x.mode != "integer":
            return self.finish(function(x.data), x)
        assert x.grid is not None
        grid = self.output_grid()
        table = table_of(function, x.grid, grid)
        integers = arithmetic.look_up(table, x.data)
        if x.recorder is None:  # nothing is read back from a device then
            return x.on(integers, grid)
        values = table.cpu().numpy().astype(np.uint8)
        return self.record(x, integers, grid, program.Table, (x,), self.path, values=values)


class MulProducer(Producer):
    """The product of two quantized tensors, one of which may be repeated along dimensions of size 1."""

    def forward(self, a: Value, b: Value) -> Value:
        """Two tensors in, their quantized product out."""
        if a.mode != "integer":
            return self.finish(a.data * b.data, a)
        assert a.grid is not None and b.grid is not None
        grid = self.output_grid()
        ratio = (a.grid.step * b.grid.step) / grid.step
        # The runtime's kernel adds the zero-point before it rounds.
        steps = (a.centred() * b.centred()).mul_(ratio).add_(grid.zero_point).round_()
        return self.record(a, steps.clamp_(grid.low, grid.high), grid, program.Mul, (a, b), self.path)


class SubProducer(Producer):
    """The difference of two quantized tensors of one shape; on the device it runs in float, exactly as here."""

    def forward(self, a: Value, b: Value) -> Value:
        """Two tensors in, the first minus the second, quantized, out."""
        if a.mode != "integer":
            return self.finish(a.data - b.data, a)
        grid = self.output_grid()
        real = a.real() - b.real()
        integers = arithmetic.to_integers(real, grid.step, grid.zero_point, grid.low, grid.high)
        return self.record(a, integers, grid, program.Sub, (a, b), self.path)
