"""How far from a rounding tie the exact value of a layer's output lies: what decides whether a difference may be.

Where a runtime computes in fp32 with an order of operations of its own, two right answers differ only where the exact value
is nearly halfway between two integers. The exact value is computed here in float64, for single outputs of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nasq.quant.program import Conv, Linear, Tensor

__all__ = ["SPACINGS", "TIE", "Exact", "at_tie", "exact", "exact_input"]

TIE = 1e-5
"""A value is at a tie within this share of itself (or of one step, if it is smaller)."""

SPACINGS = 4
"""Or within so many fp32 spacings of the largest number that is added up to it. A runtime folds zero-points into a bias: a
shortcut of 13 steps per step makes numbers of 128 times 13 steps on the way, and neighbours there are 1.2e-4 apart. Up to 3.4
spacings were seen on OpenVINO."""

Integers = NDArray[np.uint8]


class Exact(NamedTuple):
    """Outputs of a layer before they are rounded.

    Attributes:
        steps: Their values in float64, in steps from the zero-point, ``[count]``.
        held: The largest number in steps that is added up to each: products, bias, shortcut, zero-points, ``[count]``.
    """

    steps: NDArray[np.float64]
    held: NDArray[np.float64]


def exact(op: Linear, sources: Sequence[Tensor], given: Sequence[Integers], places: NDArray[np.integer]) -> Exact:
    """What a layer makes before it is rounded, at some places of its output.

    Args:
        op: A convolution, perhaps with a shortcut, or a linear layer.
        sources: The tensors it reads.
        given: Their container integers, ``[N, ...]``.
        places: Indices of outputs, ``[count, dimensions of the output with the batch]``.
    """
    x = given[0].astype(np.int64) - sources[0].zero_point
    terms = [_terms(op, sources, x, given, tuple(map(int, place))) for place in places]
    zero_point = op.output.zero_point
    steps = np.array([math.fsum(own) for own in terms], np.float64)
    largest = [max(map(abs, (*own, zero_point))) for own in terms]
    return Exact(steps, np.maximum(largest, np.abs(steps + zero_point)))


def exact_input(output: Tensor, x: NDArray[np.float32], places: NDArray[np.integer]) -> Exact:
    """The same of a network's input ``x [N, ...]``, which is divided by its step."""
    steps = x[tuple(places.T)].astype(np.float64) / output.scale
    return Exact(steps, np.maximum(np.abs(steps), np.abs(steps + output.zero_point)))


def at_tie(found: Exact) -> NDArray[np.bool_]:
    """Whether values lie so near a tie that fp32 may round them either way."""
    distance = np.abs(found.steps - np.floor(found.steps) - 0.5)
    spacing = np.spacing(found.held.astype(np.float32)).astype(np.float64)
    return distance <= np.maximum(TIE * np.maximum(1.0, np.abs(found.steps)), SPACINGS * spacing)


def _terms(
    op: Linear, sources: Sequence[Tensor], x: NDArray[np.int64], given: Sequence[Integers], at: tuple[int, ...]
) -> list[float]:
    """The numbers that add up to one output: products, bias, shortcut, and what the shortcut's zero-point takes off."""
    channel = at[1] if isinstance(op, Conv) else at[-1]
    acc = _convolved(op, x[at[0]], at) if isinstance(op, Conv) else int(x[at[:-1]] @ op.summed[channel])
    step = sources[0].scale * float(op.weight_scale[channel]) / op.output.scale
    terms = [acc * step, int(op.bias[channel]) * step]
    for source, integers in zip(sources[1:], given[1:], strict=True):
        ratio = source.scale / op.output.scale
        terms += [int(integers[at]) * ratio, -source.zero_point * ratio]
    return terms


def _convolved(op: Conv, x: NDArray[np.int64], at: tuple[int, ...]) -> int:
    """The accumulator of one output; ``x [C, H, W]`` has no zero-point, so that padding is 0."""
    _, channel, row, column = at
    kernel = op.used[channel]
    narrow = kernel.shape[0]
    first = channel // (len(op.weight) // op.groups) * narrow
    total = 0
    for i in range(kernel.shape[1]):
        for j in range(kernel.shape[2]):
            top = row * op.stride[0] + i * op.dilation[0] - op.padding[0]
            left = column * op.stride[1] + j * op.dilation[1] - op.padding[1]
            if 0 <= top < x.shape[1] and 0 <= left < x.shape[2]:
                total += int(x[first : first + narrow, top, left] @ kernel[:, i, j])
    return total
