"""Other spellings of known operations: what is recorded, and that it computes what the network computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.elastic.conv import padding_of
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant import quantize


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, and what a test does behind it."""

    def __init__(self, then: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 8, 3, padding=1), then
        self.scale = nn.Parameter(noise(8, 1, 1))
        self.register_buffer("mean", noise(1, 8, 1, 1))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.then(self, self.conv(x))
        return y


def kinds(net: nn.Module, x: Tensor) -> list[str]:
    return [node.kind for node in trace(net, x).nodes if node.kind not in {"input", "conv"}]


def check(net: nn.Module, x: Tensor, expected: list[str] | None = None) -> None:
    """The kinds that are recorded, and that the traced form computes the same (``quantize`` refuses what does not)."""
    net.eval()
    if expected is not None:
        assert kinds(net, x[:1]) == expected
    network = quantize(net, x[:1], weight_bits=(8,), activation_bits=(8,)).eval()
    with torch.no_grad():
        assert torch.allclose(network(x, mode="float"), net(x), rtol=1e-5, atol=1e-5)


def gate(x: Any) -> Any:
    return x.mean((2, 3)).sigmoid()


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (lambda net, x: x.clamp(0, 6), ["relu6"]),
        (lambda net, x: torch.clamp(x, min=0), ["relu"]),
        (lambda net, x: x.clamp(max=0.5), ["unary"]),
        (lambda net, x: torch.relu_(x), ["relu"]),
        (lambda net, x: x**2, ["unary"]),
        (lambda net, x: -x, ["scale"]),
        (lambda net, x: 1 - x, ["scale", "unary"]),
        (lambda net, x: torch.rsub(x, 1), ["scale", "unary"]),
        (lambda net, x: (x - net.mean) / net.scale, ["parameter", "add", "parameter", "mul"]),
        (lambda net, x: x - x.mean(1, keepdim=True), ["mean", "scale", "add"]),
        (lambda net, x: F.glu(x, 1), ["slice", "slice", "unary", "mul"]),
        (lambda net, x: x.clone().to(torch.float32), ["identity", "identity"]),
        (lambda net, x: torch.cat(tensors=(x, x), axis=1), ["concat"]),
        (lambda net, x: F.adaptive_avg_pool2d(x, (4, None)), ["avg_pool"]),
        (lambda net, x: F.adaptive_avg_pool2d(x, 8), []),
        (lambda net, x: F.adaptive_max_pool2d(x, 1), ["max_pool"]),
        (lambda net, x: x.amax((-1, -2)), ["max_pool", "reshape"]),
        (lambda net, x: F.interpolate(x, size=x.shape[-1] * 2), ["upsample"]),
        (lambda net, x: F.interpolate(x, size=(16, 24), mode="bilinear"), ["resize"]),
        (lambda net, x: F.interpolate(x, scale_factor=1.5, mode="bilinear"), ["resize"]),
        (lambda net, x: F.interpolate(x, size=x.shape[2:]), []),
        (lambda net, x: F.pixel_shuffle(x, 2), ["view", "permute", "view"]),
        (lambda net, x: nn.ReLU()(x), ["relu"]),
        (lambda net, x: x.view(x.shape[0], np.prod(x.shape[1:])), ["reshape"]),
    ],
)
def test_other_spellings(then: Any, expected: list[str]) -> None:
    check(Net(then), noise(3, 3, 8, 8), expected)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.PixelShuffle(2), ["view", "permute", "view"]),
        (nn.PixelUnshuffle(2), ["view", "permute", "view"]),
        (nn.ChannelShuffle(4), ["view", "permute", "view"]),
        (nn.AdaptiveAvgPool2d(2), ["avg_pool"]),
        (nn.AdaptiveMaxPool2d((2, None)), ["max_pool"]),
        (nn.Upsample(scale_factor=2, mode="bilinear"), ["resize"]),
        (nn.Upsample(size=(16, 16)), ["upsample"]),
        (nn.GLU(1), ["slice", "slice", "unary", "mul"]),
        (nn.PReLU(), ["parameter", "relu", "unary", "mul", "add"]),
        (nn.PReLU(8), ["parameter", "relu", "unary", "mul", "add"]),
        (type("Mine", (nn.BatchNorm2d,), {})(8), ["norm"]),
        (type("Mine", (nn.LayerNorm,), {})(8), ["layer_norm"]),
    ],
)
def test_layers_that_are_calls(layer: nn.Module, expected: list[str]) -> None:
    check(Net(lambda net, x: net.layer(x), layer=layer), noise(3, 3, 8, 8), expected)


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x: gate(x).view(x.size(0), x.size(1), 1, 1).expand_as(x),
        lambda x: gate(x)[:, :, None, None],
        lambda x: gate(x).unsqueeze(-1).unsqueeze(-1).expand(-1, -1, x.shape[2], x.shape[3]),
        lambda x: torch.unsqueeze(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(2), 2)[..., None].sigmoid(),
    ],
)
def test_squeeze_and_excite_as_people_write_it_with_an_elastic_width(repeat: Any) -> None:
    class Excite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = Choice("width", (4, 8))
            self.conv, self.head = elastic.Conv2d(3, width, 3), elastic.Linear(width, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            y: Tensor = self.head((x * repeat(x)).mean((2, 3)))
            return y

    net, x = Excite().eval(), noise(3, 3, 8, 8)
    network = quantize(net, x[:1], weight_bits=(8,), activation_bits=(8,)).eval()
    plain, traced = Supernet(net), Supernet(network)
    for subnet in (plain.space.smallest(), plain.space.largest()):
        with torch.no_grad(), plain.activate(subnet), traced.activate({**traced.space.default(), **subnet}):
            assert torch.allclose(traced(x, mode="float"), plain(x), atol=1e-6)


def test_an_expansion_that_is_more_than_a_repetition_stays_and_is_refused() -> None:
    net = Net(lambda net, x: torch.cat((x.mean(1, keepdim=True).expand_as(x), x), 1))
    with pytest.raises(InputError, match=r"expand_as at 'expand_as' has no integer form"):
        quantize(net, noise(1, 3, 8, 8))


@pytest.mark.parametrize("size", [8, 12])
def test_upsampling_goes_with_the_resolution(size: int) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resize, self.down = elastic.Resize(Choice("side", (8, 12))), nn.Conv2d(3, 4, 2, 2)
            self.up, self.head = nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(11, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.resize(x)
            y = self.down(x)
            made: Tensor = self.head(torch.cat((self.up(y), F.interpolate(y, size=x.shape[2:], mode="bilinear"), x), 1))
            return made

    net, x = Skip().eval(), noise(2, 3, 12, 12)
    supernet = Supernet(quantize(net, x[:1], weight_bits=(8,), activation_bits=(8,))).eval()
    with torch.no_grad(), supernet.activate({"side": size}):
        assert supernet(x, mode="float").shape == (2, 2, size, size)


def test_a_buffer_that_is_subtracted_is_read_anew() -> None:
    net, x = Net(lambda net, x: x - net.mean).eval(), noise(2, 3, 8, 8)
    network = quantize(net, x[:1], weight_bits=(8,), activation_bits=(8,)).eval()
    before = network(x, mode="float")
    network.mean.add_(1.0)
    assert torch.allclose(network(x, mode="float"), before - 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (
            lambda net, x: x.log_softmax(1),
            r"log_softmax at 'log_softmax' has no integer form yet: let the network return",
        ),
        (lambda net, x: x.mean((2, 3)).squeeze(), r"squeeze at 'squeeze' has no integer form yet: name the dimensions"),
        (lambda net, x: net.norm(x), r"BatchNorm2d at 'norm' has no integer form yet: it keeps no running statistics"),
        (lambda net, x: net.same(x), r"Conv2d at 'same' has no integer form yet: it pads .* equally on both sides"),
        (
            lambda net, x: F.conv2d(x, net.same.weight),
            r"conv2d at 'conv2d' has no integer form yet: .* no layer owns it",
        ),
        (lambda net, x: net.mine(x), r"Mine at 'mine' has no integer form yet: write an elastic module of your own as"),
        (lambda net, x: x.view(1, -1), r"view at 'view' has no integer form yet: the batch has to stay the first"),
        (lambda net, x: x[:, 0].log(), r"log at 'log' has no integer form yet\. Supported: Conv2d"),
        (lambda net, x: nn.Conv2d(8, 8, 1)(x), r"its forward makes a Conv2d: make it in __init__"),
        (lambda net, x: net.relu(x) + x, r"'relu' changes its input in place, and that is read again behind it"),
        (lambda net, x: x.view(-1, 8 * 64)[:2].view(x.size(0), 8, 8, 8), r"getitem at 'getitem' has no integer form"),
    ],
)
def test_what_is_refused_says_what_to_do(then: Any, message: str) -> None:
    class Mine(elastic.ElasticModule):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net = Net(
        then, norm=nn.BatchNorm2d(8, track_running_stats=False), same=nn.Conv2d(8, 8, 2, padding="same"), mine=Mine(),
        relu=nn.ReLU(inplace=True),
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        quantize(net, noise(1, 3, 8, 8))


def test_a_fixed_size_under_a_choice_names_the_subnet() -> None:
    width = Choice("width", (4, 8))
    net = nn.Sequential(elastic.Conv2d(3, width, 8, padding=0), nn.Flatten(), elastic.Linear(width, 2))

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.net[2](self.net[0](x).view(-1, 8))
            return y

    with pytest.raises(InputError, match=r'Fixed runs on the example, and not .* as the subnet \{"width":4\}: shape'):
        quantize(Fixed(), noise(1, 3, 8, 8))


def test_padding_same_is_padding_by_numbers() -> None:
    conv = nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1))
    assert padding_of(conv) == (2, 2)
    assert padding_of(nn.Conv2d(3, 4, 3, padding="valid")) == (0, 0)
    assert padding_of(nn.Conv2d(3, 4, 4, padding="same")) is None
    assert math.prod(conv(noise(1, 3, 8, 8)).shape) == 4 * 64


class Doubled(elastic.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Gated(elastic.Conv2d):
    """A weight of one's own belongs into ``active_weight``."""

    def active_weight(self) -> Tensor:
        return super().active_weight() * 0.5


def test_an_elastic_layer_of_ones_own() -> None:
    width, x = Choice("width", (4, 8)), noise(2, 3, 6, 6)
    check(nn.Sequential(Gated(3, width, 3), nn.ReLU()), x, ["relu"])
    net = nn.Sequential(elastic.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Doubled(width, 2))
    with pytest.raises(
        InputError, match=r"the layer '3' has a forward of its own, Doubled\.forward, and is quantized as"
    ):
        quantize(net, x)


def test_a_choice_decides_nothing_in_python() -> None:
    deep = Choice("deep", (False, True))
    with pytest.raises(InputError, match=r"'deep' has no value while a network is built.*OneOf"):
        nn.Sequential(*[nn.ReLU()] if deep else [])
    with pytest.raises(InputError, match=r"OneOf was given 'op' as its choice\. Give nasq\.Choice\(name, \('a',\)\)"):
        elastic.OneOf("op", a=nn.Identity())  # type: ignore[arg-type]
