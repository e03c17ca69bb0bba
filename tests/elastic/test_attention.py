"""Attention, relative positions, layer normalisation and parameters against slow loops and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from networks import generator
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet
from nasq.cost import CostModel, counted_macs
from nasq.elastic import LayerNorm, Linear, MultiheadAttention, Parameter
from nasq.elastic.attention import RelativePosition
from nasq.elastic.flow import check_sizes
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant import calibrate, freeze, quantize


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed + index)) * 0.5)
    return module


class Tokens(nn.Module):
    """Embedding, class token, position table, one pre-norm attention, head: every elastic part of a transformer once."""

    def __init__(
        self, head_dim: int | Choice = 4, heads: int | Choice | None = None, relative: int | None = None
    ) -> None:
        super().__init__()
        embed = Choice("embed", (8, 12, 16))
        self.embed = Linear(5, embed)
        self.token = Parameter(1, 1, embed)
        self.position = Parameter(1, 5, embed)
        self.norm = LayerNorm(embed)
        self.attention = MultiheadAttention(
            embed, heads if heads is not None else Choice("heads", (1, 2, 3)), head_dim, relative_tokens=relative
        )
        self.head = Linear(embed, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = torch.cat([self.token().expand(x.shape[0], -1, -1), x], dim=1) + self.position()
        x = x + self.attention(self.norm(x))
        return self.head(x[:, 0])


FORMS = {
    "fixed head size": {},
    "relative positions": {"relative": 5},
    "elastic head size": {"head_dim": Choice("head_dim", (2, 4)), "heads": 2},
    "both": {"head_dim": Choice("head_dim", (2, 4)), "relative": 5},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_extract_is_bit_exact_and_costs_equal_counters(form) -> None:
    supernet = Supernet(randomised(Tokens(**form))).eval()
    x = draw(3, 4, 5).float()
    model = CostModel(supernet, x)
    check_sizes(model.graph, supernet.space)
    for row in supernet.space.to_subnets(supernet.space.sample_batch(8, generator(1))):
        plain = supernet.extract(row)
        with supernet.activate(row):
            assert torch.equal(supernet(x), plain(x))
        costs = model.of(row)
        assert costs["params"] == sum(parameter.numel() for parameter in plain.parameters())
        assert costs["macs"] * len(x) == counted_macs(plain, x)


def test_the_whole_attention_is_traced_into_simple_operations() -> None:
    supernet = Supernet(Tokens()).eval()
    kinds = {node.kind for node in trace(supernet.module, torch.zeros(1, 4, 5)).walk()}
    simple = {"input", "linear", "parameter", "expand", "concat", "add", "layer_norm", "view", "permute", "scale"}
    assert kinds == simple | {"matmul", "softmax", "select"}


def test_a_head_size_that_is_a_choice_has_an_integer_form() -> None:
    """The factor 1 / sqrt(D) of the active D changes the grid, in the activated and in the extracted network."""
    net = randomised(Tokens(head_dim=Choice("head_dim", (2, 8)), heads=2))
    assert "other" not in {node.kind for node in trace(net, torch.zeros(1, 4, 5)).walk()}
    network = quantize(net, torch.zeros(1, 4, 5), weight_bits=(8,), activation_bits=(8,))
    x = draw(16, 4, 5).float()
    calibrate(network, x)
    supernet = Supernet(network).eval()
    for size in (2, 8):
        subnet = {**supernet.space.largest(), "head_dim": size}
        plain = supernet.extract(subnet).eval()
        with supernet.activate(subnet), torch.no_grad():
            wanted, real = supernet.module.integers(x), supernet(x, mode="float")
            factors = [op.output.scale / before for op, before in scales(freeze(supernet.module, x[:1]))]
            error = (supernet(x) - real).abs().max() / real.abs().max()
        assert torch.equal(plain.integers(x), wanted)
        assert factors == pytest.approx([size**-0.5], rel=1e-6)
        assert error < 0.15


def scales(program):
    """The scale operations of a program, each with the step of what it reads."""
    steps = {op.output.name: op.output.scale for op in program.ops}
    return [(op, steps[op.inputs[0]]) for op in program.ops if type(op).__name__ == "Scale"]


def slow_attention(attention: MultiheadAttention, x: Tensor, heads: int, size: int, embed: int) -> Tensor:
    """Head by head and token by token, from slices of the shared weights."""
    out = attention.proj.bias[:embed].repeat(*x.shape[:2], 1)
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        q, k, v = (
            x @ layer.weight[rows, :embed].T + layer.bias[rows] for layer in (attention.q, attention.k, attention.v)
        )
        for image in range(x.shape[0]):
            for i in range(x.shape[1]):
                scores = [float(q[image, i] @ k[image, j]) / math.sqrt(size) for j in range(x.shape[1])]
                shares = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(share / sum(shares) * v[image, j] for j, share in enumerate(shares))
                out[image, i] += attention.proj.weight[:embed, rows] @ mixed
    return out


@pytest.mark.parametrize(("heads", "embed"), [(1, 6), (2, 8), (3, 6)])
@torch.no_grad()
def test_active_heads_are_slices_of_queries_keys_and_values_each(heads: int, embed: int) -> None:
    attention = randomised(MultiheadAttention(Choice("e", (6, 8)), Choice("h", (1, 2, 3)), 4)).double()
    supernet, x = Supernet(attention), draw(2, 5, embed)
    with supernet.activate({"e": embed, "h": heads}):
        torch.testing.assert_close(supernet(x), slow_attention(attention, x, heads, 4, embed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
@torch.no_grad()
def test_a_smaller_head_is_scaled_by_its_own_size(size: int) -> None:
    attention = randomised(MultiheadAttention(6, 2, Choice("d", (2, 4)))).double()
    supernet, x = Supernet(attention), draw(2, 5, 6)
    with supernet.activate({"d": size}):
        torch.testing.assert_close(supernet(x), slow_attention(attention, x, 2, size, 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_equals_torchs_multihead_attention(causal: bool) -> None:
    theirs = randomised(nn.MultiheadAttention(12, 3, batch_first=True)).double().eval()
    ours = MultiheadAttention(12, 3, 4, causal=causal).double()
    ours.load_fused(theirs.in_proj_weight, theirs.in_proj_bias)
    ours.proj.load_state_dict(theirs.out_proj.state_dict())
    x = draw(2, 7, 12)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_equals_scaled_dot_product_attention() -> None:
    attention = randomised(MultiheadAttention(8, 2, 4)).double()
    x = draw(3, 5, 8)
    q, k, v = (attention.heads(layer(x)) for layer in (attention.q, attention.k, attention.v))
    wanted = attention.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_causal_token_does_not_see_later_ones() -> None:
    attention = randomised(MultiheadAttention(8, 2, 4, causal=True))
    x = draw(1, 6, 8).float()
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(attention(x)[:, :4], attention(changed)[:, :4])
    assert not torch.equal(attention(x)[:, 4:], attention(changed)[:, 4:])


def slow_relative(relative: RelativePosition, n: int, m: int, side: int) -> Tensor:
    """The vector of one pair of tokens, 0 being the class token."""
    if n == 0 or m == 0:
        return relative.vertical[0] + relative.horizontal[0]
    (a, b), (c, d) = divmod(n - 1, side), divmod(m - 1, side)
    rows, columns = (max(-relative.length, min(relative.length, by)) for by in (c - a, d - b))
    return relative.vertical[rows + relative.length + 1] + relative.horizontal[columns + relative.length + 1]


@torch.no_grad()
def test_relative_positions_equal_the_formula() -> None:
    attention = randomised(MultiheadAttention(6, 2, 3, relative_tokens=10, relative_length=1)).double()
    assert attention.relative_key is not None and attention.relative_value is not None
    keys, values = (
        torch.stack([torch.stack([slow_relative(part, n, m, 3) for m in range(10)]) for n in range(10)])
        for part in (attention.relative_key, attention.relative_value)
    )
    x = draw(2, 10, 6)
    q, k, v = (attention.heads(layer(x)) for layer in (attention.q, attention.k, attention.v))
    y = torch.empty(2, 2, 10, 3, dtype=torch.float64)
    for n in range(10):  # softmax over m of q_n . (k_m + r_nm) / sqrt(D), times (v_m + r'_nm)
        scores = (q[:, :, n, None] * (k + keys[n])).sum(-1) / math.sqrt(3)
        y[:, :, n] = (scores.softmax(-1)[..., None] * (v + values[n])).sum(2)
    wanted = attention.proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_layer_norm_uses_the_statistics_of_the_active_features() -> None:
    norm = randomised(LayerNorm(Choice("w", (3, 5)), eps=1e-3)).double()
    supernet, x = Supernet(norm), draw(4, 2, 3)
    with supernet.activate({"w": 3}):
        found = supernet(x)
    for vector, result in zip(x.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        mean = sum(vector) / 3
        var = sum((one - mean) ** 2 for one in vector) / 3
        wanted = torch.stack([(one - mean) / (var + 1e-3).sqrt() for one in vector])
        torch.testing.assert_close(result, wanted * norm.weight[:3] + norm.bias[:3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_extracts_to_torchs_own(affine: bool) -> None:
    supernet = Supernet(nn.Sequential(randomised(LayerNorm(Choice("w", (3, 5)), 1e-6, affine)))).eval()
    plain = supernet.extract({"w": 3})[0]
    assert isinstance(plain, nn.LayerNorm) and plain.normalized_shape == (3,) and plain.eps == 1e-6
    x = draw(4, 3).float()
    with supernet.activate({"w": 3}):
        assert torch.equal(supernet(x), plain(x))
    assert sum(parameter.numel() for parameter in plain.parameters()) == (6 if affine else 0)
    assert supernet.module[0].cost_parameters(lambda size: 3) == (6 if affine else 0)


def test_a_parameter_is_sliced_from_the_front_of_every_dimension() -> None:
    width, tokens = Choice("width", (2, 4)), Choice("tokens", (3, 6))
    supernet = Supernet(randomised(Parameter(1, tokens, width)))
    with supernet.activate({"tokens": 3, "width": 2}):
        assert torch.equal(supernet(), supernet.module.weight[:, :3, :2])
        supernet().sum().backward()
    assert torch.equal(supernet.module.weight.grad, F.pad(torch.ones(1, 3, 2), (0, 2, 0, 3)))
    assert torch.equal(supernet.extract({"tokens": 3, "width": 2})(), supernet.module.weight[:, :3, :2])


def test_initial_values_of_a_parameter() -> None:
    weight = Parameter(1, 50, 40, std=0.5).weight.detach()
    assert 0.3 < float(weight.std()) < 0.5 and float(weight.abs().max()) <= 1.0
    assert not Parameter(1, 3, std=0).weight.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parameter(), "a Parameter was given no size. Give one per dimension"),
        (
            lambda: Parameter(1, 2, std=-1.0),
            "the standard deviation of a Parameter is -1.0. Give a number of at least 0",
        ),
        (lambda: MultiheadAttention(4, 1, 4, relative_tokens=6), "asked for 6 tokens. They need a class token"),
        (
            lambda: MultiheadAttention(4, 1, 4).load_fused(torch.zeros(3, 4)),
            r"have the shape \[3, 4\] and no bias; this attention takes \[12, 4\] and a bias",
        ),
        (
            lambda: MultiheadAttention(4, 1, 4, relative_tokens=5)(torch.zeros(1, 10, 4)),
            "relative positions for 5 tokens were given 10",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_sizes_that_disagree_name_both_layers() -> None:
    class Wrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Linear(4, Choice("a", (6, 8)))
            self.norm = LayerNorm(Choice("b", (6, 8)))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.embed(x))

    supernet = Supernet(Wrong())
    with pytest.raises(InputError, match="'norm' takes 8 features, and 'embed' gives it 6"):
        check_sizes(trace(supernet.module, torch.zeros(1, 4)), supernet.space)


def test_masks_that_are_not_causal_are_no_known_kind() -> None:
    class Masked(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(self.mask, float("-inf"))

    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    assert trace(Masked(causal), torch.zeros(1, 2, 3, 3)).output.kind == "mask"
    assert trace(Masked(~causal), torch.zeros(1, 2, 3, 3)).output.kind == "other"


@pytest.mark.parametrize(
    ("call", "kind", "attributes"),
    [
        (lambda x: x.transpose(-1, -2), "permute", {"dims": (0, 1, 3, 2)}),
        (lambda x: x.permute(0, 2, 3, 1), "permute", {"dims": (0, 2, 3, 1)}),
        (lambda x: x.permute(1, 0, 2, 3), "other", {}),
        (lambda x: x.flatten(2), "view", {"sizes": (0, -1)}),
        (lambda x: x.flatten(1, 2), "view", {"sizes": (-1, 5)}),
        (lambda x: x.reshape(x.shape[0], -1, 10), "view", {"sizes": (-1, 10)}),
        (lambda x: x.unflatten(-1, (5, 1)), "view", {"sizes": (0, 0, 5, 1)}),
        (lambda x: x / 4, "scale", {"factor": 0.25}),
        (lambda x: 4 / x, "other", {}),
        (lambda x: 3 * x, "scale", {"factor": 3.0}),
        (lambda x: x[:, 1], "select", {"dim": 1, "index": 1}),
        (lambda x: x[1], "other", {}),
        (lambda x: x.mean(1), "mean", {"dims": (1,), "keepdim": False}),
        (lambda x: x.mean((2, 1), keepdim=True), "mean", {"dims": (1, 2), "keepdim": True}),
        (lambda x: x.mean(0), "other", {}),
        (lambda x: F.softmax(x, dim=-1), "softmax", {"dim": 3}),
        (lambda x: x.softmax(0), "other", {}),
        (lambda x: x @ x.mT, "matmul", {}),
    ],
)
def test_calls_are_known_by_kind_and_size(call, kind: str, attributes) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    x = torch.zeros(2, 3, 4, 5)
    graph = trace(Net(), x)
    assert graph.output.kind == kind
    assert {key: value for key, value in graph.output.attributes.items() if key != "call"} == attributes
    if kind != "other":
        check_sizes(graph, Supernet(Net()).space)
        assert graph.output.shape == tuple(Net()(x).shape[1:])
