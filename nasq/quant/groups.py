"""Group-wise weights of few bits: rounding to the nearest, and GPTQ.

A group is ``g`` neighbouring inputs of one output: ``w = alpha q + beta`` with ``q`` in ``0..2^bits - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nasq.errors import InputError

__all__ = ["Grouped", "gptq", "round_to_nearest"]

DAMPING = 0.01
"""Share of the mean diagonal that GPTQ adds to the inputs' second moments (Frantar et al. 2023, section 3.3)."""


@dataclass(frozen=True)
class Grouped:
    """A weight ``[out, in]`` of few bits.

    Attributes:
        codes: uint8 ``[out, in]``.
        scale, offset: ``[out, in / group]``.
        bits, group: Of every code; inputs per group.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    group: int

    def real(self) -> Tensor:
        """The weight ``scale * codes + offset``, ``[out, in]``."""
        rows, columns = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.group).to(self.scale.dtype)
        return (codes * self.scale.unsqueeze(2) + self.offset.unsqueeze(2)).reshape(rows, columns)


def _range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and offset of groups ``[..., g]``: smallest and largest weight are codes; a constant group is exact."""
    low, high = weight.aminmax(dim=-1)
    return (high - low) / (2**bits - 1), low


def _codes(weight: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    steps = (weight - offset) / torch.where(scale > 0, scale, torch.ones_like(scale))
    return steps.round().clamp(0, 2**bits - 1)


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Grouped:
    """Rounds every weight to the nearest code of its group's range.

    Args:
        weight: ``[out, in]``.
        bits: Of the codes.
        group: Inputs per group; divides ``in``.
    """
    grouped = weight.reshape(weight.shape[0], -1, group)
    scale, offset = _range(grouped, bits)
    codes = _codes(grouped, scale.unsqueeze(2), offset.unsqueeze(2), bits)
    return Grouped(codes.reshape(weight.shape).to(torch.uint8), scale, offset, bits, group)


def gptq(weight: Tensor, moment: Tensor, bits: int, group: int) -> Grouped:
    """Rounds input by input, each time moving the weights not yet rounded so that the outputs change least.

    Source: GPTQ (Frantar et al., ICLR 2023, equations 2 and 3), inputs in their own order, group ranges from the weights
    as they have been moved when the group begins.

    Args:
        weight: ``[out, in]``.
        moment: ``[in, in]``: ``X^T X`` of the layer's inputs, up to a factor.
        bits: Of the codes.
        group: Inputs per group; divides ``in``.

    Raises:
        InputError: The moments hold NaN or infinite values.
    """
    if not bool(moment.isfinite().all()):
        raise InputError("the inputs of a layer hold NaN or infinite values, so its weights cannot be rounded by them.")
    left = weight.double().clone()
    factor = _inverse_factor(moment.double())
    codes, scales, offsets = torch.zeros_like(left), [], []
    for column in range(left.shape[1]):
        if column % group == 0:
            scale, offset = _range(left[:, column : column + group], bits)
            scales.append(scale)
            offsets.append(offset)
        code = _codes(left[:, column], scales[-1], offsets[-1], bits)
        error = (left[:, column] - (code * scales[-1] + offsets[-1])) / factor[column, column]
        left[:, column:] -= torch.outer(error, factor[column, column:])
        codes[:, column] = code
    scale, offset = (torch.stack(parts, dim=1).to(weight.dtype) for parts in (scales, offsets))
    return Grouped(codes.to(torch.uint8), scale, offset, bits, group)


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; an input that is always 0 has a moment of 1."""
    damped = moment.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
