"""Layers that ``simplify`` replaces: equal outputs, and a traced form without operations that nothing knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import elastic
from nasq.deploy import bundle, onnx, parity
from nasq.deploy.reference import Reference
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant import calibrate, freeze, quantize


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def used(net: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are not those of construction."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(noise(module.num_features))
            module.running_var.copy_(noise(module.num_features).exp())
            module.weight.data.copy_(noise(module.num_features))
    return net.eval()


class Series(nn.Module):
    """A one-dimensional residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv1d(4, 8, 5, padding="same", bias=False), nn.BatchNorm1d(8)
        self.b, self.norm_b = nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2), nn.BatchNorm1d(8)
        self.pools = nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.hidden, self.norm, self.head = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.a(x)))
        x = self.pools(x + F.silu(self.norm_b(self.b(x))))
        y: Tensor = self.head(F.relu(self.norm(self.hidden(x))))
        return y


def test_a_one_dimensional_network_fuses_its_norms_and_gives_the_references_integers(tmp_path: Path) -> None:
    net, x = used(Series()), noise(8, 4, 32)
    simple = elastic.simplify(net)
    with torch.no_grad():
        assert torch.allclose(simple(x), net(x), atol=1e-5)
    graph = trace(simple, x)
    found = [node.kind for node in graph.nodes]
    assert found[:5] == ["input", "view", "conv", "norm", "relu"] and found[-4:] == ["linear", "norm", "relu", "linear"]
    assert "other" not in found and found.count("norm") == 3
    assert all(node.inputs[0].kind in {"conv", "linear"} for node in graph.nodes if node.kind == "norm")
    network = quantize(simple, x[:1])
    calibrate(network, x)
    network.eval()
    program = freeze(network)
    bundle.write(tmp_path / "b", program, {"model.onnx": onnx.export(program)})
    assert (Reference(tmp_path / "b").run(x.numpy()) == network.integers(x).numpy()).all()
    assert parity.check(tmp_path / "b", x.numpy()).differing == 0


def test_a_norm_of_features_behind_anything_else() -> None:
    net, x = used(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4), nn.ReLU(), nn.BatchNorm1d(4))), noise(5, 6)
    simple = elastic.simplify(net)
    with torch.no_grad():
        assert torch.allclose(simple(x), net(x), atol=1e-6)
        network = quantize(simple, x[:1], weight_bits=(8,), activation_bits=(8,)).eval()
        assert torch.allclose(network(x, mode="float"), net(x), atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torchs_transformer(norm_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, F.gelu, batch_first=True, norm_first=norm_first, bias=bias)
    norm = nn.LayerNorm(8) if norm_first else None
    net = nn.Sequential(nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False), nn.Linear(8, 3)).eval()
    simple, x = elastic.simplify(net), noise(3, 5, 8)
    with torch.no_grad():
        assert torch.allclose(simple(x), net(x), atol=1e-6)
    assert not any(node.kind == "other" for node in trace(simple, x).nodes)
    if not bias:
        quantize(simple, x[:1], weight_bits=(8,), activation_bits=(8,))


class Cross(nn.Module):
    """Attention of one half of the tokens to the other."""

    def __init__(self, **options: int | bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.attention(x[:, :3, :8], x[:, 3:], x[:, 3:], attn_mask=mask)[0]
        return y


@pytest.mark.parametrize("options", [{}, {"kdim": 10, "vdim": 10}])
def test_attention_to_other_tokens(options: dict[str, int | bool]) -> None:
    torch.manual_seed(0)
    net, x = Cross(**options).eval(), noise(3, 7, 10 if options else 8)
    simple = elastic.simplify(net)
    with torch.no_grad():
        assert torch.allclose(simple(x), net(x), atol=1e-6)
    with pytest.raises(InputError, match="attention with masks has no integer form here"):
        simple(x, torch.zeros(3, 4))


def test_attention_that_is_none_of_these_stays_and_is_named() -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12))
    assert type(elastic.simplify(net)[0]) is nn.TransformerEncoderLayer  # type: ignore[index]
    with pytest.raises(InputError, match=r"'0' has no integer form yet: .*simplify.*batch_first=True"):
        quantize(net, noise(1, 5, 8))


@pytest.mark.parametrize("bias", [False, True])
def test_a_transposed_convolution_whose_kernel_is_its_stride(bias: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 3, bias=bias), nn.ReLU()).eval(), noise(2, 3, 4, 5)
    simple = elastic.simplify(net)
    with torch.no_grad():
        assert torch.allclose(simple(x), net(x), atol=1e-6)
    assert not any(node.kind == "other" for node in trace(simple, x).nodes)
    overlapping = nn.ConvTranspose2d(3, 4, 3, 2)
    assert type(elastic.simplify(overlapping)) is nn.ConvTranspose2d


def test_a_network_that_is_one_such_layer_and_a_norm_over_processes() -> None:
    assert isinstance(elastic.simplify(nn.Conv1d(2, 3, 3)), nn.Module)
    with torch.no_grad():
        x = noise(2, 2, 9)
        conv = nn.Conv1d(2, 3, 3, stride=2)
        assert torch.allclose(elastic.simplify(conv)(x), conv(x), atol=1e-6)
    norm = used(nn.SyncBatchNorm(4))
    assert torch.equal(elastic.simplify(norm)(noise(2, 4, 3, 3)), norm(noise(2, 4, 3, 3)))
