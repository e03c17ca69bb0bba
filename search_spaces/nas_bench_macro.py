"""``nas_bench_macro``: eight layers of a MobileNet-like network, each one of three blocks.

Source: NAS-Bench-Macro (Su et al., "Prioritized Architecture Sampling with Monte-Carlo Tree Search", CVPR 2021). Size:
6,561 subnets, all of them trained in the published table; best mean test accuracy on CIFAR-10 93.13 % (``22212220``).
Parameters of the table are exact, its FLOPs (multiply-adds of convolutions and the linear layer) to the 7 digits that it
gives. Default data: ``cifar10``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Option

__all__ = ["BLOCKS", "LAYERS", "NasBenchMacro", "from_name", "name_of", "nas_bench_macro"]

BLOCKS = ("identity", "mb3_k3", "mb6_k5")
"""The blocks of a layer; their positions are the digits of a name."""

LAYERS = 8
"""Number of layers."""

_STAGES = ((2, 64), (3, 128), (3, 256))  # layers and channels; the first layer of each halves the side


def _conv(
    channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), *([nn.ReLU(inplace=True)] if act else []))


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (k x k), project (1x1); a shortcut where the shape stays."""

    def __init__(self, channels: int, out: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.shortcut = stride == 1 and channels == out
        self.expand = _conv(channels, hidden)
        self.depthwise = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _conv(hidden, out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H / stride, W / stride]``."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y  # type: ignore[no-any-return]


def _layer(index: int, channels: int, out: int, stride: int) -> elastic.OneOf:
    same = stride == 1 and channels == out
    branches = {
        # Where the shape changes, the identity is a projection without an activation.
        "identity": nn.Identity() if same else _conv(channels, out, stride=stride, act=False),
        "mb3_k3": InvertedResidual(channels, out, stride, 3, 3),
        "mb6_k5": InvertedResidual(channels, out, stride, 5, 6),
    }
    return elastic.OneOf(Choice(_name(index), BLOCKS, default="mb6_k5", ordered=False), branches)


def _name(index: int) -> str:
    return f"layer{index}"


class NasBenchMacro(nn.Module):
    """Stem, eight layers in three stages, a wide 1x1 convolution, head.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        width: Channels everywhere are this many times the published ones, rounded down to a whole number (at least 1);
            the published table has 1.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        if not width > 0:
            raise InputError(f"nas_bench_macro was given the width {width}, which has to be above 0.")

        def scaled(channels: int) -> int:
            return max(1, int(channels * width))

        channels = scaled(32)
        self.stem = _conv(in_channels, channels, 3)
        layers: list[nn.Module] = []
        for count, wide in _STAGES:
            for position in range(count):
                out = scaled(wide)
                layers.append(_layer(len(layers), channels, out, 1 if position else 2))
                channels = out
        self.layers = nn.Sequential(*layers)
        self.tail = _conv(channels, scaled(1280))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(scaled(1280), num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.tail(self.layers(self.stem(x_NCHW)))
        return self.classifier(self.pool(x).flatten(1))  # type: ignore[no-any-return]

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """See :func:`name_of`."""
        return name_of(subnet)

    def from_official_name(self, text: str) -> Subnet:
        """See :func:`from_name`."""
        return from_name(text)


def name_of(subnet: Mapping[str, Option]) -> str:
    """The official name of a subnet: one digit per layer, such as ``22212220``.

    Raises:
        InputError: A layer has no block, or an unknown one.
    """
    digits = []
    for layer in map(_name, range(LAYERS)):
        if layer not in subnet:
            raise InputError(f"the subnet has no block for {layer!r}. Give one of {', '.join(BLOCKS)}.")
        if subnet[layer] not in BLOCKS:
            raise choose_from(f"block of {layer!r}:", str(subnet[layer]), BLOCKS)
        digits.append(str(BLOCKS.index(str(subnet[layer]))))
    return "".join(digits)


def from_name(text: str) -> Subnet:
    """The subnet of an official name.

    Raises:
        InputError: It is not eight digits from 0 to 2. Tables have to be read as text: leading zeros count.
    """
    if len(text) != LAYERS or not set(text) <= set("012"):
        raise InputError(
            f"{text!r} is no NAS-Bench-Macro network. Give eight digits from 0 to 2, such as '22212220'; leading zeros "
            "count, so tables are read as text."
        )
    return Subnet({_name(index): BLOCKS[int(digit)] for index, digit in enumerate(text)})


@search_space(
    source="NAS-Bench-Macro (Su et al. 2021)",
    data="cifar10",
    input_shape=(3, 32, 32),
    tiny={"width": 0.125},
    tiny_input_shape=(3, 16, 16),
    published="6,561 networks, best test accuracy 93.13 %",
)
def nas_bench_macro(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> NasBenchMacro:
    """The space's network; see the module's docstring."""
    return NasBenchMacro(num_classes, in_channels, width)
