"""A quantized subnet as a flat program over integers: what is written to a bundle and what a runtime executes.

A :class:`Program` is data only: a list of operations in execution order and the NumPy arrays they use. It knows nothing
of torch, of choices or of training. `docs/integer_arithmetic.md` defines what each operation computes; in short, with
``rne`` rounding half to even and every product and quotient below rounded once to fp32:

* ``conv``/``linear``:  ``q_y = clip(rne(fp32(acc + bias) * M) + z_y, low, high)``, ``acc = op(q_x - z_x, w)``,
  ``w = (weight - weight_zero) << shift``, ``M = fp32(fp32(s_x * weight_scale) / s_y)``.
* ``add``:  ``clip(rne(fma(q_a, r_a, fma(q_b, r_b, f))), low, high)``, ``r = fp32(s / s_y)``,
  ``f = z_y - fma(r_a, z_a, fp32(r_b * z_b))``.
* ``avg_pool``:  ``clip(rne(fp32(sum(q_x - z_x)) * M) + z_y, low, high)``; over the whole map
  ``M = fp32(s_x / fp32(s_y * count))``, in windows ``M = fp32(fp32(s_x * fp32(1 / count)) / s_y)``, as a depthwise
  convolution of ones computes (the runtime's own kernel for windows adds floats).
* ``max_pool``, ``reshape``: on the integers; the output keeps the scale and zero-point of the input.
* ``clip``: ``clip(q_x, low, high)``; keeps scale and zero-point (a ReLU behind a tensor that is already quantized).
* ``concat``: an input whose scale and zero-point differ is requantized: ``clip(rne(fp32(s_x * (q_x - z_x)) / s_y) + z_y)``.

All activation integers live in ``uint8`` containers: a signed ``b``-bit tensor has zero-point 128 and the range
``[128 - 2^(b-1), 127 + 2^(b-1)]``; an unsigned or asymmetric one has the range ``[0, 2^b - 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Add",
    "AvgPool",
    "Clip",
    "Concat",
    "Conv",
    "Input",
    "Linear",
    "MaxPool",
    "Op",
    "Program",
    "Reshape",
    "Tensor",
]


@dataclass(frozen=True)
class Tensor:
    """One quantized activation tensor.

    Attributes:
        name: Unique in its program.
        shape: Without the batch dimension.
        scale: Step size; a value that fp32 holds exactly.
        zero_point: Container integer that stands for real 0.
        low, high: Smallest and largest container integer the tensor may hold.
        bits: Nominal bit-width, 1..8.
    """

    name: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    low: int
    high: int
    bits: int


@dataclass(frozen=True)
class Op:
    """Base of the operations: reads tensors by name, makes one tensor. ``path`` names the layer it came from."""

    inputs: tuple[str, ...]
    output: Tensor
    path: str


@dataclass(frozen=True)
class Input(Op):
    """Quantizes the network's fp32 input: ``clip(rne(x / s) + z, low, high)`` (``inputs`` is empty)."""


@dataclass(frozen=True)
class Linear(Op):
    """A linear layer on ``[N, in]``.

    Attributes:
        weight: int8 ``[out, in]``, the quantized weights *before* ``shift``.
        weight_bits: Bits one weight needs, 1..8; what packing uses.
        shift: uint8 ``[out]``: the weights used are shifted left by it (their bias grid is that much finer).
        weight_scale: fp32 ``[out]``, positive: the real value of one unit of the *shifted* weight (BN included).
        bias: int32 ``[out]`` in units of ``input scale * weight_scale``.
        wide: Whether the accumulator may pass 2^24, so that an fp32 simulation must accumulate in float64.
        weight_zero: int8 ``[out]``, zero-points within the range of ``weight_bits``; ``None``: all are 0 (symmetric).
    """

    weight: NDArray[np.int8]
    weight_bits: int
    shift: NDArray[np.uint8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    wide: bool
    weight_zero: NDArray[np.int8] | None = field(default=None, kw_only=True)

    @property
    def used(self) -> NDArray[np.int64]:
        """The weights that are multiplied: ``(weight - weight_zero) << shift``."""
        column = (-1, *[1] * (self.weight.ndim - 1))
        zero = 0 if self.weight_zero is None else self.weight_zero.astype(np.int64).reshape(column)
        return (self.weight.astype(np.int64) - zero) << self.shift.astype(np.int64).reshape(column)


@dataclass(frozen=True)
class Conv(Linear):
    """A 2-d convolution on ``[N, C, H, W]``; ``weight`` is int8 ``[out, in/groups, kh, kw]``; padding is with real 0."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Add(Op):
    """The sum of two tensors of equal shape, in the order of ``inputs``."""


@dataclass(frozen=True)
class AvgPool(Op):
    """Average pooling without padding; ``kernel`` is the whole map for global pooling (output ``[N, C, 1, 1]``)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]


@dataclass(frozen=True)
class MaxPool(Op):
    """Max pooling; padding never wins (it is below every value)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class Reshape(Op):
    """Flattens or reshapes everything behind the batch dimension to ``output.shape``."""


@dataclass(frozen=True)
class Clip(Op):
    """Clips the integers to the output's range."""


@dataclass(frozen=True)
class Concat(Op):
    """Joins tensors on the channel dimension (1)."""


@dataclass(frozen=True)
class Program:
    """A whole quantized subnet.

    Attributes:
        ops: In execution order; the first is the only :class:`Input`, the last makes the network's output.
        target: Name of the target whose arithmetic this is.
        add: The target's rule for sums: ``"both"`` (both inputs quantized) or ``"one"``.
        meta: Free JSON-able facts (subnet, space, data fingerprint); not used by the arithmetic.
    """

    ops: Sequence[Op]
    target: str
    add: str = "both"
    meta: Mapping[str, object] = field(default_factory=dict)

    @property
    def output(self) -> Tensor:
        """The network's output."""
        return self.ops[-1].output

    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``; raises ``KeyError`` where no operation makes it."""
        for op in self.ops:
            if op.output.name == name:
                return op.output
        raise KeyError(name)
