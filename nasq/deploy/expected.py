"""What the nodes of each operation should be in an ONNX file, for :mod:`nasq.deploy.readback`.

Written from the program alone; it shares no code with the exporter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import numpy as np

from nasq.deploy.pattern import Fixed, Made, Part, Read
from nasq.quant import program as p

__all__ = ["expected"]

_INT32, _FLOAT, _DOUBLE = 6, 1, 11  # codes of types in onnx.TensorProto

_Rule = TypeVar("_Rule", bound=Callable[..., Part])
_RULES: dict[type[p.Op], Callable[[Any, list[p.Tensor]], Part]] = {}


def expected(op: p.Op, program: p.Program) -> Part | None:
    """What makes the operation's tensor in a file, or ``None`` where it cannot be in one."""
    sources = [program.tensor(name) for name in op.inputs]
    if isinstance(op, p.Concat):
        return _concat(op, sources, {one.output.name for one in program.ops if isinstance(one, p.Constant)})
    rule = _RULES.get(type(op))
    return None if rule is None else rule(op, sources)


def _of(*kinds: type[p.Op]) -> Callable[[_Rule], _Rule]:
    def register(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule

    return register


def _real(part: Part, scale: float, zero_point: int, label: str) -> Made:
    grid = (
        Fixed(f"{label} scale", np.array(scale, np.float32)),
        Fixed(f"{label} zero-point", np.array(zero_point, np.uint8)),
    )
    return Made("DequantizeLinear", (part, *grid), label=f"an {label}")


def _inputs(op: p.Op, sources: list[p.Tensor]) -> tuple[Made, ...]:
    pairs = zip(op.inputs, sources, strict=True)
    return tuple(_real(Read(name), x.scale, x.zero_point, f"input {name!r}") for name, x in pairs)


def _quantized(real: Part, made: p.Tensor, scale: float | None = None) -> Made:
    """The tensor's grid and the clip of its range: there wherever the range is narrower than the container."""
    step = np.array(made.scale if scale is None else scale, np.float32)
    grid = (Fixed("output scale", step), Fixed("output zero-point", np.array(made.zero_point, np.uint8)))
    whole = Made("QuantizeLinear", (real, *grid), label="what makes its integers")
    return whole if (made.low, made.high) == (0, 255) else _clipped(whole, made)


def _clipped(whole: Part, made: p.Tensor) -> Made:
    bounds = (Fixed("clip low", np.array(made.low, np.uint8)), Fixed("clip high", np.array(made.high, np.uint8)))
    absent = (f"[{made.low}, {made.high}]", "missing")
    return Made("Clip", (whole, *bounds), label="clip", otherwise=absent, skipped=True)


def _whole_numbers(label: str, *values: int) -> Fixed:
    return Fixed(label, np.array(values, np.int64))


@_of(p.Input)
def _input(op: p.Input, sources: list[p.Tensor]) -> Part:
    return _quantized(Read("input"), op.output)


def _parameters(op: p.Linear, source: p.Tensor) -> tuple[Made, Made]:
    grid = np.float32(source.scale) * op.weight_scale
    zeros = np.zeros(len(op.bias), np.int8)
    weight = [Fixed("weight", op.used.astype(np.int8)), Fixed("weight scale", op.weight_scale)]
    if not isinstance(op, p.Conv):
        weight.append(Fixed("weight zero-point", zeros))
    bias = (Fixed("bias", op.bias), Fixed("bias scale", grid))
    missing = ("int8 and int32 with their scales", "a float, or missing")
    axis = {"axis": 0}
    return (
        Made("DequantizeLinear", tuple(weight), axis, label="weight", otherwise=missing),
        Made("DequantizeLinear", bias, axis, label="weight and bias", otherwise=missing),
    )


@_of(p.Conv)
def _conv(op: p.Conv, sources: list[p.Tensor]) -> Part:
    attributes = {
        "strides": op.stride, "pads": op.padding * 2, "dilations": op.dilation, "group": op.groups,
        "kernel_shape": op.weight.shape[2:],
    }  # fmt: skip
    given = _inputs(op, sources)
    made = Made("Conv", (given[0], *_parameters(op, sources[0])), attributes)
    return _quantized(Made("Add", (made, given[1])) if len(given) == 2 else made, op.output)


@_of(p.Linear)
def _linear(op: p.Linear, sources: list[p.Tensor]) -> Part:
    source, shape = sources[0], op.output.shape
    if op.multipliers is not None:
        return _linear_by_groups(op, source)
    read: Part = Read(op.inputs[0])
    if len(shape) > 1:
        read = Made("Reshape", (read, _whole_numbers("flat shape", -1, op.weight.shape[1])))
    real = _real(read, source.scale, source.zero_point, f"input {op.inputs[0]!r}")
    made = _quantized(Made("Gemm", (real, *_parameters(op, source)), {"transB": 1}), op.output)
    return made if len(shape) == 1 else Made("Reshape", (made, _whole_numbers("shape", -1, *shape)))


def _linear_by_groups(op: p.Linear, source: p.Tensor) -> Part:
    """Whole numbers in float64: what is centred, the weights with the multipliers of their groups, the bias."""
    assert op.multipliers is not None
    used = op.used.T
    stored = used.astype(np.int8 if np.abs(used.astype(np.int8) - used).max() == 0 else np.int16)
    owners = np.array([group for group, size in enumerate(op.sizes) for _ in range(size)], np.int64)
    factors = Made("Gather", (Fixed("multipliers", op.multipliers.T), Fixed("groups of inputs", owners)))
    whole = [Made("Cast", (part,), {"to": _DOUBLE}) for part in (Fixed("weight", stored), factors, Read(op.inputs[0]))]
    weight = Made("Mul", (Made("Mul", (whole[0], whole[1])), Fixed("unit of the multipliers", np.array(2.0**-22))))
    centred = Made("Sub", (whole[2], Fixed(f"input {op.inputs[0]!r} zero-point", np.array(float(source.zero_point)))))
    total = Made("Add", (Made("MatMul", (centred, weight)), Fixed("bias", op.bias.astype(np.float64))))
    ratio = np.float32(source.scale) * op.weight_scale / np.float32(op.output.scale)
    steps = Made("Mul", (Made("Cast", (total,), {"to": _FLOAT}), Fixed("multiplier", ratio)))
    return _quantized(steps, op.output, 1.0)


@_of(p.Add, p.Mul, p.Sub, p.MatMul)
def _pairwise(op: p.Op, sources: list[p.Tensor]) -> Part:
    operator = {p.Add: "Add", p.Mul: "Mul", p.Sub: "Sub", p.MatMul: "MatMul"}[type(op)]
    return _quantized(Made(operator, _inputs(op, sources)), op.output)


def _concat(op: p.Concat, sources: list[p.Tensor], constants: set[str]) -> Part:
    """What is the same for every image is repeated for all images of the first tensor that is not."""
    batch = next((name for name in op.inputs if name not in constants), op.inputs[0])
    count = Made("Slice", (Made("Shape", (Read(batch),)), _whole_numbers("starts", 0), _whole_numbers("ends", 1)))
    parts = []
    for name, x in zip(op.inputs, sources, strict=True):
        part: Part = Read(name)
        if name in constants:
            shape = Made("Concat", (count, _whole_numbers("shape", *x.shape)), {"axis": 0})
            part = Made("Expand", (part, shape))
        parts.append(_real(part, x.scale, x.zero_point, f"input {name!r}"))
    return _quantized(Made("Concat", tuple(parts), {"axis": op.dim + 1}), op.output)


@_of(p.AvgPool)
def _avg_pool(op: p.AvgPool, sources: list[p.Tensor]) -> Part:
    source, window = sources[0], {"strides": op.stride, "pads": op.padding * 2, "kernel_shape": op.kernel}
    if not op.counted:
        ratio = float(np.float32(op.output.scale) / np.float32(source.scale))
        real = _real(Read(op.inputs[0]), 1.0, source.zero_point, f"input {op.inputs[0]!r}")
        return _quantized(Made("AveragePool", (real,), window), op.output, ratio)
    if op.kernel == source.shape[1:] and op.padding == (0, 0):
        return _quantized(Made("GlobalAveragePool", _inputs(op, sources)), op.output)
    channels = source.shape[0]
    share = np.full(channels, np.float32(1) / np.float32(prod(op.kernel)), np.float32)
    ones = (Fixed("weight", np.ones((channels, 1, *op.kernel), np.int8)), Fixed("weight scale", share))
    weight = Made("DequantizeLinear", ones, {"axis": 0}, label="weight")
    return _quantized(Made("Conv", (*_inputs(op, sources), weight), {**window, "group": channels}), op.output)


@_of(p.MaxPool)
def _max_pool(op: p.MaxPool, sources: list[p.Tensor]) -> Part:
    window = {"strides": op.stride, "pads": op.padding * 2, "kernel_shape": op.kernel}
    return Made("MaxPool", (Read(op.inputs[0]),), window)


@_of(p.Reshape)
def _reshape(op: p.Reshape, sources: list[p.Tensor]) -> Part:
    if len(op.output.shape) == 1:
        return Made("Flatten", (Read(op.inputs[0]),))
    return Made("Reshape", (Read(op.inputs[0]), _whole_numbers("shape", 0, *op.output.shape)))


@_of(p.Slice)
def _slice(op: p.Slice, sources: list[p.Tensor]) -> Part:
    rows = []
    for dim, (size, count) in enumerate(zip(sources[0].shape, op.output.shape, strict=True)):
        start, step = op.start[dim], op.step[dim]
        if count < size:
            rows.append((start, start + (count - 1) * step + 1, dim + 1, step))
    names = ("starts", "ends", "dimensions", "steps")
    numbers = [_whole_numbers(name, *(row[i] for row in rows)) for i, name in enumerate(names)]
    return Made("Slice", (Read(op.inputs[0]), *numbers))


@_of(p.Pad)
def _pad(op: p.Pad, sources: list[p.Tensor]) -> Part:
    amounts = _whole_numbers("amounts", 0, *op.before, 0, *op.after)
    return Made("Pad", (Read(op.inputs[0]), amounts, Fixed("padding", np.array(op.output.zero_point, np.uint8))))


@_of(p.Transpose)
def _transpose(op: p.Transpose, sources: list[p.Tensor]) -> Part:
    return Made("Transpose", (Read(op.inputs[0]),), {"perm": (0, *(place + 1 for place in op.order))})


@_of(p.Upsample)
def _upsample(op: p.Upsample, sources: list[p.Tensor]) -> Part:
    modes = {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
    factors = Fixed("factors", np.array([1, 1, *op.factor], np.float32))
    return Made("Resize", (Read(op.inputs[0]), None, factors), modes)


@_of(p.Clip)
def _clip(op: p.Clip, sources: list[p.Tensor]) -> Part:
    return _clipped(Read(op.inputs[0]), op.output)


@_of(p.Scale)
def _scale(op: p.Scale, sources: list[p.Tensor]) -> Part:
    return Made("Identity", (Read(op.inputs[0]),))


@_of(p.Constant)
def _constant(op: p.Constant, sources: list[p.Tensor]) -> Part:
    return Made("Identity", (Fixed("values", op.values.reshape(1, *op.values.shape)),))


@_of(p.Table)
def _table(op: p.Table, sources: list[p.Tensor]) -> Part:
    index = Made("Cast", (Read(op.inputs[0]),), {"to": _INT32})
    return Made("Gather", (Fixed("table", op.values), index))


@_of(p.Softmax)
def _softmax(op: p.Softmax, sources: list[p.Tensor]) -> Part:
    whole: Part = Made("Cast", (Read(op.inputs[0]),), {"to": _INT32})
    rows, columns = (1, *op.output.shape)[-2:]
    seen = np.arange(rows)[:, None] >= np.arange(columns)
    if op.causal:
        whole = Made("Mul", (whole, Fixed("mask", seen.astype(np.int32))))
    largest = Made("ReduceMax", (whole,), {"axes": (-1,)})
    weights: Part = Made("Gather", (Fixed("table", op.table.astype(np.float32)), Made("Sub", (largest, whole))))
    if op.causal:
        weights = Made("Mul", (weights, Fixed("mask", seen.astype(np.float32))))
    total = Made("ReduceSum", (weights, _whole_numbers("dimensions", -1)))
    return _quantized(Made("Div", (weights, total)), op.output)


@_of(p.LayerNorm)
def _layer_norm(op: p.LayerNorm, sources: list[p.Tensor]) -> Part:
    source, dims = sources[0], _whole_numbers("dimensions", *(dim + 1 for dim in op.dims))
    count = prod(source.shape[dim] for dim in op.dims)
    floor = np.array(op.eps * (count * count) / (source.scale * source.scale), np.float64)
    number = Fixed("count", np.array(count, np.float64))
    q = Made("Cast", (Read(op.inputs[0]),), {"to": _DOUBLE})
    total = Made("ReduceSum", (q, dims))
    squares = Made("ReduceSum", (Made("Mul", (q, q)), dims))
    spread = Made("Sub", (Made("Mul", (squares, number)), Made("Mul", (total, total))))
    root = Made("Sqrt", (Made("Add", (spread, Fixed("eps", floor))),))
    normal = Made("Div", (Made("Sub", (Made("Mul", (q, number)), total)), root))
    along = [-1 if dim == op.channel + 1 else 1 for dim in range(len(source.shape) + 1)]
    scaled = Made("Mul", (Made("Cast", (normal,), {"to": _FLOAT}), Fixed("gain", op.gain.reshape(along))))
    return _quantized(Made("Add", (scaled, Fixed("shift", op.shift.reshape(along)))), op.output)
