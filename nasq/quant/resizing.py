"""Bilinear resizing on integers: two matrix products with constants, one for columns and one for rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.cuda import products
from nasq.quant import program
from nasq.quant.moving import permuted, viewed
from nasq.quant.producers import Producer
from nasq.quant.value import Grid, Value

__all__ = ["Resize", "interpolation"]

_UNITS = 128  # weights are whole multiples of 1/128, so that products and their sums are exact


def interpolation(inside: int, outside: int) -> Tensor:
    """The weights ``[inside, outside]`` of a bilinear resize along one side, in units of 1/128; every column adds to 128.

    They are torch's (``align_corners=False``), rounded to nearest; a column has two that are not 0 at most.
    """
    identity = torch.eye(inside, dtype=torch.float64)[None, :, :]
    weights = F.interpolate(identity, size=outside, mode="linear", align_corners=False)[0]
    units = torch.round(_UNITS * weights)
    # What rounding lost goes to the larger of the two neighbours.
    units[weights.argmax(0), torch.arange(outside)] += _UNITS - units.sum(0)
    return units.float()


class Resize(nn.Module):
    """Resizes a map; the result is on the grid of the input.

    Args:
        path: Where it is in the network.
        size: Rows and columns of the result, or
        layer: the elastic layer that knows them, or
        factor: what those of the input are multiplied by.
    """

    layer: Any

    def __init__(
        self,
        path: str,
        size: tuple[int, int] | None,
        layer: nn.Module | None = None,
        factor: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.path, self.size, self.factor = path, size, factor
        # A reference, not a registered submodule: the layer lives where the network put it.
        object.__setattr__(self, "layer", layer if size is None and factor is None else None)

    def active_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the result, for an input of ``height`` and ``width``."""
        if self.size is not None:
            return self.size
        if self.factor is not None:
            return height * self.factor[0], width * self.factor[1]
        side = self.layer.size
        # The extracted layer is torch's, whose size is a pair.
        return (self.layer.value(side),) * 2 if hasattr(self.layer, "value") else tuple(side)

    def forward(self, x: Value) -> Value:
        """``[N, C, H, W]`` to ``[N, C, rows, columns]``."""
        rows, columns = self.active_size(*x.data.shape[2:])
        if x.mode not in {"integer", "fake"}:
            return x.on(F.interpolate(x.data, size=(rows, columns), mode="bilinear", align_corners=False), x.grid)
        wide = self._along(x, columns)
        if x.data.shape[2] == rows:
            return wide
        return permuted(self._along(permuted(wide, (0, 1, 3, 2), self.path), rows), (0, 1, 3, 2), self.path)

    def _along(self, x: Value, size: int) -> Value:
        """Resizes the last dimension."""
        channels, height, width = x.data.shape[1:]
        if width == size:
            return x
        units = interpolation(width, size).to(x.data.device)
        if x.mode == "fake":
            return x.on(_rounded(x.data, units, x.grid), x.grid)
        assert x.grid is not None
        step = torch.tensor(1.0 / _UNITS, device=x.data.device)
        constant = Producer.record(
            x, units[None], Grid(step, 0, 0, 255, 8), program.Constant, (), self.path,
            values=units.cpu().numpy().astype(np.uint8),
        )  # fmt: skip
        flat = viewed(x, (channels * height, width), self.path)
        total = products.matmul(flat.centred(), units) / _UNITS
        integers = total.round_().add_(x.grid.zero_point).clamp_(x.grid.low, x.grid.high)
        product = Producer.record(x, integers, x.grid, program.MatMul, (flat, constant), self.path)
        return viewed(product, (channels, height, size), self.path)


def _rounded(x: Tensor, units: Tensor, grid: Grid | None) -> Tensor:
    """The product on the grid, straight-through; from whole steps, because many results lie between two of them."""
    assert grid is not None
    step, y = grid.step.detach(), x @ (units / _UNITS)
    with torch.no_grad():
        exact = ((x / step).round() @ units / _UNITS).round() * step
    return y + (exact - y).detach()
