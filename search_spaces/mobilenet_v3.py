"""``mobilenet_v3``: the space of Once-for-All around MobileNetV3.

Source: Cai et al. 2020 (Once-for-All), with the released network's sizes. Five stages of 2, 3 or 4 inverted residual
blocks, each with its own kernel (3, 5, 7; the smaller ones by learned transforms) and expansion (3, 4, 6), and the
resolution. Size: 7371^5 = 2.18e19 architectures, times 25 resolutions from 128 to 224. Default data: ImageNet.

================  ==============================================================================
published         paper: 7.7 M parameters shared by all subnets; here the largest subnet of width 1.0 has
                  7,664,760 and 566,170,656 multiply-adds at 224 pixels (the counters of the extracted network)
================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError
from nasq.plugins import search_space
from nasq.space import Expression, Option, round_to

__all__ = ["PHASES", "RESOLUTIONS", "MobileNetV3", "mobilenet_v3"]

Size = int | Expression

_STEM = 16
_STAGES = ((24, 2, "relu", False), (40, 2, "relu", True), (80, 2, "hswish", False), (112, 1, "hswish", True),
           (160, 2, "hswish", True))  # fmt: skip
"""Width, stride, activation and squeeze-excite of every stage."""
_TAIL = (960, 1280)

RESOLUTIONS = tuple(range(128, 225, 4))
"""The published sides of images."""

PHASES: tuple[tuple[str, dict[str, tuple[int, ...]], int], ...] = (
    ("kernel", {"kernel": (3, 5, 7)}, 120),
    ("depth 1", {"depth": (3, 4)}, 25),
    ("depth 2", {"depth": (2, 3, 4)}, 120),
    ("expand 1", {"expand": (4, 6)}, 25),
    ("expand 2", {"expand": (3, 4, 6)}, 120),
)
"""The published progressive shrinking: name, options allowed from there on (by the last word of the choices' names) and
epochs of each phase, the largest network being trained before. Arguments of :class:`nasq.training.shrinking.Phase`.

Channels are sorted where an ``expand`` phase begins: ``network.sort_channels()`` before the first one,
``network.sort_channels(fixed=(4,))`` before the second."""


def _conv(
    channels: Size, out: Size, kernel: Size = 1, stride: int = 1, groups: Size = 1, act: str = "", **options: bool
) -> nn.Sequential:
    layers: list[nn.Module] = [
        elastic.Conv2d(channels, out, kernel, stride, groups=groups, bias=False, **options),
        elastic.BatchNorm2d(out),
    ]
    if act:
        layers.append(nn.ReLU(inplace=True) if act == "relu" else nn.Hardswish(inplace=True))
    return nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Scales channels by a function of their means: two 1x1 convolutions around a quarter of the width."""

    def __init__(self, channels: Size) -> None:
        super().__init__()
        reduced = round_to(channels // 4, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = elastic.Conv2d(channels, reduced, 1)
        self.expand = elastic.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]``, unchanged."""
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (k x k), squeeze-excite, project (1x1); a shortcut where the shape stays.

    Args:
        channels, out: Widths, fixed in a network.
        hidden: Inner width; there is no expansion layer where it is ``channels``.
        kernel: Of the depthwise convolution; the smaller ones of a choice are transforms of the largest.
        stride: Of the depthwise convolution.
        act: ``"relu"`` or ``"hswish"``.
        squeeze: Whether it has a squeeze-excite.
    """

    def __init__(
        self, channels: int, out: int, hidden: Size, kernel: Size, stride: int, act: str, squeeze: bool
    ) -> None:
        super().__init__()
        self.channels, self.shortcut = channels, stride == 1 and channels == out
        self.expand = nn.Identity() if hidden is channels else _conv(channels, hidden, act=act)
        learned = isinstance(kernel, Choice)
        self.depthwise = _conv(hidden, hidden, kernel, stride, hidden, act, kernel_transform=learned)
        self.squeeze = SqueezeExcite(hidden) if squeeze else nn.Identity()
        self.project = _conv(hidden, out)

    def sort_channels(self, fixed: Sequence[int], optimizer: Optimizer | None) -> None:
        """Sorts the inner channels; see :meth:`MobileNetV3.sort_channels`. ``fixed`` are inner widths."""
        makers, readers = [*self.expand.children(), *self.depthwise.children()], [self.project[0]]
        if isinstance(self.squeeze, SqueezeExcite):
            squeeze = self.squeeze
            makers, readers = [*makers, squeeze.expand], [*readers, squeeze.reduce]
            inner = [int(round_to(width // 4, 8)) for width in fixed]  # type: ignore[arg-type]
            elastic.sort_channels([squeeze.reduce], [squeeze.expand], inner, optimizer)
        makers = [part for part in makers if isinstance(part, elastic.Conv2d | elastic.BatchNorm2d)]
        elastic.sort_channels(makers, readers, fixed, optimizer)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, out, H', W']``."""
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y  # type: ignore[no-any-return]


def _option(name: str, options: Sequence[int]) -> Choice | int:
    return options[0] if len(options) == 1 else Choice(name, options)


class MobileNetV3(nn.Module):
    """Stem, a fixed first block, five elastic stages, a wide 1x1 convolution, pooling, feature mixing, classifier.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
        width: Multiplies all widths (published: 1.0 and 1.2), rounded to multiples of 8.
        kernels, expansions, depths: Options of every block and stage, from the smallest to the largest; one alone is no
            choice.
        stages: How many of the five stages the network has; fewer for small experiments.
        resolutions: Sides to which images are resized (:class:`nasq.elastic.Resize`); none takes them as they are.
    """

    def __init__(
        self, num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, kernels: Sequence[int] = (3, 5, 7),
        expansions: Sequence[int] = (3, 4, 6), depths: Sequence[int] = (2, 3, 4), stages: int = 5,
        resolutions: Sequence[int] = RESOLUTIONS,
    ) -> None:  # fmt: skip
        super().__init__()
        if not width > 0 or not 1 <= stages <= len(_STAGES):
            raise InputError(
                f"mobilenet_v3 was given the width {width} and {stages} stages. Give a width above 0 and 1 to "
                f"{len(_STAGES)} stages."
            )

        def scaled(channels: int) -> int:
            return int(round_to(channels * width, 8))  # type: ignore[arg-type]

        self.options = {"d": tuple(depths), "e": tuple(expansions), "ks": tuple(kernels)}
        self.resize: nn.Module = nn.Identity()
        if resolutions:
            self.options["r"] = tuple(resolutions)
            self.resize = elastic.Resize(_option("resolution", resolutions))
        channels = scaled(_STEM)
        self.stem = _conv(in_channels, channels, 3, 2, act="hswish")
        self.first = InvertedResidual(channels, channels, channels, 3, 1, "relu", False)
        self.stages = nn.Sequential()
        for number, (wide, stride, act, squeeze) in enumerate(_STAGES[:stages], 1):
            name, out = f"stage{number}", scaled(wide)
            blocks = []
            for index in range(max(depths)):
                kernel = _option(f"{name}.{index}.kernel", kernels)
                hidden = round_to(_option(f"{name}.{index}.expand", expansions) * channels, 8)
                blocks.append(
                    InvertedResidual(channels, out, hidden, kernel, stride if index == 0 else 1, act, squeeze)
                )
                channels = out
            self.stages.append(elastic.Repeat(blocks, _option(f"{name}.depth", depths)))
        expanded, mixed = (scaled(wide) for wide in _TAIL)
        self.final_expand = _conv(channels, expanded, act="hswish")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.feature_mix = nn.Sequential(nn.Conv2d(expanded, mixed, 1, bias=False), nn.Hardswish(inplace=True))
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(mixed, num_classes))
        _initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.final_expand(self.stages(self.first(self.stem(self.resize(x_NCHW)))))
        return self.classifier(self.feature_mix(self.pool(x)).flatten(1))  # type: ignore[no-any-return]

    def sort_channels(self, fixed: Sequence[int] = (), optimizer: Optimizer | None = None) -> None:
        """Puts the inner channels of every elastic block in the order of their importance; no function changes.

        Importance is the L1 norm of the projection's weights (Once-for-All). Do it before the network is quantized.

        Args:
            fixed: Expansions that are in use already: their sets of channels, and so their functions, stay.
            optimizer: Its momentum of the moved weights is moved with them.
        """
        for stage in self.stages:
            assert isinstance(stage, elastic.Repeat)
            for block in stage.blocks:
                assert isinstance(block, InvertedResidual)
                block.sort_channels([expansion * block.channels for expansion in fixed], optimizer)

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """The architecture as Once-for-All writes it, such as ``d=2-3,e=3-4-6-6-3-4-6-6,ks=3-5-7-7-7-5-3-7,r=224``.

        ``e`` and ``ks`` have a number for every block, those beyond the depth included: there it is the largest option.
        """
        parts = []
        for key, options in self.options.items():
            numbers = [subnet.get(name, options[-1]) for name, _ in self._places(key)]
            parts.append(f"{key}={'-'.join(map(str, numbers))}")
        return ",".join(parts)

    def from_official_name(self, text: str) -> Subnet:
        """The subnet that :meth:`official_name` calls ``text``.

        Raises:
            InputError: It is no such text, or its numbers are not options of this network.
        """
        given = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
        if set(given) != set(self.options):
            raise InputError(
                f"{text[:80]!r} is no architecture of this mobilenet_v3. Give {', '.join(self.options)}, as in "
                f"{self.official_name({})!r}."
            )
        numbers = {key: self._numbers(key, given[key]) for key in self.options}
        found: dict[str, Option] = {}
        for key, options in self.options.items():
            for (name, (stage, index)), option in zip(self._places(key), numbers[key], strict=True):
                if len(options) > 1 and index < (numbers["d"][stage] if key in ("e", "ks") else 1):
                    found[name] = option
        return Subnet(found)

    def _places(self, key: str) -> list[tuple[str, tuple[int, int]]]:
        """The choices of one kind in the order of the text, each with its stage and block."""
        if key == "r":
            return [("resolution", (0, 0))]
        blocks = max(self.options["d"]) if key != "d" else 1
        places = [(stage, index) for stage in range(len(self.stages)) for index in range(blocks)]
        word = {"d": "depth", "e": "expand", "ks": "kernel"}[key]
        return [(f"stage{s + 1}.{word}" if key == "d" else f"stage{s + 1}.{i}.{word}", (s, i)) for s, i in places]

    def _numbers(self, key: str, text: str) -> list[int]:
        """The numbers of one kind, checked."""
        words, count, allowed = text.split("-"), len(self._places(key)), self.options[key]
        if len(words) != count or not all(word.isdecimal() and int(word) in allowed for word in words):
            raise InputError(
                f"{key}={text} is not possible in this mobilenet_v3. Give {count} numbers out of "
                f"{', '.join(map(str, allowed))}, with '-' between them."
            )
        return [int(word) for word in words]


def _initialise(network: nn.Module) -> None:
    """He initialisation of the convolutions by their outputs, as in the released code."""
    for part in network.modules():
        if isinstance(part, elastic.Conv2d | nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


@search_space(
    source="Once-for-All (Cai et al. 2020), the MobileNetV3 space",
    data="image_folder",
    input_shape=(3, 224, 224),
    tiny={
        "width": 0.25,
        "kernels": (3, 5),
        "expansions": (2, 3),
        "depths": (1, 2),
        "stages": 2,
        "num_classes": 4,
        "resolutions": (24, 32),
    },
    tiny_input_shape=(3, 32, 32),
    published="7371^5 = 2.18e19 architectures at 25 resolutions; 7.7 M parameters shared by all (Cai et al. 2020)",
)
def mobilenet_v3(
    num_classes: int = 1000, in_channels: int = 3, width: float = 1.0, kernels: Sequence[int] = (3, 5, 7),
    expansions: Sequence[int] = (3, 4, 6), depths: Sequence[int] = (2, 3, 4), stages: int = 5,
    resolutions: Sequence[int] = RESOLUTIONS,
) -> MobileNetV3:  # fmt: skip
    """The space's network; arguments as :class:`MobileNetV3`."""
    return MobileNetV3(num_classes, in_channels, width, kernels, expansions, depths, stages, resolutions)
