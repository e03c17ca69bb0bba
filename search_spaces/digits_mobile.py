"""``digits_mobile``: an inverted-residual network for 8x8 digits.

Source: the blocks of MobileNetV2 (Sandler et al. 2018) with the elastic dimensions of Once-for-All (Cai et al. 2020),
scaled to scikit-learn's digits. Size: 979,776 architectures; with 2..8 bits for every layer and tensor 1.8e43 subnets.
Default data: ``digits``.
"""

from __future__ import annotations

from torch import Tensor, nn

from nasq import Choice, elastic
from nasq.plugins import search_space
from nasq.space import Expression

__all__ = ["DigitsMobile", "digits_mobile"]


class InvertedResidual(nn.Module):
    """Expand (1x1), depthwise (k x k), project (1x1); a shortcut where the shape stays."""

    def __init__(
        self, name: str, channels: int | Expression, out: int | Expression, stride: int, kernels: tuple[int, ...]
    ) -> None:
        super().__init__()
        kernel = Choice(f"{name}.kernel", kernels) if len(kernels) > 1 else kernels[0]
        hidden = Choice(f"{name}.expand", (1, 2, 3)) * channels
        self.shortcut = stride == 1 and channels is out
        self.expand = _conv(channels, hidden, 1)
        self.depthwise = _conv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = _conv(hidden, out, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out, H', W']``."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


def _conv(
    in_channels: int | Expression,
    out: int | Expression,
    kernel: int | Expression,
    stride: int = 1,
    groups: int | Expression = 1,
    act: bool = True,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        elastic.Conv2d(in_channels, out, kernel, stride, groups=groups, bias=False),
        elastic.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


class Stage(nn.Module):
    """One block that changes the shape, then up to two that do not, then a convolution or nothing."""

    def __init__(self, name: str, channels: int | Expression, out: Choice, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.first = InvertedResidual(f"{name}.first", channels, out, 2, kernels)
        blocks = [InvertedResidual(f"{name}.{index}", out, out, 1, kernels) for index in range(2)]
        self.rest = elastic.Repeat(blocks, Choice(f"{name}.depth", (1, 2)))
        self.mix = elastic.OneOf(Choice(f"{name}.mix", ("skip", "conv")), skip=nn.Identity(), conv=_conv(out, out, 3))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out, H', W']``."""
        return self.mix(self.rest(self.first(x)))  # type: ignore[no-any-return]


class DigitsMobile(nn.Module):
    """Stem, two stages, head.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the input.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        widths = [Choice("stem.width", (16, 24, 32)), Choice("stage1.width", (32, 48, 64)),
                  Choice("stage2.width", (64, 96, 128))]  # fmt: skip
        self.stem = _conv(in_channels, widths[0], 3)
        self.stage1 = Stage("stage1", widths[0], widths[1], kernels=(3, 5))
        # On maps of 2x2 a larger kernel than 3 would only see padding.
        self.stage2 = Stage("stage2", widths[1], widths[2], kernels=(3,))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = elastic.Linear(widths[2], num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to logits ``[N, num_classes]``."""
        x = self.stage2(self.stage1(self.stem(x_NCHW)))
        return self.head(self.pool(x).flatten(1))  # type: ignore[no-any-return]


@search_space(
    source="blocks of MobileNetV2 (Sandler et al. 2018), elastic as in Once-for-All (Cai et al. 2020)",
    data="digits",
    input_shape=(1, 8, 8),
)
def digits_mobile(num_classes: int = 10, in_channels: int = 1) -> DigitsMobile:
    """The space's network; see the module's docstring."""
    return DigitsMobile(num_classes, in_channels)
