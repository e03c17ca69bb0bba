"""What travels between the producers of a quantized network: numbers, and how to read them.

A consumer behind a ``OneOf`` or a ``Repeat`` takes what the active producer made, so everything it has to know travels
with the tensor: no static wiring, and no global mode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from nasq.quant.program import Op
from nasq.quant.program import Tensor as TensorSpec

__all__ = ["Grid", "Mode", "Recorder", "Value"]

Mode = Literal["float", "calibrate", "fake", "integer"]
"""How a quantized network computes.

* ``"float"``: no quantizer acts.
* ``"calibrate"``: as float, while every quantizer looks at its tensor.
* ``"fake"``: real values rounded to the grid, gradients by straight-through estimation (training).
* ``"integer"``: container integers held in fp32 (evaluation, ranking, export).
"""


@dataclass(frozen=True)
class Grid:
    """The grid of a quantized tensor.

    Attributes:
        step: 0-d fp32 tensor, positive.
        zero_point: Container integer of real 0, as a float or a 0-d tensor that carries gradients.
        low, high: Smallest and largest container integer.
        bits: Nominal bit-width.
    """

    step: Tensor
    zero_point: float | Tensor
    low: int
    high: int
    bits: int

    def reach(self) -> int:
        """The largest size of its integers minus the zero-point."""
        zero = self.fixed()[1]
        return max(abs(self.low - zero), abs(self.high - zero))

    def fixed(self) -> tuple[float, int]:
        """Step and zero-point as plain numbers."""
        zero = self.zero_point
        return float(self.step.detach()), int(zero.detach() if isinstance(zero, Tensor) else zero)


class Recorder:
    """Collects the operations of one integer forward pass: how a network becomes a flat program."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def name(self) -> str:
        """A fresh tensor name."""
        return f"t{len(self.ops)}"

    def spec(self, value: Value, grid: Grid) -> TensorSpec:
        """The description of a value that is about to be recorded."""
        step, zero = grid.fixed()
        return TensorSpec(self.name(), tuple(value.data.shape[1:]), step, zero, grid.low, grid.high, grid.bits)


@dataclass(frozen=True)
class Value:
    """A tensor on its way through a quantized network.

    Attributes:
        data: ``[N, ...]``: real values, or container integers held in fp32 in mode ``"integer"``.
        mode: How the network computes.
        grid: The grid the values are on; ``None`` where they are real.
        recorder: Where the operations of this pass are written, if anywhere.
        name: The recorder's name of this tensor.
    """

    data: Tensor
    mode: Mode
    grid: Grid | None = None
    recorder: Recorder | None = None
    name: str = ""

    def on(self, data: Tensor, grid: Grid | None) -> Value:
        """A new value of the same pass."""
        return replace(self, data=data, grid=grid, name="")

    def centred(self) -> Tensor:
        """The integers minus their zero-point (mode ``"integer"``)."""
        assert self.grid is not None
        zero = self.grid.zero_point
        return self.data if isinstance(zero, float) and zero == 0 else self.data - zero

    def real(self) -> Tensor:
        """The real values: ``step * (integer - zero_point)`` in mode ``"integer"``, the data otherwise."""
        if self.mode != "integer":
            return self.data
        assert self.grid is not None
        return self.centred() * self.grid.step
