"""``group_conv``: MobileNet and ResNeXt whose 3x3 convolutions choose their groups.

Source: E2GC (Jha et al., VLSI Design 2020) on MobileNet-V1 (Howard et al. 2017) and ResNeXt-50 (Xie et al. 2017). A
convolution in groups is described either by the *size* of a group (channels in each of them; E2GC holds it constant
through the network) or by their *number* (ResNeXt: 32 everywhere). Both kinds of options are here, per block or one for
the whole network. Published: with a constant size, 10.8 % (MobileNet-V1) and 4.73 % (ResNeXt-50) more work per joule on a
P100 at like computation. Default data: ``image_folder`` (ImageNet, 224 x 224).

=====================================================  ===============  ========================================
network                                                architectures    known network inside
=====================================================  ===============  ========================================
``family="mobilenet"``, sizes 1, 2, 4, 8, 16, 32       6^13 = 1.31e10   all 1: MobileNet-V1, 4.2 M parameters
``family="resnext"``, sizes 4, 8, 16, 32               4^16 = 4.29e9    numbers 32: ResNeXt-50 32x4d, 25.0 M
``tied=True``: one choice for the whole network        6, 4             E2GC
=====================================================  ===============  ========================================

Why the size matters. A grouped convolution of ``M`` channels in groups of ``G`` on a map of ``S x S`` computes ``M G k^2
S^2`` multiply-adds and moves ``2 M S^2 + M G k^2`` numbers: each number that is moved is used about ``G k^2 / 2`` times.
With a constant ``G`` that is the same in all layers of a network; with a constant number of groups, ``G`` is ``M`` over that
number and grows with the layers' widths. :class:`DataMovement` counts both exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel
from nasq.elastic.flow import Flow, example_inputs
from nasq.elastic.graph import Node
from nasq.elastic.rules import Bools, Sized, work_rule
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Expression

__all__ = ["DataMovement", "GroupMobileNet", "GroupResNeXt", "Grouping", "group_conv"]

_MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Width and stride of every block of MobileNet-V1."""
_OPTIONS = {"mobilenet": (1, 2, 4, 8, 16, 32), "resnext": (4, 8, 16, 32)}


class Grouping:
    """How convolutions are grouped.

    Args:
        by: ``"size"``: options are channels per group; ``"count"``: numbers of groups.
        options: At least one; a single one is no choice. Any order.
        tied: Whether the whole network has one choice; otherwise every block has its own.

    Raises:
        InputError: ``by`` is unknown, or an option is not a whole number of at least 1.
    """

    def __init__(self, by: Literal["size", "count"], options: Sequence[int], tied: bool = False) -> None:
        if by not in ("size", "count"):
            raise choose_from("kind of grouping", str(by), ("size", "count"))
        if not options or not all(isinstance(option, int) and option >= 1 for option in options):
            raise InputError(f"the options of a grouping are {list(options)}. Give whole numbers of at least 1.")
        # From the smallest network to the largest: small groups, many groups.
        self.by, self.options, self.tied = by, sorted(set(options), reverse=by == "count"), tied

    def groups(self, block: str, channels: int) -> int | Expression:
        """The number of groups of a convolution.

        Args:
            block: Name of the block.
            channels: Input and output channels.

        Raises:
            InputError: An option does not divide the channels.
        """
        for option in self.options:
            if channels % option:
                raise InputError(
                    f"{block!r} has {channels} channels, which the group {self.by} {option} does not divide. Leave this "
                    "option out, or change the width."
                )
        name = "group_" + self.by if self.tied else f"{block}.group_{self.by}"
        choice = self.options[0] if len(self.options) == 1 else Choice(name, self.options)
        return channels // choice if self.by == "size" else choice


