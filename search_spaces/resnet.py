"""``resnet20``, ``resnet56``, ``resnet50``: residual networks with elastic depth, width and expansion.

Source: He et al. 2016 (Deep Residual Learning for Image Recognition). The CIFAR networks have the parameter-free
shortcuts of the paper's option A; ResNet-50 has projections and, as is usual now, its stride in the 3x3 convolution
(the paper has it in the 1x1 before). The elastic dimensions are those of Once-for-All (Cai et al. 2020) around them: a
stage runs its first blocks, uses its first channels, and each block has its own inner width.

=============  ====================================================  ===============  ====================
network        largest subnet                                        architectures    default data
=============  ====================================================  ===============  ====================
``resnet20``   269,722 parameters (paper: 0.27 M)                    1,601,613        ``cifar10``, 3x32x32
``resnet56``   853,018 parameters (paper: 0.85 M)                    2.9e14           ``cifar10``, 3x32x32
``resnet50``   25,557,032 parameters, 4.09e9 multiply-adds           4.6e10           ImageNet, 3x224x224
               (paper: 3.8e9 with the stride in the 1x1)
=============  ====================================================  ===============  ====================

With ``elastic=False`` only the largest subnet is left, so that quantization makes a space of bits alone. Its weights are
loaded by :func:`load_weights`: published ones have the usual names, and a largest subnet computes what they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, elastic
from nasq.plugins import search_space
from nasq.space import Expression, round_to

from ._resnet_weights import load_weights

__all__ = ["CifarResNet", "ImageNetResNet", "load_weights", "resnet20", "resnet50", "resnet56"]

Size = int | Expression


def _choice(name: str, options: Sequence[int]) -> Choice | int:
    """A choice of numbers, or the number itself where there is one."""
    return options[0] if len(options) == 1 else Choice(name, options)


def _width(name: str, widest: int, ratios: Sequence[float]) -> Choice | int:
    """The widths that are ``ratios`` of the widest, in multiples of 4; each once."""
    return _choice(name, sorted({max(int(widest * ratio) // 4 * 4, 4) for ratio in ratios}))


def _inner(name: str, width: Size, ratios: Sequence[float], divisor: int) -> Size:
    """The inner width of a block: a share of its outer width."""
    if len(ratios) == 1:
        return round_to(width * ratios[0], divisor)
    return round_to(Choice(name, ratios) * width, divisor)


class Subsample(nn.Module):
    """Option A: every ``stride``-th pixel, and channels of zeros around the input's.

    With widths that are choices, the input's channels keep their places among the output's in every subnet.

    Args:
        channels, out: Widths.
        stride: In both directions.
    """

    def __init__(self, channels: Size, out: Size, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad: nn.Module
        if isinstance(channels, int) and isinstance(out, int):
            front = (out - channels) // 2
            self.pad = elastic.ZeroChannels(front, out - channels - front)
        else:
            self.pad = elastic.PadChannels(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, ceil(H / stride), ceil(W / stride)]``."""
        return self.pad(x[:, :, :: self.stride, :: self.stride])  # type: ignore[no-any-return]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an inner width, added to the shortcut."""

    def __init__(self, channels: Size, out: Size, hidden: Size, stride: int) -> None:
        super().__init__()
        self.conv1 = elastic.Conv2d(channels, hidden, 3, stride, bias=False)
        self.bn1 = elastic.BatchNorm2d(hidden)
        self.conv2 = elastic.Conv2d(hidden, out, 3, bias=False)
        self.bn2 = elastic.BatchNorm2d(out)
        same = stride == 1 and channels is out
        self.shortcut: nn.Module = nn.Identity() if same else Subsample(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H', W']``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, added to the input or its projection."""

    def __init__(self, channels: Size, out: Size, hidden: Size, stride: int) -> None:
        super().__init__()
        self.conv1 = elastic.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = elastic.BatchNorm2d(hidden)
        self.conv2 = elastic.Conv2d(hidden, hidden, 3, stride, bias=False)
        self.bn2 = elastic.BatchNorm2d(hidden)
        self.conv3 = elastic.Conv2d(hidden, out, 1, bias=False)
        self.bn3 = elastic.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels is not out:
            projection = elastic.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, elastic.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H', W']``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _stage(
    name: str, block: type[nn.Module], channels: Size, out: Size, stride: int, depths: Sequence[int],
    expand: Callable[[str, Size], Size],
) -> elastic.Repeat:  # fmt: skip
    """The blocks of one width; the first one changes the shape."""
    blocks = []
    for index in range(max(depths)):
        first = index == 0
        hidden = expand(f"{name}.{index}.expand", out)
        blocks.append(block(channels if first else out, out, hidden, stride if first else 1))
    return elastic.Repeat(blocks, _choice(f"{name}.depth", depths))


def _initialise(network: nn.Module, mode: Literal["fan_in", "fan_out"]) -> None:
    """He initialisation of the convolutions (He et al. 2015)."""
    for part in network.modules():
        if isinstance(part, elastic.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode=mode, nonlinearity="relu")


class CifarResNet(nn.Module):
    """The CIFAR network: a 3x3 stem, three stages of 16, 32 and 64 channels, a linear layer.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        depths: Numbers of blocks that a stage may have.
        widths: Ratios to the full width of a stage; the stem has the width of the first stage.
        expansions: Ratios of a block's inner to its outer width.
        base: Full width of the first stage.
    """

    def __init__(
        self, num_classes: int, in_channels: int, depths: Sequence[int], widths: Sequence[float],
        expansions: Sequence[float], base: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()

        def expand(name: str, width: Size) -> Size:
            return _inner(name, width, expansions, 4)

        width = [_width(f"layer{stage + 1}.width", base * 2**stage, widths) for stage in range(3)]
        self.conv1 = elastic.Conv2d(in_channels, width[0], 3, bias=False)
        self.bn1 = elastic.BatchNorm2d(width[0])
        self.layer1 = _stage("layer1", BasicBlock, width[0], width[0], 1, depths, expand)
        self.layer2 = _stage("layer2", BasicBlock, width[0], width[1], 2, depths, expand)
        self.layer3 = _stage("layer3", BasicBlock, width[1], width[2], 2, depths, expand)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = elastic.Linear(width[2], num_classes)
        _initialise(self, "fan_in")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = F.relu(self.bn1(self.conv1(x_NCHW)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]


class ImageNetResNet(nn.Module):
    """ResNet-50: a 7x7 stem and a max-pool, four stages of bottlenecks, a linear layer.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        fewer: How many blocks fewer than ``blocks`` a stage may have.
        widths: Ratios to the full width of the stem (64) and of each stage (256, 512, 1024, 2048).
        expansions: Ratios of a bottleneck's inner to its outer width.
        blocks: Of every stage; ResNet-101 has 3, 4, 23, 3.
    """

    def __init__(
        self, num_classes: int, in_channels: int, fewer: Sequence[int], widths: Sequence[float],
        expansions: Sequence[float], blocks: Sequence[int] = (3, 4, 6, 3),
    ) -> None:  # fmt: skip
        super().__init__()

        def expand(name: str, width: Size) -> Size:
            return _inner(name, width, expansions, 8)

        stem = _width("stem.width", 64, widths)
        width = [stem, *(_width(f"layer{stage + 1}.width", 256 * 2**stage, widths) for stage in range(4))]
        depths = [sorted(full - less for less in fewer) for full in blocks]
        self.conv1 = elastic.Conv2d(in_channels, stem, 7, 2, bias=False)
        self.bn1 = elastic.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _stage("layer1", Bottleneck, width[0], width[1], 1, depths[0], expand)
        self.layer2 = _stage("layer2", Bottleneck, width[1], width[2], 2, depths[1], expand)
        self.layer3 = _stage("layer3", Bottleneck, width[2], width[3], 2, depths[2], expand)
        self.layer4 = _stage("layer4", Bottleneck, width[3], width[4], 2, depths[3], expand)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = elastic.Linear(width[4], num_classes)
        _initialise(self, "fan_out")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x_NCHW))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


RATIOS = (0.5, 0.75, 1.0)
"""Ratios of widths and expansions unless others are given."""

_SOURCE = "He et al. 2016 (CIFAR, option A), elastic as in Once-for-All (Cai et al. 2020)"
_TINY = {"depths": (1, 2), "widths": (0.5, 1.0), "expansions": (0.5, 1.0), "base": 8, "num_classes": 4}


@search_space(
    source=_SOURCE, data="cifar10", input_shape=(3, 32, 32), tiny=_TINY, tiny_input_shape=(3, 12, 12),
    published="0.27 M parameters, test error on CIFAR-10 8.75 % (He et al. 2016)",
)  # fmt: skip
def resnet20(
    num_classes: int = 10, in_channels: int = 3, elastic: bool = True, depths: Sequence[int] = (1, 2, 3),
    widths: Sequence[float] = RATIOS, expansions: Sequence[float] = RATIOS, base: int = 16,
) -> CifarResNet:  # fmt: skip
    """The network with 20 layers in its largest form.

    Args:
        num_classes, in_channels: Of the data.
        elastic: ``False`` leaves the largest subnet alone.
        depths, widths, expansions: The options of every stage and block, from the smallest to the largest; one alone is
            no choice. See :class:`CifarResNet`.
        base: Full width of the first stage.
    """
    return _cifar(num_classes, in_channels, elastic, depths, widths, expansions, base)


@search_space(
    source=_SOURCE, data="cifar10", input_shape=(3, 32, 32), tiny=_TINY, tiny_input_shape=(3, 12, 12),
    published="0.85 M parameters, test error on CIFAR-10 6.97 % (He et al. 2016)",
)  # fmt: skip
def resnet56(
    num_classes: int = 10, in_channels: int = 3, elastic: bool = True, depths: Sequence[int] = (5, 7, 9),
    widths: Sequence[float] = RATIOS, expansions: Sequence[float] = RATIOS, base: int = 16,
) -> CifarResNet:  # fmt: skip
    """The network with 56 layers in its largest form; arguments as :func:`resnet20`."""
    return _cifar(num_classes, in_channels, elastic, depths, widths, expansions, base)


def _cifar(
    num_classes: int, in_channels: int, elastic: bool, depths: Sequence[int], widths: Sequence[float],
    expansions: Sequence[float], base: int,
) -> CifarResNet:  # fmt: skip
    if not elastic:
        depths, widths, expansions = [max(depths)], [max(widths)], [max(expansions)]
    return CifarResNet(num_classes, in_channels, depths, widths, expansions, base)


@search_space(
    source="He et al. 2016, stride in the 3x3; elastic as in Once-for-All (Cai et al. 2020)",
    data="image_folder",
    input_shape=(3, 224, 224),
    tiny={
        "widths": (0.0625, 0.125),
        "fewer": (1, 0),
        "blocks": (2, 2, 2, 2),
        "expansions": (0.25, 0.5),
        "num_classes": 4,
    },
    tiny_input_shape=(3, 32, 32),
    published="25.6 M parameters, top-1 on ImageNet 77.2 % with ten crops (He et al. 2016)",
)
def resnet50(
    num_classes: int = 1000, in_channels: int = 3, elastic: bool = True, fewer: Sequence[int] = (2, 1, 0),
    widths: Sequence[float] = RATIOS, expansions: Sequence[float] = (0.125, 0.1875, 0.25),
    blocks: Sequence[int] = (3, 4, 6, 3),
) -> ImageNetResNet:  # fmt: skip
    """ResNet-50 in its largest form.

    Args:
        num_classes, in_channels: Of the data.
        elastic: ``False`` leaves the largest subnet alone.
        fewer, widths, expansions, blocks: The options of every stage and block (one alone is no choice) and the number of
            blocks in the largest form. See :class:`ImageNetResNet`.
    """
    if not elastic:
        fewer, widths, expansions = [min(fewer)], [max(widths)], [max(expansions)]
    return ImageNetResNet(num_classes, in_channels, fewer, widths, expansions, blocks)
