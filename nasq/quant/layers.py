"""What a producer reads of the layer and the BatchNorm it runs, elastic or plain."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.cuda import products
from nasq.elastic.base import ElasticModule, Size
from nasq.elastic.conv import Conv2d, padding_of
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.elastic.segments import Segments, active_part
from nasq.quant import arithmetic, wide
from nasq.quant.input_groups import Slices
from nasq.quant.recompute import forgetting
from nasq.quant.value import Value
from nasq.space import maximum_of_size

__all__ = [
    "AnyLayer", "AnyNorm", "Unit", "accumulate", "affine", "apply", "bias_of", "geometry_of", "slices_of", "weight_of",
]  # fmt: skip


class Unit(nn.Module):
    """Stands for the missing layer of a BatchNorm that has none before it: a depthwise convolution by one."""


AnyLayer = Conv2d | nn.Conv2d | Linear | nn.Linear | Unit
AnyNorm = BatchNorm2d | nn.BatchNorm2d


def weight_of(layer: AnyLayer, x: Tensor) -> Tensor:
    """The active weight."""
    if isinstance(layer, Unit):
        return torch.ones(x.shape[1], 1, 1, 1, device=x.device)
    return layer.active_weight() if isinstance(layer, ElasticModule) else layer.weight


def full_weight(layer: AnyLayer) -> Tensor:
    """The weight of the largest form."""
    assert not isinstance(layer, Unit)
    return layer.weight


def bias_of(layer: AnyLayer) -> Tensor | None:
    """The active bias."""
    if isinstance(layer, Unit):
        return None
    return layer.active_bias() if isinstance(layer, ElasticModule) else layer.bias


def slices_of(layer: AnyLayer) -> Slices | None:
    """Which channels of the shared weight are active, where they are not simply the first ones (see ``Segments``)."""
    if isinstance(layer, Linear):
        sizes: tuple[Size, Size] = (layer.out_features, layer.in_features)
    elif isinstance(layer, Conv2d):
        sizes = (layer.out_channels, 0)  # steps of a convolution do not depend on its inputs
    else:
        return None
    if not any(isinstance(size, Segments) for size in sizes):
        return None
    return Slices(*(_places(layer, size) for size in sizes))


def _places(layer: Linear | Conv2d, size: Size) -> Tensor | None:
    if not isinstance(size, Segments):
        return None
    whole = torch.arange(maximum_of_size(size), device=layer.weight.device)
    return active_part(whole, 0, size, layer.value)


def geometry_of(layer: AnyLayer, x: Tensor) -> dict[str, Any] | None:
    """Stride, padding, dilation and groups of a convolution; ``None`` for a linear layer."""
    if isinstance(layer, Unit):
        return {"stride": 1, "padding": 0, "dilation": 1, "groups": x.shape[1]}
    if isinstance(layer, Conv2d):
        return dict(layer.geometry())
    if isinstance(layer, nn.Conv2d):
        geometry = {name: getattr(layer, name) for name in ("stride", "dilation", "groups")}
        return geometry | {"padding": padding_of(layer)}
    return None


def apply(layer: AnyLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation with another weight and bias."""
    geometry = geometry_of(layer, x)
    with forgetting(x):
        return F.linear(x, weight, bias) if geometry is None else F.conv2d(x, weight, bias, **geometry)


def is_wide(x: Value, weight: Tensor) -> bool:
    """Whether a layer's sums on the integers ``x`` may pass 2^24; ``weight`` is shifted."""
    assert x.grid is not None
    return arithmetic.is_wide(weight, x.grid.low, x.grid.high, int(x.grid.zero_point))


def accumulate(layer: AnyLayer, x: Value, weight: Tensor, symmetric: bool) -> Tensor:
    """The exact sums of a layer on integers: fp32, float64 or int32.

    Args:
        layer: Its geometry counts.
        x: What it reads, in mode ``"integer"``.
        weight: Integers, shifted, as fp32; float64 where groups of inputs have multipliers, which are in them.
        symmetric: Whether the weights have no zero-points and no multipliers, so that int8 holds them.
    """
    assert x.grid is not None
    geometry = geometry_of(layer, x.data)
    if symmetric:
        sums = products.accumulate(x.data, x.grid.zero_point, weight, geometry)
        if sums is not None:
            return sums
    kind = weight.dtype
    if kind != torch.float64 and is_wide(x, weight):
        groups = 1 if geometry is None else int(geometry["groups"])
        parts = wide.count_parts(weight, x.grid.reach(), groups) if weight.device.type == "cpu" else None
        if parts is not None:
            return wide.sum_in_parts(x.centred(), weight, parts, geometry)
        kind = torch.float64
    centred, weight = x.centred().to(kind), weight.to(kind)
    if geometry is None:
        return products.linear(centred, weight)
    return products.conv2d(centred, weight, **geometry)


def along_channels(layer: AnyLayer, ndim: int) -> tuple[int, ...]:
    """What makes ``[out]`` run along the channels of the layer's output: its second dimension, or a linear layer's last."""
    return (-1,) if isinstance(layer, Linear | nn.Linear) else (1, -1, *[1] * (ndim - 2))


def _active_norm(norm: AnyNorm) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    assert norm.running_mean is not None and norm.running_var is not None
    if isinstance(norm, BatchNorm2d):
        return norm.active_tensors()
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def normalise(norm: AnyNorm, x: Tensor) -> Tensor:
    """The BatchNorm alone, with batch statistics in training; an activation that its class adds is left to others."""
    if type(norm) in (BatchNorm2d, nn.BatchNorm2d):
        return cast(Tensor, norm(x))
    assert isinstance(norm, nn.BatchNorm2d)
    return nn.BatchNorm2d.forward(norm, x)


@torch.no_grad()
def never_updated(norm: AnyNorm) -> bool:
    """Whether the running statistics are still the 0 and 1 of construction."""
    mean, var, tracked = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or var is None or (tracked is not None and int(tracked)):
        return False
    return not bool(mean.any()) and bool((var == 1).all())


def normalise_by_batch(norm: AnyNorm, x: Tensor) -> Tensor:
    """The BatchNorm with the statistics of ``x``, itself unchanged."""
    _, _, weight, shift = _active_norm(norm)
    return F.batch_norm(x, None, None, weight, shift, True, 0.0, norm.eps)


def norm_sign(norm: AnyNorm | None) -> Tensor | None:
    """``[C]`` of 1 and -1: the sign of the BatchNorm's scale (1 where it is 0); ``None`` where it has none."""
    if norm is None or norm.weight is None:
        return None
    weight = _active_norm(norm)[2]
    assert weight is not None
    return torch.where(weight.detach() < 0, -1.0, 1.0)


def affine(norm: AnyNorm | None, bias: Tensor | None, channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset, float64 ``[channels]``, of what follows the accumulator in evaluation.

    With BatchNorm: ``k = gamma / sqrt(var + eps)`` and ``beta + k (bias - mean)``; without: 1 and the bias.
    """
    zeros = torch.zeros(channels, dtype=torch.float64, device=like.device)
    own = zeros if bias is None else bias.double()
    if norm is None:
        return zeros + 1, own
    mean, var, weight, shift = _active_norm(norm)
    slope = torch.rsqrt(var.double() + norm.eps)
    if weight is not None:
        slope = weight.double() * slope
    return slope, slope * (own - mean.double()) + (zeros if shift is None else shift.double())
