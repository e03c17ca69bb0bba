"""What each operation computes, for :mod:`nasq.deploy.reference`: slow, plain NumPy that shares no code with anything.

Every function takes the operation's entry of ``subnet.json``, in which its own arrays stand already, the container
integers it reads, and the entries of the tensors it reads; it gives the container integers it makes. Integers are int64,
everything else is fp32 with one rounding per operation, unless a function says otherwise.

Shapes: N images, C channels, H height, W width, K taps of a kernel, O output channels, G groups, P output positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EXECUTE", "fma", "place", "run_layer"]

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Entry = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
f32 = np.float32


def place(steps: Floats, made: Entry) -> Bytes:
    """Rounded steps from the zero-point into the container; clipped first, so that nothing overflows on the way."""
    zero = made["zero_point"]
    within = np.clip(steps, f32(made["low"] - zero), f32(made["high"] - zero))
    return np.asarray(within.astype(np.int64) + zero, np.uint8)


def run_layer(op: Entry, layer: Arrays, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fp32(acc + bias) * M) + z_y)`` with ``M = fp32(fp32(s_x * weight_scale) / s_y)``.

    A second tensor is a shortcut: ``fp32((q_r - z_r) * fp32(s_r / s_y))`` is added before rounding. Where groups of inputs
    have multipliers ``m``, ``acc`` is ``sum(m * acc of the group) / 2^22``: of a whole number below 2^53, so exact.
    """
    q, source = given[0], sources[0]
    x = q.astype(np.int64) - source["zero_point"]
    acc: Any = _convolve(op, layer["weight"], x) if op["op"] == "conv" else _by_groups(layer, x)
    multiplier = f32(source["scale"]) * layer["scale"] / f32(op["output"]["scale"])
    channelwise = (-1, *[1] * (acc.ndim - 2)) if op["op"] == "conv" else (-1,)
    total = (acc + layer["bias"].reshape(channelwise)).astype(f32)
    steps = total * multiplier.reshape(channelwise)
    for q_r, beside in zip(given[1:], sources[1:], strict=True):
        centred = (q_r.astype(np.int64) - beside["zero_point"]).astype(f32)
        steps = steps + centred * (f32(beside["scale"]) / f32(op["output"]["scale"]))
    return place(np.rint(steps), op["output"])


def _by_groups(layer: Arrays, x: Ints) -> NDArray[Any]:
    """``x [..., I]`` times the weights ``[O, I]``: int64 ``[..., O]``; where groups have multipliers, float64."""
    if "multipliers" not in layer:
        return np.asarray(x @ layer["weight"].T)
    total, start = np.zeros((*x.shape[:-1], len(layer["weight"])), np.int64), 0
    for end, factor in zip(layer["ends"], layer["multipliers"].T, strict=True):
        total += (x[..., start:end] @ layer["weight"][:, start:end].T) * factor
        start = end
    return np.asarray(total / 2.0**22)


