"""What is recorded as several operations, what follows from parameters alone, and what is stored instead of computed."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d, LayerNorm2d, LayerScale2d, ScaledStdConv2d, StdConv2d
from timm.models.fastvit import RepMixer
from timm.models.levit import LinearNorm, NormLinear
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import elastic
from nasq.elastic.derived import Derived
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant import quantize


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def kinds(module: nn.Module, x: Tensor) -> list[str]:
    return [node.kind for node in trace(module, x).nodes if node.kind != "input"]


def same_after_tracing(module: nn.Module, x: Tensor) -> None:
    """The traced form in float computes what the module computes, on another batch size as well."""
    network = quantize(module, x[:1]).eval()
    module.eval()
    with torch.no_grad():
        assert torch.allclose(network(x, mode="float"), module(x), rtol=1e-5, atol=1e-6)


def test_a_norm_that_holds_its_activation() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU))
    assert kinds(module, noise(1, 3, 4, 4)) == ["conv", "norm", "identity", "unary"]
    same_after_tracing(module, noise(3, 3, 4, 4))


def test_a_layer_norm_over_channels() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), LayerNorm2d(4))
    assert kinds(module, noise(1, 3, 4, 4)) == ["conv", "permute", "layer_norm", "permute"]
    same_after_tracing(module, noise(3, 3, 4, 4))


class Attention(nn.Module):
    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(noise(2, 5, 5)) if mask else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        return y.transpose(1, 2).reshape(x.shape[0], 5, 8)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_is_two_matrix_products(mask: bool) -> None:
    module = Attention(mask)
    found = kinds(module, noise(1, 5, 8))
    assert found.count("matmul") == 2 and found.count("softmax") == 1 and "other" not in found
    assert found.count("parameter") == int(mask)
    same_after_tracing(module, noise(3, 5, 8))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Flatten(2), "view"), (nn.Flatten(2, 3), "view"), (nn.Flatten(-2), "view"), (nn.Unflatten(-1, (2, -1)), "view"),
        (nn.Unflatten(3, (2, 2)), "view"), (nn.Flatten(), "reshape"),
    ],
)  # fmt: skip
def test_reshapes_that_are_modules_are_those_that_are_functions(layer: nn.Module, kind: str) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    assert kinds(module, noise(1, 3, 4, 4)) == ["conv", kind]
    same_after_tracing(module, noise(3, 3, 4, 4))


@pytest.mark.parametrize("layer", [nn.Flatten(0, 1), nn.Flatten(-4, -1), nn.Unflatten(1, (2, 2))])
def test_reshapes_of_other_dimensions_stay_modules_and_are_named(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    with pytest.raises(InputError, match=rf"^{type(layer).__name__} at '1' has no integer form"):
        quantize(module, noise(2, 3, 4, 4))


class AddCMul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.alpha, self.beta = nn.Linear(4, 4), nn.Parameter(noise(1, 1, 4)), nn.Parameter(noise(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, self.first(x))


def test_addcmul() -> None:
    assert set(kinds(AddCMul(), noise(1, 5, 4))) == {"linear", "parameter", "mul", "add"}
    same_after_tracing(AddCMul(), noise(3, 5, 4))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), LayerScale2d(4, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.conv(x))


def test_what_follows_from_a_parameter_follows_its_training() -> None:
    module, x = Scaled().eval(), noise(2, 3, 4, 4)
    network = quantize(module, x[:1]).eval()
    (node,) = [node for node in network.graph.nodes if node.kind == "parameter"]
    assert isinstance(node.module, Derived) and node.shape == (4, 1, 1)
    assert [name for name, _ in network.named_parameters() if "gamma" in name] == ["scale.gamma"]
    with torch.no_grad():
        dict(network.named_parameters())["scale.gamma"].copy_(torch.tensor([1.0, -2.0, 0.0, 3.0]))
        wanted = module.conv(x) * torch.tensor([1.0, -2.0, 0.0, 3.0]).reshape(4, 1, 1)
        assert torch.allclose(network(x, mode="float"), wanted, atol=1e-6)
    network.train()(x, mode="float").sum().backward()
    gradient = dict(network.named_parameters())["scale.gamma"].grad
    assert gradient is not None and bool((gradient != 0).any())


class Cached(nn.Module):
    """Keeps what it computed, as LeViT does with its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(noise(1, 4)), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        if "table" not in self.cache:
            self.cache["table"] = self.table * 2
        return x + self.cache["table"]


def test_tracing_leaves_no_proxies_in_caches() -> None:
    module = Cached()
    trace(module, noise(1, 4))
    assert module.cache == {} and torch.equal(module(torch.zeros(1, 4)), module.table * 2)


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardised_convolutions_hold_their_weight(kind: type[nn.Conv2d]) -> None:
    module = nn.Sequential(kind(3, 4, 3, padding=1, stride=2)).eval()
    simple = elastic.simplify(module)
    assert type(simple[0]) is nn.Conv2d and type(module[0]) is kind
    x = noise(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(simple(x), module(x), atol=1e-6)
        weight = module[0].weight.double().flatten(1)
        centred = weight - weight.mean(1, keepdim=True)
        stored = simple[0].weight.double().flatten(1)
    # Standardised: of mean 0, and in the direction of the centred weight.
    assert torch.allclose(stored.mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(F.cosine_similarity(stored, centred), torch.ones(4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind", [LinearNorm, NormLinear])
def test_norms_beside_linear_layers_are_folded(kind: type[nn.Module]) -> None:
    module = nn.Sequential(kind(4, 6))
    x = noise(2, 5, 4) if kind is LinearNorm else noise(7, 4)
    with torch.no_grad():
        for _ in range(3):
            module.train()(x + 1)  # statistics of its own
    module.eval()
    simple = elastic.simplify(module)
    assert isinstance(simple[0], nn.Linear)
    with torch.no_grad():
        assert torch.allclose(simple(x), module(x), atol=1e-5)


def test_a_mixer_becomes_one_convolution() -> None:
    module = nn.Sequential(RepMixer(4)).eval()
    x = noise(1, 4, 6, 6)
    with torch.no_grad():
        wanted = module(x)
        simple = elastic.simplify(module)
        assert sum(isinstance(part, nn.Conv2d) for part in simple.modules()) == 1
        assert torch.allclose(simple(x), wanted, atol=1e-5) and torch.equal(module(x), wanted)


def test_a_network_without_any_of_these_is_copied() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1))
    simple = elastic.simplify(module)
    assert simple is not module and torch.equal(simple[0].weight, module[0].weight)
