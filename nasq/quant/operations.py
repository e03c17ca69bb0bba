"""The operations of a quantized subnet, as data: what :mod:`nasq.quant.program` is made of.

An operation holds its numbers and nothing else; `docs/integer_arithmetic.md` defines what each computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "GROUP_UNIT", "KINDS", "STAYS", "Add", "AvgPool", "Clip", "Concat", "Constant", "Conv", "Input", "LayerNorm", "Linear",
    "MatMul", "MaxPool", "Mul", "Op", "Pad", "Reshape", "Scale", "Slice", "Softmax", "Sub", "Table", "Tensor", "Transpose",
    "Upsample",
]  # fmt: skip

GROUP_UNIT = 2.0**22
"""The multiplier of a group whose step is the largest of its output; float64 holds its parts of sums below 2^31."""


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

    kind: ClassVar[str] = ""

    inputs: tuple[str, ...]
    output: Tensor
    path: str


@dataclass(frozen=True)
class Input(Op):
    """Quantizes the network's fp32 input: ``clip(rne(x / s) + z, low, high)`` (``inputs`` is empty)."""

    kind = "input"


@dataclass(frozen=True)
class Linear(Op):
    """A linear layer on the last dimension of ``[N, ..., in]``.

    Attributes:
        weight: int8 ``[out, in]``, the quantized weights *before* ``shift``.
        weight_bits: Bits one weight needs, 1..8; what packing uses.
        shift: uint8 ``[out]``: the weights used are shifted left by it (their bias grid is that much finer).
        weight_scale: fp32 ``[out]``, positive: the real value of one unit of the *shifted* weight (BN included).
        bias: int32 ``[out]`` in units of ``input scale * weight_scale``.
        wide: Whether the accumulator may pass 2^24, so that an fp32 simulation must accumulate in float64.
        weight_zero: int8 ``[out]`` (with groups ``[out, groups]``), zero-points within the range of ``weight_bits``;
            ``None``: all are 0 (symmetric).
        multipliers: int32 ``[out, groups]`` in ``1..2^22``: a weight of the group counts ``multiplier * 2^-22`` units;
            ``None``: there is one group, of multiplier ``2^22``. Not for convolutions; a layer that has them is wide.
        sizes: Inputs of every group, neighbours in order; empty without groups.
    """

    kind = "linear"

    weight: NDArray[np.int8]
    weight_bits: int
    shift: NDArray[np.uint8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    wide: bool
    weight_zero: NDArray[np.int8] | None = field(default=None, kw_only=True)
    multipliers: NDArray[np.int32] | None = field(default=None, kw_only=True)
    sizes: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def used(self) -> NDArray[np.int64]:
        """The weights that are multiplied: ``(weight - weight_zero) << shift``."""
        column = (-1, *[1] * (self.weight.ndim - 1))
        zero: NDArray[np.int64] | int = 0
        if self.weight_zero is not None:
            zero = self.weight_zero.astype(np.int64)
            zero = zero.reshape(column) if zero.ndim == 1 else np.repeat(zero, self.sizes, axis=1)
        return (self.weight.astype(np.int64) - zero) << self.shift.astype(np.int64).reshape(column)

    @property
    def summed(self) -> NDArray[np.float64]:
        """:attr:`used` in units of ``weight_scale``: times the multipliers of groups; exact, as multiples of ``2^-22``."""
        if self.multipliers is None:
            return self.used.astype(np.float64)
        return np.asarray(self.used * np.repeat(self.multipliers / GROUP_UNIT, self.sizes, axis=1), np.float64)


@dataclass(frozen=True)
class Conv(Linear):
    """A 2-d convolution on ``[N, C, H, W]``; ``weight`` is int8 ``[out, in/groups, kh, kw]``; padding is with real 0.

    By the rule ``add="one"`` it may read a second tensor, of its output's shape: the shortcut of a residual sum, which is
    added to what the convolution makes before anything is rounded.
    """

    kind = "conv"

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Add(Op):
    """The sum of two tensors of equal rank, in the order of ``inputs``; a dimension of size 1 is repeated."""

    kind = "add"


@dataclass(frozen=True)
class AvgPool(Op):
    """Average pooling; ``kernel`` is the whole map for global pooling (output ``[N, C, 1, 1]``).

    Attributes:
        kernel, stride: Of the window.
        padding: Real zeros on both sides; less than the kernel.
        counted: Whether a window's padding counts in its average: without, it is divided by what it has of the map.
    """

    kind = "avg_pool"

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = field(default=(0, 0), kw_only=True)
    counted: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class MaxPool(Op):
    """Max pooling; padding never wins (it is below every value)."""

    kind = "max_pool"

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]


