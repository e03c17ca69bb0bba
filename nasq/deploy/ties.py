"""How far from a rounding tie the exact value of a layer's output lies: what decides whether a difference may be.

Where a runtime computes in fp32 with an order of operations of its own, two right answers differ only where the exact value
is nearly halfway between two integers. The exact value is computed here in float64, for single outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nasq.quant.program import Conv, Linear, Tensor

__all__ = ["TIE", "at_tie", "away_from_ties", "exact_steps"]

TIE = 1e-5
"""A value is at a tie within this share of itself (or of one step, if it is smaller)."""

SPACINGS = 8
"""Or within so many fp32 spacings of the container's value. A runtime that folds zero-points into its bias computes with
numbers of their size, some operations long, and the neighbours of 128 to 255 are 1.5e-5 apart; up to 4.4 spacings were
seen on OpenVINO (scripts/benchmarks/parity_families.py). That is still a tenth of 1e-5 of the container's value."""

Integers = NDArray[np.uint8]


def exact_steps(
    op: Linear, sources: Sequence[Tensor], given: Sequence[Integers], places: NDArray[np.integer]
) -> NDArray[np.float64]:
    """What a layer makes before it is rounded, in steps from the zero-point, at some places of its output.

    Args:
        op: A convolution, perhaps with a shortcut, or a linear layer.
        sources: The tensors it reads.
        given: Their container integers, ``[N, ...]``.
        places: Indices of outputs, ``[count, dimensions of the output with the batch]``.

    Returns:
        float64 ``[count]``.
    """
    x = given[0].astype(np.int64) - sources[0].zero_point
    return np.array([_one(op, sources, x, given, tuple(map(int, place))) for place in places], np.float64)


def _one(
    op: Linear, sources: Sequence[Tensor], x: NDArray[np.int64], given: Sequence[Integers], at: tuple[int, ...]
) -> float:
    channel = at[1] if isinstance(op, Conv) else at[-1]
    acc = _convolved(op, x[at[0]], at) if isinstance(op, Conv) else float(x[at[:-1]] @ op.summed[channel])
    real = float(acc + int(op.bias[channel])) * (sources[0].scale * float(op.weight_scale[channel]))
    if len(given) == 2:
        real += float(int(given[1][at]) - sources[1].zero_point) * sources[1].scale
    return real / op.output.scale


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


def away_from_ties(
    op: Linear, sources: Sequence[Tensor], given: Sequence[Integers], places: NDArray[np.integer]
) -> int:
    """How many of an output's ``places`` have an exact value that is not at a tie; arguments of :func:`exact_steps`."""
    return int((~at_tie(exact_steps(op, sources, given, places), op.output.zero_point)).sum())


def at_tie(steps: NDArray[np.float64], zero_point: int) -> NDArray[np.bool_]:
    """Whether exact values, in steps from the zero-point, lie so near a tie that fp32 may round them either way."""
    distance = np.abs(steps - np.floor(steps) - 0.5)
    held = np.spacing(np.abs(steps + zero_point).astype(np.float32)).astype(np.float64)
    return distance <= np.maximum(TIE * np.maximum(1.0, np.abs(steps)), SPACINGS * held)
