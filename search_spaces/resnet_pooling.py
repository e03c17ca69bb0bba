"""``resnet_pooling``: where a ResNet-20 halves its maps.

Source: Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture (Javan Roshtkhari et al., AutoML 2023).
A stem and nine residual blocks of 16, 16, 16, 16, 32, 32, 32, 64, 64, 64 channels; the channels belong to the blocks, and
exactly two 2x2 max-pools stand before any two of the blocks. Size: 36 architectures. Default data: ``cifar10``.

Published accuracies on CIFAR-10: the usual positions ``[4,3,3]`` 90.52 %, the best ones ``[7,1,2]`` 92.01 %, found by the
balanced mixture of four supernets 91.55 %.

Two things are as networks are deployed, not as in the released code, whose batch normalisations have no scale and shift
(``affine=False`` takes them away) and use the statistics of the test batch: evaluate a subnet with statistics of its own
(:meth:`nasq.Supernet.recalibrate`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError
from nasq.plugins import search_space
from nasq.space import Option, SpaceRules

__all__ = ["PoolingResNet", "Pools", "resnet_pooling"]


class Pools(SpaceRules):
    """As many pools as the network has to have, each before another block.

    Args:
        default: Blocks (the stem is one) at each resolution of the default network.
    """

    def __init__(self, default: Sequence[int]) -> None:
        blocks, self.pools = sum(default), len(default) - 1
        self.name = f"resnet_pooling(blocks={blocks}, pools={self.pools})"
        usual = set(itertools.accumulate(default[:-1]))
        # A pool makes the network smaller: it is the smaller option.
        self.choices = tuple(Choice(_name(index), (1, 0), int(index in usual)) for index in range(1, blocks))
        self.size = comb(blocks - 1, self.pools)

    def valid(self, rows: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Those with the right number of pools (option index 0)."""
        return np.asarray((rows == 0).sum(axis=1) == self.pools)

    def members(self) -> NDArray[np.int16]:
        """Every way to place the pools."""
        places = np.array(list(itertools.combinations(range(len(self.choices)), self.pools)), dtype=np.int64)
        rows = np.ones((self.size, len(self.choices)), dtype=np.int16)
        np.put_along_axis(rows, places.reshape(self.size, self.pools), 0, axis=1)
        return rows


def _name(index: int) -> str:
    return f"block{index}.pool"


class Block(nn.Module):
    """Two 3x3 convolutions, added to the input or, where the channels change, to its 1x1 convolution."""

    def __init__(self, channels: int, out: int, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out, affine=affine)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out, affine=affine)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out, affine=affine))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H, W]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PoolingResNet(nn.Module):
    """Stem, residual blocks of which some have a max-pool before them, pooling, linear layer.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        base: Channels of the first blocks; those of each further resolution of ``blocks`` have twice as many.
        blocks: How many blocks (the stem is one) the usual network has at each resolution; there is one pool less.
        affine: Whether batch normalisations have scale and shift.

    Raises:
        InputError: ``blocks`` is not at least one number, or one of them is below 1.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, base: int = 16, blocks: Sequence[int] = (4, 3, 3),
        affine: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not blocks or min(blocks) < 1:
            raise InputError(
                f"resnet_pooling was given the blocks {list(blocks)}. Give how many blocks each resolution has, at least "
                "one, such as [4, 3, 3]."
            )
        self.rules = Pools(blocks)
        self.stem = nn.Conv2d(in_channels, base, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(base, affine=affine)
        widths = [base * 2**level for level, count in enumerate(blocks) for _ in range(count)]
        self.pools, self.blocks = nn.ModuleList(), nn.ModuleList()
        for choice, (channels, out) in zip(self.rules.choices, itertools.pairwise(widths), strict=True):
            self.pools.append(elastic.OneOf(choice, {1: nn.MaxPool2d(2), 0: nn.Identity()}))
            self.blocks.append(Block(channels, out, affine))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def space_rules(self) -> SpaceRules:
        """How many pools there are."""
        return self.rules

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``; maps of odd sides lose a row and a column."""
        x = F.relu(self.bn(self.stem(x_NCHW)))
        for pool, block in zip(self.pools, self.blocks, strict=True):
            x = block(pool(x))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """The numbers of blocks at each resolution, the stem included, such as ``[4,3,3]``."""
        counts = [1]
        for choice in self.rules.choices:
            if subnet.get(choice.name, choice.default) == 1:
                counts.append(0)
            counts[-1] += 1
        return f"[{','.join(map(str, counts))}]"

    def from_official_name(self, text: str) -> Subnet:
        """The subnet that :meth:`official_name` calls ``text``.

        Raises:
            InputError: It is no list of as many numbers as there are resolutions, all at least 1, that add up to the
                number of blocks.
        """
        words = text.replace(" ", "").removeprefix("[").removesuffix("]").split(",")
        counts = [int(word) for word in words if word.isdecimal()]
        levels, blocks = self.rules.pools + 1, len(self.rules.choices) + 1
        if len(counts) != len(words) or len(counts) != levels or min(counts) < 1 or sum(counts) != blocks:
            raise InputError(
                f"{text!r} is no architecture of this resnet_pooling. Give {levels} numbers of at least 1 with the sum "
                f"{blocks}, such as {self.official_name({})}."
            )
        pools = set(itertools.accumulate(counts[:-1]))
        return Subnet({_name(index): int(index in pools) for index in range(1, blocks)})


@search_space(
    source="Balanced Mixture of SuperNets (Javan Roshtkhari et al., AutoML 2023)",
    data="cifar10",
    input_shape=(3, 32, 32),
    tiny={"base": 4, "blocks": (2, 2, 1), "num_classes": 4},
    tiny_input_shape=(3, 8, 8),
    published="36 architectures; CIFAR-10 90.52 % at [4,3,3], best 92.01 % at [7,1,2]",
)
def resnet_pooling(
    num_classes: int = 10, in_channels: int = 3, base: int = 16, blocks: Sequence[int] = (4, 3, 3), affine: bool = True
) -> PoolingResNet:
    """The space's network; arguments as :class:`PoolingResNet`."""
    return PoolingResNet(num_classes, in_channels, base, blocks, affine)
