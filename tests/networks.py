"""Small networks that the tests of several packages share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.data import DataSet, Split
from nasq.quant import QuantizedNetwork, calibrate, quantize

IMAGE = (3, 8, 8)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, seed: int = 0, shape: tuple[int, ...] = IMAGE) -> Tensor:
    """Normalised images ``[count, *shape]``."""
    return torch.randn(count, *shape, generator=generator(seed))


class Inverted(nn.Module):
    """Expand (ReLU6), depthwise, project, residual sum; the hidden width is an expression."""

    def __init__(self, width: Choice, kernel: Choice) -> None:
        super().__init__()
        hidden = Choice("expand", (1, 2)) * width
        self.expand = elastic.Conv2d(width, hidden, 1, bias=False)
        self.bn1 = elastic.BatchNorm2d(hidden)
        self.act1 = nn.ReLU6()
        self.depthwise = elastic.Conv2d(hidden, hidden, kernel, groups=hidden, bias=False)
        self.bn2 = elastic.BatchNorm2d(hidden)
        self.project = elastic.Conv2d(hidden, width, 1, bias=False)
        self.bn3 = elastic.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = torch.relu(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class Block(nn.Module):
    """Convolution, BatchNorm, ReLU, with a choice of its own."""

    def __init__(self, width: Choice, index: int) -> None:
        super().__init__()
        self.conv = elastic.Conv2d(width, width, Choice(f"block{index}.kernel", (1, 3)), bias=index == 1)
        self.bn = elastic.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class TinyNet(nn.Module):
    """Every elastic layer once, on images ``[N, 3, 8, 8]``.

    Holds: tied choices (``width``, ``kernel``), an expression (``expand * width``), a depthwise and a grouped
    convolution, Repeat, OneOf, residual sum, ReLU6, concatenation, max pool, average pool, a BatchNorm alone before a
    convolution, and a layer that is called twice.
    """

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        width, kernel = Choice("width", (4, 6, 8)), Choice("kernel", (1, 3))
        self.stem = elastic.Conv2d(3, width, 3, bias=False)
        self.stem_bn = elastic.BatchNorm2d(width)
        self.inverted = Inverted(width, kernel)
        self.rest = elastic.Repeat([Block(width, index) for index in range(3)], Choice("depth", (1, 2, 3)))
        self.mix = elastic.OneOf(
            Choice("mix", ("conv", "pool", "skip")),
            conv=nn.Sequential(elastic.Conv2d(width, width, kernel, bias=False), elastic.BatchNorm2d(width), nn.ReLU()),
            pool=nn.MaxPool2d(3, 1, 1),
            skip=nn.Identity(),
        )
        self.pre_bn = elastic.BatchNorm2d(width)
        self.grouped = elastic.Conv2d(width, width, 3, stride=Choice("stride", (2, 1)), groups=Choice("groups", (2, 1)))
        self.twice = elastic.Conv2d(width, width, 1)
        self.pool = nn.MaxPool2d(2)
        self.wide = elastic.Conv2d(2 * width, 6, 1, bias=False)
        self.wide_bn = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.head = elastic.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.stem_bn(self.stem(x)))
        y = self.mix(self.rest(self.inverted(y)))
        y = self.grouped(torch.relu(self.pre_bn(y)))
        once = torch.relu(self.twice(y))
        y = torch.cat([once, self.twice(once)], dim=1)
        y = torch.relu(self.wide_bn(self.wide(self.pool(y))))
        y = self.plain(y).mean((2, 3))
        return self.head(self.dropout(y))


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives BatchNorms what training gives them: other means and variances, negative and tiny scales; and biases."""
    rng = generator(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, elastic.BatchNorm2d | nn.BatchNorm2d):
                count = len(part.running_mean)
                part.running_mean.copy_(torch.randn(count, generator=rng) * 0.2)
                part.running_var.copy_(torch.rand(count, generator=rng) + 0.3)
                if part.weight is not None:
                    part.weight.copy_(torch.randn(count, generator=rng) + 0.7)
                    part.bias.copy_(torch.randn(count, generator=rng) * 0.3)
            elif getattr(part, "bias", None) is not None:
                part.bias.copy_(torch.randn(part.bias.shape, generator=rng) * 0.2)
    return module


def tiny(seed: int = 0) -> TinyNet:
    """A :class:`TinyNet` with seeded weights and BatchNorms as after training; in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet()
    randomise(net, seed)
    return net.eval()


def quantized(
    net: nn.Module | None = None, seed: int = 0, shape: tuple[int, ...] = IMAGE, **options: Any
) -> QuantizedNetwork:
    """The calibrated quantized form of ``net`` (default: :func:`tiny`), in evaluation mode."""
    options = {"weight_bits": (2, 4, 8), "activation_bits": (2, 4, 8), **options}
    network = quantize(tiny(seed) if net is None else net, images(1, shape=shape), **options)
    calibrate(network, images(16, seed + 1, shape=shape))
    network.eval()
    return network


def tiny_supernet(seed: int = 0) -> Supernet:
    return Supernet(tiny(seed), "tiny")


def quantized_supernet(seed: int = 0, **options: Any) -> Supernet:
    supernet = Supernet(quantized(seed=seed, **options), "tiny-quantized")
    return supernet.eval()


def tiny_images(n: int) -> DataSet:
    """Random images ``[n, 3, 8, 8]`` of five classes."""
    rng = generator(0)
    parts = [
        Split(torch.randint(0, 256, (size, 3, 8, 8), generator=rng, dtype=torch.uint8), torch.arange(size) % 5)
        for size in (n, 10, 10)
    ]
    return DataSet.from_splits("random", [str(label) for label in range(5)], *parts)
