"""What makes a :class:`~nasq.quant.program.Program` valid: names, shapes, ranges, scales and accumulators.

Every output shape is recomputed from the inputs, every range is compared with its container, and every accumulator's
largest magnitude is bounded, so that whatever passes runs in int32 without overflow and in fp32 without inf or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod

import numpy as np

from nasq.deploy.layers import check_layer
from nasq.deploy.shapes import MAX_ELEMENTS, output_shape
from nasq.errors import ArtifactError
from nasq.quant import program as p
from nasq.quant.operations import STAYS
from nasq.quant.program import Op, Program, Tensor

__all__ = ["check_program", "output_shape"]

MAX_NAME = 256
MAX_SUM = 1 << 24  # what fp32 adds without rounding


def check_program(program: Program) -> None:
    """Checks everything that :mod:`nasq.quant.program` promises about a program.

    Raises:
        ArtifactError: Something does not hold; the message names the operation, the value and what is allowed.
    """
    if program.add not in ("both", "one"):
        raise ArtifactError(f"unknown rule for sums {program.add!r}. Allowed: 'both', 'one'.")
    if not program.ops or not isinstance(program.ops[0], p.Input):
        raise ArtifactError("the first operation has to be the input; the program has none.")
    made: dict[str, Tensor] = {}
    for index, op in enumerate(program.ops):
        _named(index, op, made)
        try:
            _check_op(op, made, program.add)
        except ArtifactError as error:
            raise ArtifactError(f"{_kind(op)} {op.output.name!r}: {error}") from error
        made[op.output.name] = op.output


def _kind(op: Op) -> str:
    return type(op).__name__.lower()


def _named(index: int, op: Op, made: Mapping[str, Tensor]) -> None:
    name = op.output.name
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ArtifactError(
            f"operation {index} makes a tensor called {name[:40]!r}. Allowed: 1 to 256 printable signs."
        )
    if name in made:
        raise ArtifactError(f"two operations make a tensor called {name!r}; names have to be unique.")
    for source in op.inputs:
        if source not in made:
            raise ArtifactError(f"{_kind(op)} {name!r} reads {source!r}, which no operation before it makes.")


def _check_op(op: Op, made: Mapping[str, Tensor], add: str) -> None:
    inputs = [made[name] for name in op.inputs]
    _check_tensor(op.output)
    _check_count(op, len(inputs), not made, add)
    if isinstance(op, p.Linear):
        check_layer(op, inputs[0])
    shape = output_shape(op, [tensor.shape for tensor in inputs])
    if isinstance(op, p.Conv) and len(inputs) == 2:
        if inputs[1].shape != shape:
            raise ArtifactError(f"it makes shape {shape}, and the shortcut it adds has shape {inputs[1].shape}.")
        _check_ratios(op, inputs[1:])
    if shape != op.output.shape:
        raise ArtifactError(f"it makes shape {shape} and says that it makes {op.output.shape}.")
    if isinstance(op, STAYS):
        _check_same_grid(op, inputs[0])
    if isinstance(op, p.Add | p.AvgPool | p.Concat | p.Sub):
        _check_ratios(op, inputs)
    if isinstance(op, p.Mul | p.MatMul):
        _check_product(op, inputs)
    if isinstance(op, p.Scale):
        _check_scaled(op, inputs[0])
    if isinstance(op, p.Table | p.Constant):
        _check_values(op)
    if isinstance(op, p.Softmax):
        _check_softmax(op)
    if isinstance(op, p.LayerNorm):
        _check_layer_norm(op, inputs[0])


_PLAIN = {p.Input: (0, 0), p.Constant: (0, 0), p.Concat: (1, 1 << 16)} | dict.fromkeys(
    (p.Add, p.Sub, p.Mul, p.MatMul), (2, 2)
)


def _check_count(op: Op, count: int, first: bool, add: str) -> None:
    least, most = _PLAIN.get(type(op), (1, 1))
    if isinstance(op, p.Conv) and add == "one":
        most = 2
    if not least <= count <= most:
        allowed = f"{least}" if most == least else f"{least} or {'2' if most == 2 else 'more'}"
        raise ArtifactError(f"it reads {count} tensors; allowed: {allowed}.")
    if isinstance(op, p.Input) and not first:
        raise ArtifactError("a program has one input only, and it comes first.")


def _check_tensor(tensor: Tensor) -> None:
    if not tensor.shape or min(tensor.shape) < 1 or prod(tensor.shape) > MAX_ELEMENTS:
        raise ArtifactError(
            f"the shape {tensor.shape} is not allowed: every size is at least 1, the product at most 2^28."
        )
    if not isfinite(tensor.scale) or tensor.scale <= 0:
        raise ArtifactError(f"the scale {tensor.scale} is not allowed: it has to be finite and above 0.")
    with np.errstate(over="ignore"):
        rounded = float(np.float32(tensor.scale))
    if rounded != tensor.scale:
        raise ArtifactError(f"fp32 does not hold the scale {tensor.scale!r}; round it to fp32 first.")
    _check_range(tensor)


def _check_range(tensor: Tensor) -> None:
    bits, low, high, zero = tensor.bits, tensor.low, tensor.high, tensor.zero_point
    if not 1 <= bits <= 8:
        raise ArtifactError(f"{bits} bits are not allowed: 1 to 8.")
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    plain = 0 <= low <= high <= top and 0 <= zero <= top
    signed = 128 - half <= low <= high <= 127 + half and zero == 128
    if not (plain or signed):
        raise ArtifactError(
            f"the range [{low}, {high}] with zero-point {zero} does not fit {bits} bits. Allowed: within [0, {top}], "
            f"or within [{128 - half}, {127 + half}] with zero-point 128."
        )


def _check_same_grid(op: Op, source: Tensor) -> None:
    output = op.output
    if (output.scale, output.zero_point) != (source.scale, source.zero_point):
        raise ArtifactError(
            f"it keeps its input's scale and zero-point ({source.scale!r}, {source.zero_point}), "
            f"but says ({output.scale!r}, {output.zero_point})."
        )
    if not isinstance(op, p.Clip) and not (output.low <= source.low and source.high <= output.high):
        raise ArtifactError(
            f"its input's range [{source.low}, {source.high}] is wider than its own [{output.low}, {output.high}], "
            "and nothing clips here; add a clip."
        )


def _check_ratios(op: Op, inputs: list[Tensor]) -> None:
    """A quotient of two scales times the largest integers has to stay finite in fp32."""
    steps = prod(op.kernel) if isinstance(op, p.AvgPool) else 1
    largest = float(np.finfo(np.float32).max) / 2
    for source in inputs:
        reach = 512.0 * steps * source.scale
        if max(reach, reach / op.output.scale, op.output.scale * steps) > largest:
            raise ArtifactError(f"the scales {source.scale!r} and {op.output.scale!r} are too far apart for fp32.")


def _check_product(op: Op, inputs: list[Tensor]) -> None:
    terms = inputs[0].shape[-1] if isinstance(op, p.MatMul) else 1
    reach = prod(max(x.high - x.zero_point, x.zero_point - x.low) for x in inputs) * terms
    if reach >= 1 << 31:
        raise ArtifactError(f"its sums may reach {reach}, beyond int32. Fewer bits or fewer terms are needed.")
    multiplier = inputs[0].scale * inputs[1].scale / op.output.scale
    if not 2.0**-126 < inputs[0].scale * inputs[1].scale < 2.0**127 or not multiplier * reach < 2.0**127:
        raise ArtifactError(
            f"the scales {inputs[0].scale!r}, {inputs[1].scale!r} and {op.output.scale!r} overflow fp32."
        )


def _check_scaled(op: Op, source: Tensor) -> None:
    kept = ("zero_point", "low", "high", "bits")
    if any(getattr(op.output, name) != getattr(source, name) for name in kept):
        raise ArtifactError("it keeps everything of its input but the scale, and says something else.")


def _check_values(op: p.Table | p.Constant) -> None:
    shape = (256,) if isinstance(op, p.Table) else op.output.shape
    if op.values.dtype != np.uint8 or op.values.shape != shape:
        raise ArtifactError(
            f"its values are {op.values.dtype} of shape {op.values.shape}; allowed: uint8 of shape {shape}."
        )
    if op.values.min() < op.output.low or op.values.max() > op.output.high:
        raise ArtifactError(
            f"its values reach from {op.values.min()} to {op.values.max()}, and its range is "
            f"[{op.output.low}, {op.output.high}]."
        )


def _check_softmax(op: p.Softmax) -> None:
    table, count = op.table, op.output.shape[-1]
    if table.dtype != np.int32 or table.shape != (256,):
        raise ArtifactError(f"its table is {table.dtype} of shape {table.shape}; allowed: int32 of shape (256,).")
    if table.min() < 0 or bool((np.diff(table) > 0).any()) or not 0 < int(table[0]) * count <= MAX_SUM:
        raise ArtifactError(
            f"its table has to fall from above 0, and {count} times its first entry {table[0]} must be at most 2^24."
        )


def _check_layer_norm(op: p.LayerNorm, source: Tensor) -> None:
    size = source.shape[op.channel]
    for name in ("gain", "shift"):
        array = getattr(op, name)
        if array.dtype != np.float32 or array.shape != (size,) or not np.isfinite(array).all():
            raise ArtifactError(
                f"its {name} is {array.dtype} of shape {array.shape}; allowed: finite fp32 of shape ({size},)."
            )
    count = prod(source.shape[dim] for dim in op.dims)
    reach = float(np.abs(op.gain).max()) * count**0.5 + float(np.abs(op.shift).max())
    if not 0 < op.eps < 1e9 or reach / op.output.scale > 2.0**126:
        raise ArtifactError(f"eps {op.eps!r} has to be above 0, and its values must stay finite in fp32.")