def _convolve(op: Entry, weight: Ints, x: Ints) -> Ints:
    """``x [N, C, H, W]`` (zero-point removed, so that padding is 0) with ``weight [O, C/G, kh, kw]``: ``[N, O, H, W]``.

    Every window becomes a row of one matrix (im2col); the channels stand last, so that copying stays contiguous.
    """
    groups, (out, narrow, *kernel) = op["groups"], weight.shape
    pads = [(0, 0), *((p, p) for p in op["padding"]), (0, 0)]
    x_NHWC = np.pad(x.transpose(0, 2, 3, 1), pads)
    taps = list(_taps(x_NHWC, kernel, op["stride"], op["dilation"], op["output"]["shape"][1:]))
    columns = np.stack(taps, axis=3)  # [N, H, W, K, C]
    n, height, width, count, channels = columns.shape
    rows = columns.reshape(-1, count, groups, channels // groups).transpose(2, 0, 1, 3)
    rows_GPK = rows.reshape(groups, -1, count * narrow)
    weight_GKO = weight.reshape(groups, out // groups, narrow, count).transpose(0, 3, 2, 1)
    acc_GPO = rows_GPK @ np.ascontiguousarray(weight_GKO).reshape(groups, count * narrow, out // groups)
    return np.asarray(acc_GPO.transpose(1, 0, 2).reshape(n, height, width, out).transpose(0, 3, 1, 2), np.int64)


def _taps(x_NHWC: Ints, kernel: list[int], stride: list[int], dilation: list[int], size: list[int]) -> Iterator[Ints]:
    """For every place in the kernel, what lies there in every window: ``[N, *size, C]``."""
    reach = [(steps - 1) * s + 1 for steps, s in zip(size, stride, strict=True)]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * dilation[0], j * dilation[1]
            yield x_NHWC[:, top : top + reach[0] : stride[0], left : left + reach[1] : stride[1]]


def _add(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fma(q_a, r_a, fma(q_b, r_b, f))))``, the kernel of onnxruntime's QLinearAdd; z_y is inside ``f``."""
    made = op["output"]
    (q_a, q_b), (a, b) = given, sources
    r_a, r_b = (f32(source["scale"]) / f32(made["scale"]) for source in sources)
    zeros = fma(np.float64(a["zero_point"]), r_a, r_b * f32(b["zero_point"]))
    fixed = f32(made["zero_point"]) - zeros
    total = fma(q_a.astype(np.float64), r_a, fma(q_b.astype(np.float64), r_b, fixed))
    return np.asarray(np.clip(np.rint(total), made["low"], made["high"]).astype(np.uint8))


def fma(q: Any, r: np.float32, c: Any) -> Any:
    """``q * r + c`` rounded once to fp32, where ``q`` is an integer of at most 8 bits (as float64), r and c are fp32.

    The product has at most 32 bits: exact in float64. Its sum with ``c`` may need more than float64's 53, so rounding
    it to float64 and then to fp32 would round twice. Knuth's TwoSum gives the exact error of the first rounding; where
    it is not zero, the sum is moved to the neighbour whose last bit is odd, between which and itself the exact value
    lies ("round to odd"). A value with an odd last bit is never a tie of a format that is at least two bits shorter,
    so the second rounding is the only one that counts (Boldo and Melquiond, Emulation of FMA, IEEE TC 2008, theorem 3).
    """
    product, c = np.asarray(q * np.float64(r)), np.asarray(c, np.float64)
    total = np.asarray(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    outwards = np.where(np.signbit(error) == np.signbit(total), 1, -1)  # +1 makes the magnitude one step larger
    odd = np.where((error != 0) & (bits & 1 == 0), bits + outwards, bits)
    return odd.view(np.float64).astype(f32)


def _avg_pool(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """``clip(rne(fp32(sum(q_x - z_x)) * M) + z_y)``.

    ``M`` is ``fp32(s_x / fp32(s_y * count))`` over the whole map, ``fp32(fp32(s_x * fp32(1 / count)) / s_y)`` in windows.
    Where padding does not count, ``clip(rne(fp32(fp32(fp32(sum) / fp32(count)) / fp32(s_y / s_x)) + z_y))``, ``count`` being
    that of each window, and z_y inside the rounding, as in onnxruntime's QLinearAveragePool.
    """
    x = given[0].astype(np.int64) - sources[0]["zero_point"]
    step, scale, count = f32(sources[0]["scale"]), f32(op["output"]["scale"]), f32(prod(op["kernel"]))
    total = _windows(op, x).astype(f32)
    if not op.get("counted", True):
        share = total / _windows(op, np.ones_like(x)).astype(f32)
        steps = np.rint(share / (scale / step) + f32(op["output"]["zero_point"]))
        return np.asarray(np.clip(steps, op["output"]["low"], op["output"]["high"]).astype(np.uint8))
    whole = list(op["kernel"]) == list(x.shape[2:]) and not any(op.get("padding", [0, 0]))
    ratio = step / (scale * count) if whole else (step * (f32(1) / count)) / scale
    return place(np.rint(total * ratio), op["output"])


def _windows(op: Entry, x: Ints) -> Ints:
    """The sum of every window of ``x [N, C, H, W]``."""
    pads = [(0, 0), (0, 0), *((p, p) for p in op.get("padding", [0, 0]))]
    total = np.zeros((len(x), *op["output"]["shape"]), np.int64)
    x_NHWC = np.pad(x, pads).transpose(0, 2, 3, 1)
    for tap in _taps(x_NHWC, op["kernel"], op["stride"], [1, 1], op["output"]["shape"][1:]):
        total += tap.transpose(0, 3, 1, 2)
    return total


def _max_pool(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    pads = [(0, 0), *((p, p) for p in op["padding"]), (0, 0)]
    x_NHWC = np.pad(given[0].astype(np.int64).transpose(0, 2, 3, 1), pads, constant_values=-1)  # -1 never wins
    taps = _taps(x_NHWC, op["kernel"], op["stride"], [1, 1], op["output"]["shape"][1:])
    largest = next(taps)
    for tap in taps:
        largest = np.maximum(largest, tap)
    return largest.transpose(0, 3, 1, 2).astype(np.uint8)


def _reshape(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    return given[0].reshape(len(given[0]), *op["output"]["shape"])


def _clip(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    return np.clip(given[0], op["output"]["low"], op["output"]["high"]).astype(np.uint8)


def _concat(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    """Joins channels; another grid is requantized: ``clip(rne(fp32(s_x * (q_x - z_x)) / s_y) + z_y)``."""
    made, parts = op["output"], []
    for q, source in zip(given, sources, strict=True):
        if (source["scale"], source["zero_point"]) == (made["scale"], made["zero_point"]):
            parts.append(np.clip(q, made["low"], made["high"]).astype(np.uint8))
        else:
            real = f32(source["scale"]) * (q.astype(np.int64) - source["zero_point"]).astype(f32)
            parts.append(place(np.rint(real / f32(made["scale"])), made))
    return np.concatenate(parts, axis=op.get("dim", 0) + 1)


def _slice(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    ends = [a + s * (n - 1) + 1 for a, s, n in zip(op["start"], op["step"], op["output"]["shape"], strict=True)]
    index = [slice(a, b, s) for a, b, s in zip(op["start"], ends, op["step"], strict=True)]
    return given[0][(slice(None), *index)]


def _pad(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    made = np.full((len(given[0]), *op["output"]["shape"]), sources[0]["zero_point"], np.uint8)
    index = [slice(a, a + n) for a, n in zip(op["before"], given[0].shape[1:], strict=True)]
    made[(slice(None), *index)] = given[0]
    return made


def _transpose(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    return given[0].transpose(0, *(place + 1 for place in op["order"]))


def _upsample(op: Entry, given: list[Bytes], sources: list[Entry]) -> Bytes:
    return given[0].repeat(op["factor"][0], axis=2).repeat(op["factor"][1], axis=3)


EXECUTE: dict[str, Callable[[Entry, list[Bytes], list[Entry]], Bytes]] = {
    "add": _add,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "reshape": _reshape,
    "clip": _clip,
    "concat": _concat,
    "slice": _slice,
    "pad": _pad,
    "transpose": _transpose,
    "upsample": _upsample,
}
