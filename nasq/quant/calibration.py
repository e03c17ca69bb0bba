"""Initial step sizes: the range that loses least, for all bit-widths and forms at once.

The criterion is EQ-Net's (released code): among the ranges ``c * (largest value)``, ``c = 1, 0.99, ..., 0.21``, take the
one with the smallest ``mean |x - Q(x)|^2.4``. Its per-channel symmetric search looks at five of the eighty candidates;
ours looks at all of them. Activations are searched on a fine histogram, so that the cost does not depend on their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasq.quant.arithmetic import STEP_FLOOR
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer

__all__ = ["histogram", "initialise_activation", "initialise_weight", "search_range"]

_CANDIDATES = tuple(1 - 0.01 * index for index in range(80))
_POWER = 2.4
_BINS = 4096
_SAMPLE = 1 << 20
_CHUNK = 1 << 18
"""Numbers worked on at once: what stays in a core's cache."""


@dataclass(frozen=True)
class Range:
    """The result of a search, one entry per step size: ``step``, ``zeta``; ``error`` is the criterion's value."""

    step: Tensor
    zeta: Tensor
    error: Tensor


def histogram(x: Tensor) -> tuple[Tensor, Tensor]:
    """Bin centres ``[1, bins]`` and their shares ``[1, bins]`` of (a strided sample of) a tensor's values."""
    flat = x.detach().float().flatten()
    stride = max(1, flat.numel() // _SAMPLE)
    # Without a factor in common with any dimension, the sample falls on all rows, columns and channels equally.
    while math.gcd(stride, flat.numel()) > 1:
        stride += 1
    flat = flat[::stride]
    low, high = flat.aminmax()
    if low == high:
        return low.reshape(1, 1), torch.ones(1, 1, device=x.device)
    counts = torch.histc(flat, _BINS, float(low), float(high))
    width = (high - low) / _BINS
    centres = low + width * (torch.arange(_BINS, device=x.device) + 0.5)
    used = counts > 0
    # The extreme values themselves, not the centres of their bins: the range is searched relative to them.
    centres[0], centres[-1] = low, high
    return centres[used].reshape(1, -1), (counts[used] / counts.sum()).reshape(1, -1)


def _errors(x: Tensor, shares: Tensor | None, step: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """The criterion ``[candidates, groups]`` for steps and zero-points ``[candidates, groups, 1]``."""
    q = x / step
    if zero is not None:
        q = q.add_(zero).round_().clamp_(low, high).sub_(zero)
    else:
        q = q.round_().clamp_(low, high)
    e = q.mul_(step).sub_(x).abs_().pow_(_POWER)
    return e.mean(2) if shares is None else e.mul_(shares).sum(2)


def search_range(x: Tensor, low: int, high: int, symmetric: bool, shares: Tensor | None = None) -> Range:
    """Searches step size and zero-point for the grid ``low..high``.

    Args:
        x: Values ``[groups, n]``; one step size per group.
        low, high: Integers of the grid. ``low = 0`` with ``symmetric`` is the unsigned grid.
        symmetric: Whether the zero-point stays 0.
        shares: Weights ``[groups, n]`` of the values; ``None``: all equal.
    """
    smallest, largest = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    factors = torch.tensor(_CANDIDATES, device=x.device).reshape(-1, 1, 1)
    extent = torch.maximum(-smallest, largest)
    spread = (extent if low == 0 else 2 * extent) if symmetric else largest - smallest
    steps = (factors * spread / (high - low)).clamp_min(STEP_FLOOR)
    zetas = torch.zeros_like(steps) if symmetric else low - factors * smallest / steps
    zeros = None if symmetric else zetas.round().clamp(low, high)
    at_once = max(1, _CHUNK // x.numel())
    parts = [
        _errors(x, shares, steps[i : i + at_once], None if zeros is None else zeros[i : i + at_once], low, high)
        for i in range(0, len(steps), at_once)
    ]
    errors = torch.cat(parts)
    best = errors.argmin(0, keepdim=True)
    picked = [tensor[:, :, 0].expand_as(errors).gather(0, best)[0] for tensor in (steps, zetas)]
    return Range(picked[0], picked[1], errors.gather(0, best)[0])


def _alive(found: Range, step: float, zeta: float) -> Range:
    """Where all values are 0, which says nothing about a range: a start from which a step can still be learned."""
    dead = found.step <= STEP_FLOOR
    return Range(torch.where(dead, step, found.step), torch.where(dead, zeta, found.zeta), found.error)


def _blank(weight: Tensor, levels: int) -> float:
    """The step for a weight of zeros: a grid as wide as weights usually are at the start, ``1 / sqrt(fan-in)`` each way."""
    return 2 / math.sqrt(weight[0].numel()) / levels


def _write(form: WeightForm | ActivationForm, found: Range) -> None:
    shape = form.log_step.shape
    form.log_step.copy_(found.step.log().reshape(shape))
    if isinstance(form.zeta, nn.Parameter):
        form.zeta.copy_(found.zeta.reshape(shape))


def _sharing(rows: Tensor, form: WeightForm) -> list[Tensor]:
    """The weights ``[out, n]`` that share a step, as the rows of one matrix per size of a group."""
    if form.groups is None:
        return [rows]
    size, count = form.groups.sizes[0], len(form.groups.sizes)
    whole = count if form.groups.sizes[-1] == size else count - 1
    parts = [rows[:, : whole * size].reshape(-1, size), rows[:, whole * size :]]
    return [part for part in parts if part.numel()]


def _joined(parts: list[Tensor], form: WeightForm) -> Tensor:
    """What was found for the rows of :func:`_sharing`, in the shape of the form's steps."""
    shape = form.log_step.shape
    if form.groups is None:
        return parts[0].reshape(shape)
    return torch.cat([part.reshape(shape[0], -1) for part in parts], 1)


@torch.no_grad()
def guess_weight(quantizer: WeightQuantizer, weight: Tensor) -> None:
    """A quick start for the steps of a weight, ``2 mean|w| / sqrt(high)`` (LSQ, section 2.1), until calibration."""
    rows = weight.detach().float().flatten(1).abs()
    for form in quantizer.forms.values():
        assert isinstance(form, WeightForm)
        means = [part.mean(1) for part in _sharing(rows, form)] if form.log_step.ndim else [rows.mean()]
        step = 2 * _joined(means, form) / max(form.high, 1) ** 0.5
        form.log_step.copy_(torch.where(step > STEP_FLOOR, step, _blank(weight, form.high - form.low)).log())


@torch.no_grad()
def initialise_weight(quantizer: WeightQuantizer | WeightForm, weight: Tensor) -> None:
    """Sets the steps of every form of a weight ``[out, ...]`` (the whole shared weight).

    A form after extraction is left as it was learned.
    """
    if isinstance(quantizer, WeightForm):
        return
    rows = weight.detach().float().flatten(1)
    centres, shares = histogram(weight)
    for form in quantizer.forms.values():
        assert isinstance(form, WeightForm)
        if form.log_step.ndim:
            ranges = [search_range(part, form.low, form.high, form.symmetric) for part in _sharing(rows, form)]
            fields = (_joined([getattr(one, name) for one in ranges], form) for name in ("step", "zeta", "error"))
            found = Range(*fields)
        else:
            found = search_range(centres, form.low, form.high, form.symmetric, shares)
        _write(form, _alive(found, _blank(weight, form.high - form.low), 0.0))
    quantizer.calibrated = True


@torch.no_grad()
def initialise_activation(quantizer: ActivationQuantizer | ActivationForm, x: Tensor) -> None:
    """Sets the steps of every form of an activation tensor from one batch of it.

    A form after extraction is left as it was learned.
    """
    if isinstance(quantizer, ActivationForm):
        return
    centres, shares = histogram(x if quantizer.signed else x.clamp_min(0))
    for form in quantizer.forms.values():
        assert isinstance(form, ActivationForm)
        width = form.high - form.low
        if form.symmetric and form.signed:
            found = search_range(centres, -(width + 1) // 2, width // 2, True, shares)
        else:
            found = search_range(centres, 0, width, form.zeta is None, shares)
        _write(form, _alive(found, 1.0 / width, (width + 1) / 2))
    quantizer.calibrated = True
