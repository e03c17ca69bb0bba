"""A quantized subnet as a flat program over integers: what is written to a bundle and what a runtime executes.

A :class:`Program` is data only: a list of operations in execution order and the NumPy arrays they use. It knows nothing
of torch, of choices or of training. `docs/integer_arithmetic.md` defines what each operation computes; in short, with
``rne`` rounding half to even and every product and quotient below rounded once to fp32:

* ``conv``/``linear``:  ``q_y = clip(rne(fp32(acc + bias) * M) + z_y, low, high)``, ``acc = op(q_x - z_x, w)``,
  ``w = (weight - weight_zero) << shift``, ``M = fp32(fp32(s_x * weight_scale) / s_y)``. With a second input (rule
  ``"one"``): ``clip(rne(fp32(fp32(fp32(acc + bias) * M) + fp32((q_r - z_r) R))) + z_y, low, high)``, ``R = fp32(s_r / s_y)``.
* ``add``:  ``clip(rne(fma(q_a, r_a, fma(q_b, r_b, f))), low, high)``, ``r = fp32(s / s_y)``,
  ``f = z_y - fma(r_a, z_a, fp32(r_b * z_b))``.
* ``mul``:  ``clip(rne(fp32(fp32((q_a - z_a)(q_b - z_b)) * M) + z_y), low, high)``, ``M = fp32(fp32(s_a * s_b) / s_y)``.
* ``sub``:  ``clip(rne(fp32(fp32((q_a - z_a) s_a) - fp32((q_b - z_b) s_b)) / s_y) + z_y, low, high)``.
* ``matmul``:  as ``linear`` without a bias, ``M = fp32(fp32(s_a * s_b) / s_y)``.
* ``avg_pool``:  ``clip(rne(fp32(sum(q_x - z_x)) * M) + z_y, low, high)``; over the whole map
  ``M = fp32(s_x / fp32(s_y * count))``, in windows ``M = fp32(fp32(s_x * fp32(1 / count)) / s_y)``, as a depthwise
  convolution of ones computes (the runtime's own kernel for windows adds floats).
  Where padding does not count, ``clip(rne(fp32(fp32(fp32(sum) / count) / fp32(s_y / s_x)) + z_y))``.
* ``max_pool``, ``reshape``, ``slice``, ``pad``, ``transpose``, ``upsample``: on the integers; the output keeps the scale and
  zero-point of the input, and what is padded is the zero-point. ``scale``: the same integers under another scale.
* ``table``:  ``values[q_x]``. ``constant``: the integers ``values``, for every image.
* ``softmax``:  ``e = table[max(q) - q]``, ``clip(rne(fp32(e / sum(e)) / s_y) + z_y)``.
* ``layer_norm`` over ``n`` numbers, in float64 up to the first ``fp32``: ``S = sum(q)``, ``V = n sum(q^2) - S^2``,
  ``h = fp32((n q - S) / sqrt(V + eps n^2 / s_x^2))``, ``clip(rne(fp32(fp32(h * gain) + shift) / s_y) + z_y)``.
* ``clip``: ``clip(q_x, low, high)``; keeps scale and zero-point (a ReLU behind a tensor that is already quantized).
* ``concat``: an input whose scale and zero-point differ is requantized: ``clip(rne(fp32(s_x * (q_x - z_x)) / s_y) + z_y)``.

All activation integers live in ``uint8`` containers: a signed ``b``-bit tensor has zero-point 128 and the range
``[128 - 2^(b-1), 127 + 2^(b-1)]``; an unsigned or asymmetric one has the range ``[0, 2^b - 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nasq.quant.operations import (
    Add,
    AvgPool,
    Clip,
    Concat,
    Constant,
    Conv,
    Input,
    LayerNorm,
    Linear,
    MatMul,
    MaxPool,
    Mul,
    Op,
    Pad,
    Reshape,
    Scale,
    Slice,
    Softmax,
    Sub,
    Table,
    Tensor,
    Transpose,
    Upsample,
)  # fmt: skip

__all__ = [
    "Add", "AvgPool", "Clip", "Concat", "Constant", "Conv", "Input", "LayerNorm", "Linear", "MatMul", "MaxPool", "Mul", "Op",
    "Pad", "Program", "Reshape", "Scale", "Slice", "Softmax", "Sub", "Table", "Tensor", "Transpose", "Upsample",
]  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A whole quantized subnet.

    Attributes:
        ops: In execution order; the first is the only :class:`Input`, the last makes the network's output.
        target: Name of the target whose arithmetic this is.
        add: The target's rule for sums: ``"both"`` inputs are quantized, or ``"one"``: a layer and the sum behind it are
            one operation, which reads the shortcut as its second input. Sums of other tensors are the same in both.
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
