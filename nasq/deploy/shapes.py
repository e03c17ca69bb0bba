"""The shape that each operation makes, recomputed from its inputs: one rule per kind of operation."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import numpy as np

from nasq.errors import ArtifactError
from nasq.quant import program as p

__all__ = ["MAX_ELEMENTS", "Shape", "output_shape"]

MAX_ELEMENTS = 1 << 28  # of one tensor of one image; keeps a hostile shape from asking for all memory
Shape = tuple[int, ...]

_Rule = TypeVar("_Rule", bound=Callable[..., Shape])
_RULES: dict[type[p.Op], Callable[[Any, list[Shape]], Shape]] = {}


def output_shape(op: p.Op, shapes: list[Shape]) -> Shape:
    """The shape of an operation's output, without the batch dimension.

    Args:
        op: The operation; only its parameters are read (an input, a constant and a reshape say themselves what they make).
        shapes: Of its inputs, in order.

    Raises:
        ArtifactError: The operation cannot take inputs of these shapes.
    """
    return _RULES[type(op)](op, shapes)


def _of(*kinds: type[p.Op]) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


@_of(p.Input)
def _said(op: p.Op, shapes: list[Shape]) -> Shape:
    return op.output.shape


@_of(p.Clip, p.Scale, p.Table, p.Sub)
def _same(op: p.Op, shapes: list[Shape]) -> Shape:
    if any(shape != shapes[0] for shape in shapes):
        raise ArtifactError(f"its inputs have different shapes: {', '.join(map(str, shapes))}.")
    return shapes[0]


@_of(p.Constant)
def _constant(op: p.Constant, shapes: list[Shape]) -> Shape:
    if op.values.dtype != np.uint8 or op.values.shape != op.output.shape:
        raise ArtifactError(
            f"its values are {op.values.dtype} of shape {op.values.shape}; allowed: uint8 of shape {op.output.shape}."
        )
    return op.values.shape


@_of(p.Reshape)
def _reshape(op: p.Reshape, shapes: list[Shape]) -> Shape:
    if prod(op.output.shape) != prod(shapes[0]):
        raise ArtifactError(f"{shapes[0]} cannot be reshaped to {op.output.shape}: another number of elements.")
    return op.output.shape


@_of(p.Linear)
def _linear(op: p.Linear, shapes: list[Shape]) -> Shape:
    if shapes[0][-1:] != op.weight.shape[1:]:
        raise ArtifactError(f"weights of shape {op.weight.shape} cannot take an input of shape {shapes[0]}.")
    return (*shapes[0][:-1], op.weight.shape[0])


@_of(p.Slice)
def _slice(op: p.Slice, shapes: list[Shape]) -> Shape:
    """The output says how many elements are taken; they have to be there."""
    shape, made = shapes[0], op.output.shape
    if not len(op.start) == len(op.step) == len(made) == len(shape) or min(op.step) < 1 or min(op.start) < 0:
        raise ArtifactError(f"starts {op.start} and steps {op.step} do not fit an input of shape {shape}.")
    for size, start, step, count in zip(shape, op.start, op.step, made, strict=True):
        if count < 1 or start + step * (count - 1) >= size:
            raise ArtifactError(
                f"{count} elements from {start} on in steps of {step} are not in a dimension of {size}."
            )
    return made


@_of(p.Pad)
def _pad(op: p.Pad, shapes: list[Shape]) -> Shape:
    if not len(op.before) == len(op.after) == len(shapes[0]) or min(*op.before, *op.after) < 0:
        raise ArtifactError(f"the padding {op.before}, {op.after} does not fit an input of shape {shapes[0]}.")
    if not op.output.low <= op.output.zero_point <= op.output.high:
        raise ArtifactError(
            f"it pads with the zero-point {op.output.zero_point}, which is outside its range "
            f"[{op.output.low}, {op.output.high}]."
        )
    return tuple(before + size + after for before, size, after in zip(op.before, shapes[0], op.after, strict=True))


@_of(p.Transpose)
def _transpose(op: p.Transpose, shapes: list[Shape]) -> Shape:
    if sorted(op.order) != list(range(len(shapes[0]))):
        raise ArtifactError(f"the order {op.order} does not fit an input of shape {shapes[0]}.")
    return tuple(shapes[0][place] for place in op.order)


@_of(p.Upsample)
def _upsample(op: p.Upsample, shapes: list[Shape]) -> Shape:
    if len(shapes[0]) != 3 or min(op.factor) < 1:
        raise ArtifactError(f"factors {op.factor} do not fit an input of shape {shapes[0]}: a map, at least 1 each.")
    return (shapes[0][0], shapes[0][1] * op.factor[0], shapes[0][2] * op.factor[1])


@_of(p.Concat)
def _concat(op: p.Concat, shapes: list[Shape]) -> Shape:
    first, dim = shapes[0], op.dim
    if not 0 <= dim < len(first):
        raise ArtifactError(f"tensors of shape {first} cannot be joined on dimension {dim}.")
    if any(shape[:dim] + shape[dim + 1 :] != first[:dim] + first[dim + 1 :] for shape in shapes):
        what = "the channels" if dim == 0 else f"dimension {dim}"
        raise ArtifactError(f"only {what} of joined tensors may differ: {', '.join(map(str, shapes))}.")
    return (*first[:dim], sum(shape[dim] for shape in shapes), *first[dim + 1 :])


@_of(p.Add, p.Mul)
def _repeated(op: p.Op, shapes: list[Shape]) -> Shape:
    one, other = shapes
    if len(one) != len(other) or any(a != b and 1 not in (a, b) for a, b in zip(one, other, strict=True)):
        raise ArtifactError(f"its inputs have different shapes: {one}, {other}.")
    return tuple(max(pair) for pair in zip(one, other, strict=True))


@_of(p.MatMul)
def _matmul(op: p.MatMul, shapes: list[Shape]) -> Shape:
    one, other = shapes
    if len(one) != len(other) or len(one) < 2 or one[:-2] != other[:-2] or one[-1] != other[-2]:
        raise ArtifactError(f"{one} cannot be multiplied with {other}.")
    return (*one[:-1], other[-1])


@_of(p.Softmax)
def _softmax(op: p.Softmax, shapes: list[Shape]) -> Shape:
    if op.causal and (len(shapes[0]) < 2 or shapes[0][-1] != shapes[0][-2]):
        raise ArtifactError(f"a causal softmax needs a square, not {shapes[0]}.")
    return shapes[0]


@_of(p.LayerNorm)
def _layer_norm(op: p.LayerNorm, shapes: list[Shape]) -> Shape:
    shape = shapes[0]
    if not op.dims or sorted(set(op.dims)) != list(op.dims) or op.dims[-1] >= len(shape) or op.channel >= len(shape):
        raise ArtifactError(f"dimensions {op.dims} and channel {op.channel} do not fit an input of shape {shape}.")
    return shape


@_of(p.Conv, p.AvgPool, p.MaxPool)
def _window(op: p.Conv | p.AvgPool | p.MaxPool, shapes: list[Shape]) -> Shape:
    shape = shapes[0]
    if len(shape) != 3:
        raise ArtifactError(f"it needs an input of shape (channels, height, width), not {shape}.")
    kernel = op.weight.shape[2:] if isinstance(op, p.Conv) else op.kernel
    dilation = op.dilation if isinstance(op, p.Conv) else (1, 1)
    if min(*kernel, *op.stride, *dilation) < 1 or min(op.padding) < 0:
        raise ArtifactError(
            f"kernel {kernel}, stride {op.stride}, dilation {dilation} and padding {op.padding} are not allowed: "
            "at least 1, padding at least 0."
        )
    if not isinstance(op, p.Conv) and any(2 * pad > size for pad, size in zip(op.padding, kernel, strict=True)):
        raise ArtifactError(f"its padding {op.padding} is more than half of its kernel {kernel}.")
    sides = _sides(shape, kernel, op.stride, op.padding, dilation)
    if not isinstance(op, p.Conv):
        return (shape[0], *sides)
    if shape[0] != op.weight.shape[1] * op.groups:
        raise ArtifactError(f"{op.groups} groups of weights {op.weight.shape} cannot take {shape[0]} channels.")
    return (op.weight.shape[0], *sides)


def _sides(shape: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
    """Height and width behind a sliding window; the last, incomplete step is dropped."""
    padded = [size + 2 * pad for size, pad in zip(shape[1:], padding, strict=True)]
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ArtifactError(f"a window of {tuple(reach)} does not fit a map of {tuple(padded)} (padding included).")
    if shape[0] * prod(padded) > MAX_ELEMENTS:
        raise ArtifactError(
            f"the padded map ({shape[0]}, {padded[0]}, {padded[1]}) is too large: at most 2^28 elements."
        )
    return tuple((size - r) // s + 1 for size, r, s in zip(padded, reach, stride, strict=True))