def _conv(channels: int, out: int, kernel: int, stride: int = 1, groups: int | Expression = 1) -> nn.Sequential:
    conv = elastic.Conv2d(channels, out, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(conv, elastic.BatchNorm2d(out))


class GroupMobileNet(nn.Module):
    """MobileNet-V1 with grouped convolutions in place of the depthwise ones.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        grouping: Of the 3x3 convolutions behind the stem.
        width: Multiplies all widths.
        blocks: How many of the 13 blocks the network has.
    """

    def __init__(
        self, num_classes: int, in_channels: int, grouping: Grouping, width: float = 1.0, blocks: int = 13
    ) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [_conv(in_channels, channels, 3, 2), nn.ReLU(inplace=True)]
        for index, (wide, stride) in enumerate(_MOBILENET[:blocks]):
            out = int(wide * width)
            layers += [
                _conv(channels, channels, 3, stride, grouping.groups(f"block{index}", channels)),
                nn.ReLU(inplace=True),
            ]
            layers += [_conv(channels, out, 1), nn.ReLU(inplace=True)]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        return self.classifier(self.pool(self.layers(x_NCHW)).flatten(1))  # type: ignore[no-any-return]


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution, added to the input or its projection."""

    def __init__(self, channels: int, out: int, inner: int, stride: int, groups: int | Expression) -> None:
        super().__init__()
        self.reduce, self.grouped = _conv(channels, inner, 1), _conv(inner, inner, 3, stride, groups)
        self.expand = _conv(inner, out, 1)
        self.shortcut = nn.Identity() if stride == 1 and channels == out else _conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H', W']``."""
        y = self.expand(F.relu(self.grouped(F.relu(self.reduce(x)))))
        return F.relu(y + self.shortcut(x))


class GroupResNeXt(nn.Module):
    """ResNeXt-50 whose grouped convolutions choose their groups.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        grouping: Of the 3x3 convolutions behind the stem.
        width: Multiplies all widths.
        blocks: Of each of the four stages.
    """

    def __init__(
        self, num_classes: int, in_channels: int, grouping: Grouping, width: float = 1.0,
        blocks: Sequence[int] = (3, 4, 6, 3),
    ) -> None:  # fmt: skip
        super().__init__()
        channels = int(64 * width)
        self.stem = _conv(in_channels, channels, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers: list[nn.Module] = []
        for stage, count in enumerate(blocks):
            inner, out = int(128 * 2**stage * width), int(256 * 2**stage * width)
            for index in range(count):
                groups = grouping.groups(f"stage{stage + 1}.{index}", inner)
                layers.append(ResNeXtBlock(channels, out, inner, 2 if stage and index == 0 else 1, groups))
                channels = out
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.layers(self.maxpool(F.relu(self.stem(x_NCHW))))
        return self.classifier(self.pool(x).flatten(1))  # type: ignore[no-any-return]


class _Movement(Flow):
    """Adds up what layers with weights read and write, and remembers it layer by layer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.moved = np.zeros(self.count, dtype=np.int64)
        self.macs = np.zeros(self.count, dtype=np.int64)
        self.layers: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def visit(self, node: Node, inputs: list[Sized], output: Sized, running: Bools) -> None:
        rule = work_rule(node.kind)
        work = rule(self, node, inputs, output) if rule is not None else None
        if work is None or work.rows is None or work.row is None:
            return
        moved = np.where(running, inputs[0].numel + work.rows * work.row + output.numel, 0)
        macs = np.where(running, work.macs, 0)
        self.moved += moved
        self.macs += macs
        self.layers[node.path] = (moved, macs)


class DataMovement:
    """What subnets move between memory and arithmetic: a model, not a measurement.

    Every convolution and linear layer reads its input once, its weights once, and writes its output once, for each image
    alone (a batch of one); activation functions, batch normalisations and sums are parts of the layers they follow.
    It is the least that a machine moves that keeps nothing between two layers. The arithmetic intensity, multiply-adds per
    number moved, is E2GC's degree of data reuse.

    Args:
        supernet: Of any network.
        example: An input ``[N, ...]``; not needed for a quantized network.
    """

    def __init__(self, supernet: Supernet, example: Tensor | None = None) -> None:
        self.space, self.graph = supernet.space, CostModel(supernet, example).graph

    def _run(self, rows: NDArray[np.int16]) -> _Movement:
        flow = _Movement(self.space, rows)
        flow.run(self.graph, example_inputs(flow, self.graph), np.ones(len(rows), dtype=bool))
        return flow

    def moved(self, rows: NDArray[np.int16]) -> NDArray[np.float64]:
        """Numbers (not bytes) moved per image by the subnets ``rows`` ``[n, choices]``; for an objective on rows."""
        return self._run(rows).moved.astype(np.float64)

    def reuse(self, rows: NDArray[np.int16]) -> NDArray[np.float64]:
        """Multiply-adds per number moved of the subnets ``rows``; larger is better. For an objective on rows."""
        flow = self._run(rows)
        return np.asarray(flow.macs / np.maximum(flow.moved, 1), dtype=np.float64)

    def by_layer(self, rows: NDArray[np.int16]) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Numbers moved and multiply-adds of every layer, by its path: int64 ``[n]`` each, 0 where it does not run."""
        return self._run(rows).layers


@search_space(
    source="E2GC (Jha et al. 2020) on MobileNet-V1 and ResNeXt-50",
    data="image_folder",
    input_shape=(3, 224, 224),
    tiny={"options": (1, 2, 4), "width": 0.25, "blocks": 4, "num_classes": 4},
    tiny_input_shape=(3, 32, 32),
    published="constant group size: 10.8 % (MobileNet-V1), 4.73 % (ResNeXt-50) more energy-efficient on a P100",
)
def group_conv(
    num_classes: int = 1000, in_channels: int = 3, family: Literal["mobilenet", "resnext"] = "mobilenet",
    by: Literal["size", "count"] = "size", options: Sequence[int] = (), tied: bool = False, width: float = 1.0,
    blocks: int | Sequence[int] = (),
) -> GroupMobileNet | GroupResNeXt:  # fmt: skip
    """The space's network.

    Args:
        num_classes, in_channels: Of the data.
        family: ``"mobilenet"`` or ``"resnext"``.
        by, options, tied: See :class:`Grouping`; without options, those of the table above.
        width: Multiplies all widths.
        blocks: How many blocks the network has (MobileNet: a number; ResNeXt: one per stage); without, all.

    Raises:
        InputError: The family or the grouping is unknown, or an option does not divide a width.
    """
    if family not in _OPTIONS:
        raise choose_from("family of networks", str(family), _OPTIONS)
    grouping = Grouping(by, options or _OPTIONS[family], tied)
    if family == "resnext":
        stages = (3, 4, 6, 3) if isinstance(blocks, int) or not blocks else blocks
        return GroupResNeXt(num_classes, in_channels, grouping, width, stages)
    return GroupMobileNet(num_classes, in_channels, grouping, width, blocks if isinstance(blocks, int) else 13)
