"""What makes a :class:`~nasq.quant.program.Program` valid: names, shapes, ranges, scales and accumulators.

Every output shape is recomputed from the inputs, every range is compared with its container, and every accumulator's
largest magnitude is bounded, so that whatever passes runs in int32 without overflow and in fp32 without inf or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod

import numpy as np

from nasq.deploy.layers import check_layer
from nasq.errors import ArtifactError
from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, MaxPool, Op, Program, Reshape, Tensor

__all__ = ["check_program", "output_shape"]

MAX_ELEMENTS = 1 << 28  # of one tensor of one image; keeps a hostile shape from asking for all memory
MAX_NAME = 256
Shape = tuple[int, ...]


def check_program(program: Program) -> None:
    """Checks everything that :mod:`nasq.quant.program` promises about a program.

    Raises:
        ArtifactError: Something does not hold; the message names the operation, the value and what is allowed.
    """
    if program.add not in ("both", "one"):
        raise ArtifactError(f"unknown rule for sums {program.add!r}. Allowed: 'both', 'one'.")
    if not program.ops or not isinstance(program.ops[0], Input):
        raise ArtifactError("the first operation has to be the input; the program has none.")
    made: dict[str, Tensor] = {}
    for index, op in enumerate(program.ops):
        _named(index, op, made)
        try:
            _check_op(op, made)
        except ArtifactError as error:
            raise ArtifactError(f"{_kind(op)} {op.output.name!r}: {error}") from error
        made[op.output.name] = op.output


def output_shape(op: Op, shapes: list[Shape]) -> Shape:
    """The shape of an operation's output, without the batch dimension.

    Args:
        op: The operation; only its parameters are read (an input and a reshape say themselves what they make).
        shapes: Of its inputs, in order.

    Raises:
        ArtifactError: The operation cannot take inputs of these shapes.
    """
    if isinstance(op, Input):
        return op.output.shape
    if isinstance(op, Reshape):
        if prod(op.output.shape) != prod(shapes[0]):
            raise ArtifactError(f"{shapes[0]} cannot be reshaped to {op.output.shape}: another number of elements.")
        return op.output.shape
    if isinstance(op, Conv | AvgPool | MaxPool):
        return _window_shape(op, shapes[0])
    if isinstance(op, Linear):
        if shapes[0] != op.weight.shape[1:]:
            raise ArtifactError(f"weights of shape {op.weight.shape} cannot take an input of shape {shapes[0]}.")
        return op.weight.shape[:1]
    if isinstance(op, Concat):
        return _joined_shape(shapes)
    if any(shape != shapes[0] for shape in shapes):
        raise ArtifactError(f"its inputs have different shapes: {', '.join(map(str, shapes))}.")
    return shapes[0]


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


def _check_op(op: Op, made: Mapping[str, Tensor]) -> None:
    inputs = [made[name] for name in op.inputs]
    _check_tensor(op.output)
    _check_count(op, len(inputs), first=not made)
    if isinstance(op, Linear):
        check_layer(op, inputs[0])
    shape = output_shape(op, [tensor.shape for tensor in inputs])
    if shape != op.output.shape:
        raise ArtifactError(f"it makes shape {shape} and says that it makes {op.output.shape}.")
    if isinstance(op, MaxPool | Reshape | Clip):
        _check_same_grid(op, inputs[0])
    if isinstance(op, Add | AvgPool | Concat):
        _check_ratios(op, inputs)


def _check_count(op: Op, count: int, first: bool) -> None:
    least, most = {Input: (0, 0), Add: (2, 2), Concat: (1, 1 << 16)}.get(type(op), (1, 1))
    if not least <= count <= most:
        raise ArtifactError(f"it reads {count} tensors; allowed: {least}{' or more' if most > least else ''}.")
    if isinstance(op, Input) and not first:
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
    if not isinstance(op, Clip) and not (output.low <= source.low and source.high <= output.high):
        raise ArtifactError(
            f"its input's range [{source.low}, {source.high}] is wider than its own [{output.low}, {output.high}], "
            "and nothing clips here; add a clip."
        )


def _check_ratios(op: Op, inputs: list[Tensor]) -> None:
    """A quotient of two scales times the largest integers has to stay finite in fp32."""
    steps = prod(op.kernel) if isinstance(op, AvgPool) else 1
    largest = float(np.finfo(np.float32).max) / 2
    for source in inputs:
        reach = 512.0 * steps * source.scale
        if max(reach, reach / op.output.scale, op.output.scale * steps) > largest:
            raise ArtifactError(f"the scales {source.scale!r} and {op.output.scale!r} are too far apart for fp32.")


def _window_shape(op: Conv | AvgPool | MaxPool, shape: Shape) -> Shape:
    if len(shape) != 3:
        raise ArtifactError(f"it needs an input of shape (channels, height, width), not {shape}.")
    kernel = op.weight.shape[2:] if isinstance(op, Conv) else op.kernel
    padding = (0, 0) if isinstance(op, AvgPool) else op.padding
    dilation = op.dilation if isinstance(op, Conv) else (1, 1)
    if min(*kernel, *op.stride, *dilation) < 1 or min(padding) < 0:
        raise ArtifactError(
            f"kernel {kernel}, stride {op.stride}, dilation {dilation} and padding {padding} are not allowed: "
            "at least 1, padding at least 0."
        )
    if isinstance(op, MaxPool) and any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ArtifactError(f"its padding {padding} is more than half of its kernel {kernel}.")
    sides = _sides(shape, kernel, op.stride, padding, dilation)
    if isinstance(op, Conv) and shape[0] != op.weight.shape[1] * op.groups:
        raise ArtifactError(f"{op.groups} groups of weights {op.weight.shape} cannot take {shape[0]} channels.")
    return (op.weight.shape[0] if isinstance(op, Conv) else shape[0], *sides)


def _sides(shape: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
    """Height and width behind a sliding window; the last, incomplete step is dropped."""
    padded = [size + 2 * p for size, p in zip(shape[1:], padding, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ArtifactError(f"a window of {tuple(reach)} does not fit a map of {tuple(padded)} (padding included).")
    if shape[0] * prod(padded) > MAX_ELEMENTS:
        raise ArtifactError(
            f"the padded map ({shape[0]}, {padded[0]}, {padded[1]}) is too large: at most 2^28 elements."
        )
    return tuple((size - r) // s + 1 for size, r, s in zip(padded, reach, stride, strict=True))


def _joined_shape(shapes: list[Shape]) -> Shape:
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ArtifactError(f"only the channels of joined tensors may differ: {', '.join(map(str, shapes))}.")
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
