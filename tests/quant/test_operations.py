"""Every operation of CNNs and transformers, from a torch network to the runtime: no integer may differ on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.deploy import bundle, onnx, parity
from nasq.deploy.reference import Reference
from nasq.errors import InputError
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant import program as p


class OptionA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0))
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.bn, self.act = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), act
        self.reduce, self.expand, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        x = x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        return self.head(x.mean((2, 3)))


class Shuffle(nn.Module):
    """Channel split and shuffle, three-way concatenation, padded pools, nearest upsampling, a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.smaller = nn.AvgPool2d(3, 2, 1)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.pad = nn.ZeroPad2d((1, 0, 0, 1))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(x) - x
        one, other = x.chunk(2, dim=1)
        x = torch.cat([F.relu(self.a(one)), other, self.b(other)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = F.relu(self.up(self.smaller(self.pad(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dw = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8, eps=1e-6), nn.Linear(8, 16), nn.Linear(16, 8)
        self.group, self.head = nn.GroupNorm(1, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return self.head(self.group(x + y).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self, causal: bool = False, pooled: bool = False) -> None:
        super().__init__()
        self.causal, self.pooled = causal, pooled
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 10, 16))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(16, dim=-1)
        q, k, v = (one.reshape(n, t, 2, 8).transpose(1, 2) for one in (q, k, v))
        scores = (q * 8**-0.5) @ k.transpose(-2, -1)
        if self.causal:
            later = torch.ones(t, t, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        x = x + self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, t, c))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        x = self.norm(x)
        return self.head(x.mean(1) if self.pooled else x[:, 0])


NETS = {
    "option_a": OptionA,
    "hardswish": lambda: SqueezeExcite(nn.Hardswish(), nn.Hardsigmoid()),
    "silu": lambda: SqueezeExcite(nn.SiLU(), nn.Sigmoid()),
    "leaky": lambda: SqueezeExcite(nn.LeakyReLU(0.2), nn.Tanh()),
    "elu": lambda: SqueezeExcite(nn.ELU(0.7), nn.Softplus()),
    "shuffle": Shuffle,
    "convnext": ConvNeXtBlock,
    "transformer": Transformer,
    "causal": lambda: Transformer(causal=True, pooled=True),
}


def quantized(name: str, bits: int, count: int = 24) -> tuple[QuantizedNetwork, Tensor]:
    torch.manual_seed(0)
    net = NETS[name]()
    x = torch.randn(count, 3, 12, 12)
    network = quantize(net, x[:1], weight_bits=(bits,), activation_bits=(bits,))
    calibrate(network, x)
    return network.eval(), x


@pytest.mark.parametrize("bits", [8, 5, 3])
@pytest.mark.parametrize("name", NETS)
def test_torch_reference_and_runtime_make_the_same_integers(name: str, bits: int, tmp_path: Path) -> None:
    network, x = quantized(name, bits)
    program = freeze(network)
    bundle.write(tmp_path / "b", program, {parity.MODEL: onnx.export(program)})
    made = Reference(tmp_path / "b").run(x.numpy())
    np.testing.assert_array_equal(network.integers(x).numpy(), made)
    report = parity.check(tmp_path / "b", x.numpy())
    assert report.findings == ()
    assert [str(layer) for layer in report.layers if layer.differing] == []
    assert report.differing == 0
    assert len(np.unique(made)) > 2


@pytest.mark.parametrize("name", NETS)
def test_eight_bits_are_near_the_float_network(name: str) -> None:
    network, x = quantized(name, 8)
    with torch.no_grad():
        real, whole = network(x, "float"), network(x, "integer")
    assert float((real - whole).pow(2).mean().sqrt()) < 0.1 * float(real.std())


@pytest.mark.parametrize("name", NETS)
def test_the_fake_form_is_near_the_integers_and_has_gradients_everywhere(name: str) -> None:
    network, x = quantized(name, 8)
    with torch.no_grad():
        fake, whole = network(x, "fake"), network(x, "integer")
    assert float((fake - whole).abs().max()) < 0.1 * float(whole.std()) + 4 * float(freeze(network).output.scale)
    network.train()
    network(x, "fake").square().sum().backward()
    silent = [key for key, one in network.named_parameters() if one.requires_grad and one.grad is None]
    assert silent == []
    assert all(bool(one.grad.isfinite().all()) for one in network.parameters() if one.grad is not None)


def test_what_is_recorded_is_what_the_operation_is() -> None:
    kinds = {name: {type(op) for op in freeze(quantized(name, 8)[0]).ops} for name in NETS}
    assert {p.Slice, p.Pad, p.Add} <= kinds["option_a"]
    assert {p.Table, p.Mul} <= kinds["silu"]
    assert {p.Sub, p.Slice, p.Transpose, p.Reshape, p.Upsample, p.Pad} <= kinds["shuffle"]
    assert {p.LayerNorm, p.Table, p.Transpose} <= kinds["convnext"]
    assert {p.Constant, p.Concat, p.MatMul, p.Softmax, p.Scale, p.LayerNorm, p.Linear} <= kinds["transformer"]


def test_what_cannot_be_said_in_integers_is_named() -> None:
    class Ceil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, ceil_mode=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.conv(x))  # type: ignore[no-any-return]

    with pytest.raises(
        InputError, match=r"MaxPool2d at 'pool' has no integer form yet: its last windows leave the map"
    ):
        quantize(Ceil(), torch.zeros(1, 3, 12, 12))
    quantize(Ceil(), torch.zeros(1, 3, 13, 13))


class ElasticTransformer(nn.Module):
    """One block whose embedding, heads, features per head and depth are choices, with relative positions."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        width = Choice("width", (8, 16))
        heads = Choice("heads", (1, 2))
        self.patch = elastic.Conv2d(3, width, 4, stride=4, padding=0)
        self.cls, self.position = elastic.Parameter(1, 1, width), elastic.Parameter(1, 10, width)
        self.norm = elastic.LayerNorm(width)
        self.attention = elastic.MultiheadAttention(
            width, heads, 4, causal=causal, relative_tokens=10, relative_length=2
        )
        self.head = elastic.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls().expand(x.shape[0], -1, -1), x], dim=1) + self.position()
        x = x + self.attention(self.norm(x))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [False, True])
def test_elastic_attention_is_exact_activated_extracted_and_exported(causal: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    network = quantize(ElasticTransformer(causal), x[:1], weight_bits=(4, 8), activation_bits=(4, 8))
    calibrate(network, x)
    supernet = Supernet(network).eval()
    space = supernet.space
    rng = torch.Generator().manual_seed(1)
    for index, subnet in enumerate([space.largest(), space.smallest(), space.sample(rng)]):
        with supernet.activate(subnet):
            program, activated = freeze(network), network.integers(x).numpy()
        extracted = supernet.extract(subnet).eval()
        assert isinstance(extracted, QuantizedNetwork)
        np.testing.assert_array_equal(extracted.integers(x).numpy(), activated)
        directory = tmp_path / str(index)
        bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
        report = parity.check(directory, x.numpy())
        assert report.findings == () and report.differing == 0
        assert [str(layer) for layer in report.layers if layer.differing] == []
        np.testing.assert_array_equal(Reference(directory).run(x.numpy()), activated)


@pytest.mark.parametrize("bits", [2, 8])
def test_bilinear_upsampling_trains_on_the_integers(bits: int) -> None:
    """Its results often lie between two steps: the training form has to round them as the integers do."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"))
    x = torch.randn(4, 3, 8, 8)
    network = quantize(net, x[:1], weight_bits=(8,), activation_bits=(bits,), first_last_bits=None)
    calibrate(network, x)
    with torch.no_grad():
        differing = network.eval()(x, mode="fake") != network(x)
    assert float(differing.float().mean()) < 0.002  # a sum of the convolution may lie between two steps as well