@dataclass(frozen=True)
class Reshape(Op):
    """Flattens or reshapes everything behind the batch dimension to ``output.shape``."""

    kind = "reshape"


@dataclass(frozen=True)
class Slice(Op):
    """Takes every ``step``-th element from ``start`` on, as many as the output has: one entry per dimension behind the
    batch.
    """

    kind = "slice"

    start: tuple[int, ...]
    step: tuple[int, ...]


@dataclass(frozen=True)
class Pad(Op):
    """Adds real zeros (the zero-point) in front and behind; one entry per dimension behind the batch."""

    kind = "pad"

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Clip(Op):
    """Clips the integers to the output's range."""

    kind = "clip"


@dataclass(frozen=True)
class Concat(Op):
    """Joins tensors on dimension ``dim``, counted from 0 behind the batch."""

    kind = "concat"

    dim: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Transpose(Op):
    """Dimension ``i`` of the output is dimension ``order[i]`` of the input, both counted from 0 behind the batch."""

    kind = "transpose"

    order: tuple[int, ...]


@dataclass(frozen=True)
class Upsample(Op):
    """Repeats every row and column of ``[N, C, H, W]`` ``factor`` times."""

    kind = "upsample"

    factor: tuple[int, int]


@dataclass(frozen=True)
class Scale(Op):
    """The same integers under another scale: a product with a positive number."""

    kind = "scale"


@dataclass(frozen=True)
class Constant(Op):
    """A tensor that is the same for every image: container integers ``values``, uint8 of the output's shape."""

    kind = "constant"

    values: NDArray[np.uint8]


@dataclass(frozen=True)
class Table(Op):
    """A function of every integer alone: ``values[q]``, uint8 ``[256]``."""

    kind = "table"

    values: NDArray[np.uint8]


@dataclass(frozen=True)
class Mul(Op):
    """The product of two tensors of equal rank; a dimension of size 1 is repeated."""

    kind = "mul"


@dataclass(frozen=True)
class Sub(Op):
    """The first tensor minus the second, of equal shape."""

    kind = "sub"


@dataclass(frozen=True)
class MatMul(Op):
    """The matrix product of ``[N, ..., rows, inner]`` and ``[N, ..., inner, columns]``."""

    kind = "matmul"


@dataclass(frozen=True)
class Softmax(Op):
    """Softmax over the last dimension.

    Attributes:
        table: int32 ``[256]``, falling: ``2^k exp(-i s_x)`` for a distance ``i`` to the largest integer; times the size
            of the dimension at most 2^24, so that sums are exact.
        causal: Whether row ``i`` of the last two dimensions sees only the columns up to ``i``.
    """

    kind = "softmax"

    table: NDArray[np.int32]
    causal: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class LayerNorm(Op):
    """Normalisation over ``dims`` (counted from 0 behind the batch), then an affine along dimension ``channel``.

    Attributes:
        dims: What mean and variance are taken over.
        channel: The dimension along which ``gain`` and ``shift`` run.
        eps: What is added to the variance of real values.
        gain, shift: fp32 ``[size of channel]``.
    """

    kind = "layer_norm"

    dims: tuple[int, ...]
    channel: int
    eps: float
    gain: NDArray[np.float32]
    shift: NDArray[np.float32]


KINDS: Mapping[str, type[Op]] = {
    op.kind: op
    for op in (
        Input, Conv, Linear, Add, AvgPool, MaxPool, Reshape, Slice, Pad, Transpose, Upsample, Scale, Clip, Concat, Constant,
        Table, Mul, Sub, MatMul, Softmax, LayerNorm,
    )
}  # fmt: skip
"""Every operation by its name in bundles."""

STAYS = (MaxPool, Reshape, Slice, Pad, Transpose, Upsample, Clip)
"""Operations that work on the integers and keep the scale and zero-point of their input."""
