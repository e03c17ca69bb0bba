"""A slow NumPy executor of programs, written from `docs/integer_arithmetic.md` alone: int64, fp32, exact fractions.

Shares no code with nasq. Loops instead of tricks; meant for tensors of a few thousand elements.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.quant import program as p

Ints = NDArray[np.int64]
f32 = np.float32


def convolve(x: Ints, w: Ints, stride: Any, padding: Any, dilation: Any, groups: int) -> Ints:
    """``x [N, C, H, W]``, ``w [O, C / groups, kh, kw]`` in int64, one tap of the kernel after the other."""
    n, channels, height, width = x.shape
    out, per_group, kh, kw = w.shape
    assert per_group * groups == channels and out % groups == 0
    padded = np.zeros((n, channels, height + 2 * padding[0], width + 2 * padding[1]), np.int64)
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = x
    rows = (padded.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    columns = (padded.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    result = np.zeros((n, out, rows, columns), np.int64)
    for group in range(groups):
        first, of_group = group * per_group, slice(group * out // groups, (group + 1) * out // groups)
        for i in range(kh):
            for j in range(kw):
                top, left = i * dilation[0], j * dilation[1]
                seen = padded[:, first : first + per_group, top : top + (rows - 1) * stride[0] + 1 : stride[0],
                              left : left + (columns - 1) * stride[1] + 1 : stride[1]]  # fmt: skip
                result[:, of_group] += np.einsum("nchw,oc->nohw", seen, w[of_group, :, i, j])
    return result


def requantise(acc: Ints, bias: Ints, step_in: float, scale: NDArray[np.float32], made: Any) -> Ints:
    """``clip(rne(fp32(acc + bias) * M) + z)``; ``made`` has ``scale, zero_point, low, high``."""
    shape = (1, -1, *[1] * (acc.ndim - 2))
    multiplier = (f32(step_in) * scale.astype(f32)).astype(f32) / f32(made.scale)
    total = (acc + bias.reshape(shape)).astype(f32) * multiplier.astype(f32).reshape(shape)
    return np.clip(np.rint(total.astype(np.float64)) + made.zero_point, made.low, made.high).astype(np.int64)


def to_fp32(value: Fraction) -> np.float32:
    """The nearest fp32 number, ties to even, by exact comparison with the neighbours."""
    guess = f32(float(value))
    candidates = [np.nextafter(guess, f32(-np.inf)), guess, np.nextafter(guess, f32(np.inf))]
    distances = [abs(Fraction(float(c)) - value) for c in candidates]
    nearest = min(distances)
    found = [c for c, d in zip(candidates, distances, strict=True) if d == nearest]
    return next((c for c in found if not int(c.view(np.int32)) & 1), found[0])


def fma(a: Any, b: Any, c: Any) -> np.float32:
    return to_fp32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def add(a: Ints, b: Ints, one: Any, other: Any, made: Any) -> Ints:
    """QLinearAdd on every pair of integers that occurs, with exact fractions."""
    ratio_a, ratio_b = f32(one.scale) / f32(made.scale), f32(other.scale) / f32(made.scale)
    fixed = f32(f32(made.zero_point) - fma(ratio_a, one.zero_point, f32(ratio_b * f32(other.zero_point))))
    pairs, place = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1, return_inverse=True)
    sums = [np.rint(fma(int(x), ratio_a, fma(int(y), ratio_b, fixed))) for x, y in pairs.T]
    return np.clip(np.array(sums, np.float64), made.low, made.high).astype(np.int64)[place.ravel()].reshape(a.shape)


def windows(x: Ints, kernel: Any, stride: Any, padding: Any = (0, 0), fill: int = 0) -> Ints:
    """``[N, C, H', W', taps]``."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2), constant_values=fill)
    rows = (padded.shape[2] - kernel[0]) // stride[0] + 1
    columns = (padded.shape[3] - kernel[1]) // stride[1] + 1
    found = [
        padded[:, :, i : i + (rows - 1) * stride[0] + 1 : stride[0], j : j + (columns - 1) * stride[1] + 1 : stride[1]]
        for i in range(kernel[0]) for j in range(kernel[1])
    ]  # fmt: skip
    return np.stack(found, axis=-1)


def average(x: Ints, source: Any, made: Any, kernel: Any, stride: Any) -> Ints:
    total = windows(x - source.zero_point, kernel, stride).sum(-1).astype(f32)
    count = kernel[0] * kernel[1]
    if (
        tuple(kernel) == x.shape[2:]
    ):  # the whole map has a kernel of its own; windows are a depthwise convolution of ones
        ratio = f32(source.scale) / f32(f32(made.scale) * f32(count))
    else:
        ratio = f32(f32(source.scale) * f32(1 / count)) / f32(made.scale)
    return np.clip(np.rint(total * ratio).astype(np.int64) + made.zero_point, made.low, made.high)


def onto(x: Ints, source: Any, made: Any) -> Ints:
    """One input of a concatenation on the grid of the result."""
    if (source.scale, source.zero_point) == (made.scale, made.zero_point):
        return np.clip(x, made.low, made.high)
    real = f32(source.scale) * (x - source.zero_point).astype(f32)
    return np.clip(np.rint(real / f32(made.scale)).astype(np.int64) + made.zero_point, made.low, made.high)


def run(program: p.Program, x: NDArray[np.float32]) -> dict[str, Ints]:
    """Every tensor of the program by name."""
    made: dict[str, Ints] = {}
    specs = {op.output.name: op.output for op in program.ops}
    for op in program.ops:
        made[op.output.name] = _apply(op, [made[name] for name in op.inputs], [specs[name] for name in op.inputs], x)
    return made


def _apply(op: p.Op, values: list[Ints], specs: list[p.Tensor], x: NDArray[np.float32]) -> Ints:
    out = op.output
    if isinstance(op, p.Input):
        steps = np.rint(x / f32(out.scale)).astype(np.int64)
        return np.clip(steps + out.zero_point, out.low, out.high)
    if isinstance(op, p.Linear):
        column = (-1, *[1] * (op.weight.ndim - 1))
        weight = op.weight.astype(np.int64) * 2 ** op.shift.astype(np.int64).reshape(column)
        if op.weight_zero is not None:
            weight -= (op.weight_zero.astype(np.int64) * 2 ** op.shift.astype(np.int64)).reshape(column)
        centred = values[0] - specs[0].zero_point
        if isinstance(op, p.Conv):
            acc = convolve(centred, weight, op.stride, op.padding, op.dilation, op.groups)
        else:
            acc = centred @ weight.T
        return requantise(acc, op.bias.astype(np.int64), specs[0].scale, op.weight_scale, out)
    if isinstance(op, p.Add):
        return add(values[0], values[1], specs[0], specs[1], out)
    if isinstance(op, p.AvgPool):
        return average(values[0], specs[0], out, op.kernel, op.stride)
    if isinstance(op, p.MaxPool):
        return windows(values[0], op.kernel, op.stride, op.padding, fill=-1000).max(-1)
    if isinstance(op, p.Reshape):
        return values[0].reshape(len(values[0]), *out.shape)
    if isinstance(op, p.Clip):
        return np.clip(values[0], out.low, out.high)
    assert isinstance(op, p.Concat)
    return np.concatenate([onto(value, spec, out) for value, spec in zip(values, specs, strict=True)], axis=1)
