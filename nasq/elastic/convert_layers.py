"""Elastic layers in the place of plain ones, with their weights."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from nasq.elastic.base import Size
from nasq.elastic.conv import Conv2d
from nasq.elastic.kinds import is_of_timm
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d

__all__ = ["elastic_conv", "elastic_linear", "elastic_norm"]


def _adopt(made: nn.Module, original: nn.Module) -> None:
    """Gives a new layer the parameters of the one it stands for."""
    for name, parameter in original.named_parameters(recurse=False):
        made.register_parameter(name, parameter)


def elastic_conv(conv: nn.Conv2d, in_channels: Size, out_channels: Size, groups: Size, kernel: Size | None) -> Conv2d:
    """The convolution with other sizes; a kernel that is a choice is cropped at its centre and padded to the same size."""
    assert not isinstance(conv.padding, str)
    padding: int | str = conv.padding[0] if kernel is None else "same"
    made = Conv2d(
        in_channels,
        out_channels,
        conv.kernel_size[0] if kernel is None else kernel,
        conv.stride[0],
        padding,  # type: ignore[arg-type]
        conv.dilation[0],
        groups,
        conv.bias is not None,
    )
    assert made.weight.shape == conv.weight.shape
    _adopt(made, conv)
    return made.train(conv.training)


def elastic_linear(linear: nn.Linear, in_features: Size, out_features: Size) -> Linear:
    """The linear layer with other sizes."""
    made = Linear(in_features, out_features, linear.bias is not None)
    assert made.weight.shape == linear.weight.shape
    _adopt(made, linear)
    return made.train(linear.training)


def elastic_norm(norm: nn.BatchNorm2d, channels: Size) -> nn.Module:
    """The BatchNorm with another size; one that holds its activation becomes a sequence of both."""
    made = BatchNorm2d(channels, norm.eps, norm.momentum, norm.affine)
    _adopt(made, norm)
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    made.running_mean, made.running_var = norm.running_mean, norm.running_var
    made.num_batches_tracked = norm.num_batches_tracked
    made.train(norm.training)
    if not is_of_timm(norm, "BatchNormAct2d"):
        return made
    return nn.Sequential(OrderedDict([("norm", made), *norm.named_children()])).train(norm.training)
