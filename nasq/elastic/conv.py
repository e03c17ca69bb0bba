"""Elastic 2-d convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.elastic.segments import Segments, active_part
from nasq.elastic.transform import KernelTransforms
from nasq.errors import InputError
from nasq.space import Choice, maximum_of_size

__all__ = ["Conv2d", "padding_of", "plain_conv"]


def plain_conv(
    weight: Tensor, bias: Tensor | None, *, stride: int, padding: int, dilation: int, groups: int
) -> nn.Conv2d:
    """A torch convolution that owns copies of ``weight`` ``[out, in/groups, k, k]`` and ``bias`` ``[out]``."""
    out_channels, in_per_group, kernel, _ = weight.shape
    conv = nn.Conv2d(
        in_per_group * groups, out_channels, kernel, stride, padding, dilation, groups, bias is not None, device="meta"
    )
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone())
    return conv


def padding_of(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The rows and columns that torch's convolution adds on each side; ``None`` where two sides get different numbers."""
    if not isinstance(conv.padding, str):
        rows, columns = conv.padding
        return int(rows), int(columns)
    reach = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(both % 2 for both in reach) else (reach[0] // 2, reach[1] // 2)


def _even(kernel: int) -> InputError:
    return InputError(f"padding='same' needs an odd kernel, got {kernel}. Give the padding as a number of pixels.")


class Conv2d(ElasticModule):
    """A 2-d convolution whose channels, kernel, stride and groups may be choices.

    A smaller convolution uses the first output channels, the first input channels of each group and the centre of the
    kernel of the shared weight, or with ``kernel_transform`` what learned matrices make of the centre (Once-for-All).

    Args:
        in_channels, out_channels: Sizes: an int, a choice, or an expression of choices (:class:`Segments` for what is
            concatenated).
        kernel_size: Odd size(s); the kernel is square.
        stride: Size; equal in both directions.
        padding: ``"same"`` (``dilation * (kernel - 1) / 2`` of the active kernel) or a fixed int, in pixels.
        dilation: A fixed int.
        groups: Size. ``groups=in_channels`` makes a depthwise convolution.
        bias: Whether a bias is added.
        kernel_transform: Whether smaller kernels are learned transforms of the next larger one
            (:class:`~nasq.elastic.transform.KernelTransforms`), not its plain centre; the kernel has to be a choice.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``.

    Raises:
        InputError: A kernel size is even with ``padding="same"``, the channels are not divisible by the groups, or the
            padding is neither "same" nor a number of pixels.
    """

    def __init__(
        self,
        in_channels: Size,
        out_channels: Size,
        kernel_size: Size,
        stride: Size = 1,
        padding: Literal["same"] | int = "same",
        dilation: int = 1,
        groups: Size = 1,
        bias: bool = True,
        kernel_transform: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.groups, self.dilation = stride, groups, dilation
        self.padding: Literal["same"] | int = padding
        self.holds(in_channels, out_channels, kernel_size, stride, groups)
        self._refuse_impossible()
        # The channels that one kernel reads. Many choices make the quotient of equal sizes hard to bound.
        one = self.groups == self.in_channels
        self.per_group: Size = 1 if one else self.in_channels if self.groups == 1 else self.in_channels // self.groups
        kernel = maximum_of_size(kernel_size)
        shape = (maximum_of_size(out_channels), maximum_of_size(self.per_group), kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.transforms = KernelTransforms(kernel_size) if kernel_transform else None
        self.reset_parameters()

    def _refuse_impossible(self) -> None:
        """What no active option can mend is refused now; what depends on several choices, when the space is built."""
        padding, kernel = self.padding, self.kernel_size
        if padding != "same" and (not isinstance(padding, int) or padding < 0):
            raise InputError(f"the padding {padding!r} is neither 'same' nor a number of pixels. Give one of them.")
        for option in kernel.options if isinstance(kernel, Choice) else (kernel,):
            if padding == "same" and isinstance(option, int) and option % 2 == 0:
                raise _even(option)
        if isinstance(self.in_channels, Segments) and self.groups not in (1, self.in_channels):
            raise InputError(
                f"a convolution reads the concatenation {self.in_channels} in {self.groups} groups, which would cut across "
                "its segments. Use one group, or groups=in_channels (depthwise)."
            )
        for channels in (self.in_channels, self.out_channels):
            if isinstance(channels, int) and isinstance(self.groups, int) and channels % self.groups:
                raise InputError(
                    f"a convolution has {channels} channels, which {self.groups} groups do not divide. Change its "
                    "channels or its groups."
                )

    def reset_parameters(self) -> None:
        """Draws the weights as torch's own convolution does (Kaiming uniform, a = sqrt 5)."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(1, self.weight[0].numel()))
            nn.init.uniform_(self.bias, -bound, bound)

    def active_weight(self) -> Tensor:
        """The active slice ``[out, in/groups, k, k]``, contiguous (a strided slice may compute other last bits)."""
        out, kernel = self.value(self.out_channels), self.value(self.kernel_size)
        in_channels, groups = self.value(self.in_channels), self.value(self.groups)
        if in_channels % groups or out % groups:
            raise InputError(
                f"a convolution has {in_channels} input and {out} output channels, which {groups} groups do not divide. "
                "Change the options of its width or of its groups."
            )
        rows = active_part(self.weight, 0, self.out_channels, self.value)
        weight = active_part(rows, 1, self.per_group, self.value)
        if self.transforms is not None:
            return self.transforms.of(weight, kernel).contiguous()
        cut = (self.weight.shape[2] - kernel) // 2
        stop = cut + kernel
        return weight[..., cut:stop, cut:stop].contiguous()

    def active_bias(self) -> Tensor | None:
        """The active slice ``[out]`` of the bias."""
        return None if self.bias is None else active_part(self.bias, 0, self.out_channels, self.value).contiguous()

    def geometry(self) -> dict[str, int]:
        """Active stride, padding, dilation and groups, as torch's functional convolution takes them."""
        kernel = self.value(self.kernel_size)
        if self.padding == "same" and kernel % 2 == 0:
            raise _even(kernel)
        padding = self.dilation * (kernel - 1) // 2 if self.padding == "same" else self.padding
        return {
            "stride": self.value(self.stride),
            "padding": padding,
            "dilation": self.dilation,
            "groups": self.value(self.groups),
        }

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Convolves with the active slice."""
        try:
            return F.conv2d(x_NCHW, self.active_weight(), self.active_bias(), **self.geometry())
        except RuntimeError:
            self.misfit(x_NCHW, 1, "input channels", self.value(self.in_channels))
            raise

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.Conv2d`."""
        return plain_conv(self.active_weight(), self.active_bias(), **self.geometry()).train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Weights and biases of the active slice."""
        out, kernel = lookup(self.out_channels), lookup(self.kernel_size)
        weights = out * (lookup(self.in_channels) // lookup(self.groups)) * kernel * kernel
        return weights + (out if self.bias is not None else 0)

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
