"""LLM-QFA's layers: frozen weights per bit-width, adapters that merge, GPTQ against a slow solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import generator
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.quant import quantize
from nasq.quant.adapters import LowBitLinear, adapter_parameters, bits_of, separate_bits, stored_bytes
from nasq.quant.groups import gptq, round_to_nearest
from nasq.training import Balanced

BITS = (2, 3, 4)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


class Small(nn.Module):
    """Two linear layers around a norm, and a third that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.twice = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.head(self.twice(self.twice(x).relu()))


def network(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small().eval()


def adapted(trained: bool = True, **options) -> Supernet:
    """With adapters as after training, where asked for."""
    found = separate_bits(network(), BITS, group=4, rank=2, **options)
    with torch.no_grad():
        for index, parameter in enumerate(adapter_parameters(found)):
            if trained:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(index)))
    return Supernet(found, "adapted").eval()


def test_the_space_is_the_bits_of_every_layer() -> None:
    space = adapted().space
    assert space.names == ("first.weight_bits", "twice.weight_bits", "head.weight_bits")
    assert all(space[name].options == BITS for name in space.names)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rounding_equals_a_loop_over_groups(bits: int) -> None:
    weight = weights(3, 8)
    found = round_to_nearest(weight, bits, 4)
    for row in range(3):
        for group in range(2):
            part = weight[row, 4 * group : 4 * group + 4]
            step = (part.max() - part.min()) / (2**bits - 1)
            levels = [part.min() + code * step for code in range(2**bits)]
            for column, value in enumerate(part):
                nearest = min(abs(value - level) for level in levels)
                assert abs(found.real()[row, 4 * group + column] - value) == pytest.approx(float(nearest), abs=1e-12)
    assert int(found.codes.max()) <= 2**bits - 1


def test_a_constant_group_is_exact() -> None:
    weight = torch.full((2, 4), 0.7, dtype=torch.float64)
    assert torch.equal(round_to_nearest(weight, 2, 4).real(), weight)


def slow_gptq(weight: Tensor, moment: Tensor, bits: int, group: int) -> Tensor:
    """Rounds one input, then solves for the rest: the inverse of what is left, anew for each input."""
    left, done = weight.clone(), torch.zeros_like(weight)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    for column in range(weight.shape[1]):
        if column % group == 0:
            part = left[:, column : column + group]
            low = part.min(1).values
            step = (part.max(1).values - low) / (2**bits - 1)
        done[:, column] = low + step * ((left[:, column] - low) / step).round().clamp(0, 2**bits - 1)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, column:] = left[:, column:] - torch.outer(error, inverse[0])
    return done


def test_gptq_equals_the_slow_solver_and_beats_rounding() -> None:
    weight = weights(6, 16)
    x = weights(64, 16, seed=1) @ weights(16, 16, seed=2)
    moment = x.T @ x / 64
    for bits in BITS:
        found = gptq(weight, moment, bits, 8).real()
        torch.testing.assert_close(found, slow_gptq(weight, moment, bits, 8), rtol=1e-8, atol=1e-8)
        rounded = round_to_nearest(weight, bits, 8).real()
        assert (x @ (found - weight).T).square().mean() < (x @ (rounded - weight).T).square().mean()


def test_gptq_without_correlations_rounds_to_the_nearest() -> None:
    weight = weights(5, 8)
    found, wanted = gptq(weight, torch.eye(8, dtype=torch.float64), 3, 4), round_to_nearest(weight, 3, 4)
    assert torch.equal(found.codes, wanted.codes)


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    moment = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    assert bool(gptq(weights(3, 4), moment, 2, 4).real().isfinite().all())


@pytest.mark.parametrize("bits", BITS)
def test_merging_keeps_the_output_and_the_codes(bits: int) -> None:
    layer = adapted().module.first.branches[str(bits)].double()
    assert layer.adapter is not None
    x = weights(7, 8, seed=3)
    base = x @ LowBitLinear(layer.merged().grouped(), layer.fixed_bias, None).active_weight().T
    pooled = x.reshape(7, 2, 4).sum(2)
    frozen = round_to_nearest(network().first.weight.detach(), bits, 4).real().double()
    wanted = x @ frozen.T + layer.adapter.scale * pooled @ layer.adapter.a.T @ layer.adapter.b.T
    torch.testing.assert_close(base, wanted, rtol=1e-6, atol=1e-6)
    merged = layer.merged()
    assert merged.adapter is None and torch.equal(merged.codes, layer.codes) and torch.equal(merged.scale, layer.scale)
    assert torch.equal(merged(x), layer(x))


def test_only_the_active_adapters_learn_and_all_else_stays() -> None:
    supernet = adapted()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter_parameters(supernet), 0.1)
    subnet = {"first.weight_bits": 2, "twice.weight_bits": 4, "head.weight_bits": 3}
    with supernet.activate(subnet):
        supernet(weights(5, 8).float()).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in supernet.state_dict().items() if not torch.equal(tensor, before[name])}
    active = ("first.branches.2", "twice.branches.4", "head.branches.3")
    assert changed == {f"module.{path}.adapter.{matrix}" for path in active for matrix in ("a", "b")}
    assert len(adapter_parameters(supernet)) == 3 * len(BITS) * 2


def test_untrained_adapters_change_nothing() -> None:
    supernet, plain = adapted(trained=False), network()
    with supernet.activate(dict.fromkeys(supernet.space.names, 3)), torch.no_grad():
        for path in ("first", "twice", "head"):
            wanted = round_to_nearest(plain.get_submodule(path).weight, 3, 4).real()
            assert torch.equal(supernet.module.get_submodule(path).branches["3"].active_weight(), wanted)


def test_switching_and_back_reproduces_the_output() -> None:
    supernet, x = adapted(), weights(4, 8).float()
    one, other = (dict.fromkeys(supernet.space.names, bits) for bits in (2, 4))
    with torch.no_grad():
        found = []
        for subnet in (one, other, one):
            with supernet.activate(subnet):
                found.append(supernet(x))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_extract_is_plain_and_bit_exact() -> None:
    supernet, x = adapted(), weights(4, 8).float()
    model = CostModel(supernet, x)
    for subnet in supernet.space.to_subnets(supernet.space.sample_batch(5, generator(0))):
        plain = supernet.extract(subnet)
        assert isinstance(plain.first, nn.Linear) and plain.twice is not plain.head
        with supernet.activate(subnet):
            assert torch.equal(supernet(x), plain(x))
        assert len(x) * model.of(subnet)["macs"] == counted_macs(plain, x)
        assert model.of(subnet)["params"] == sum(parameter.numel() for parameter in plain.parameters())


def test_more_bits_are_nearer_to_the_trained_network() -> None:
    supernet, x = adapted(trained=False), weights(64, 8).float()
    wanted, errors = network()(x), []
    with torch.no_grad():
        for bits in BITS:
            with supernet.activate(dict.fromkeys(supernet.space.names, bits)):
                errors.append(float((supernet(x) - wanted).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_gptq_rounds_each_layer_by_its_own_inputs() -> None:
    plain, mixing = network(), weights(8, 8, seed=9).float()
    batches = [weights(64, 8, seed=seed).float() @ mixing for seed in range(3)]
    x = torch.cat(batches)
    moment = {"first": x.double().T @ x.double() / len(x)}
    hidden = plain.norm(plain.first(x)).relu()
    both = torch.cat([hidden, plain.twice(hidden).relu()]).detach().double()  # of both calls
    moment["twice"] = both.T @ both / len(both)
    found = separate_bits(plain, BITS, group=4, batches=batches)
    for path, own in moment.items():
        weight = plain.get_submodule(path).weight.detach()
        for bits in BITS:
            wanted = gptq(weight, own, bits, 4).real()
            torch.testing.assert_close(found.get_submodule(path).branches[str(bits)].active_weight(), wanted)


def test_a_shared_adapter_serves_all_bits() -> None:
    found = separate_bits(network(), BITS, group=4, rank=2, shared=True)
    assert len(adapter_parameters(found)) == 3 * 2
    assert found.first.branches["2"].adapter is found.first.branches["4"].adapter


def test_bits_and_bytes_of_subnets() -> None:
    supernet = adapted()
    rows = supernet.space.sample_batch(6, generator(0))
    average, size = bits_of(supernet, supernet.space, rows), stored_bytes(supernet, supernet.space, rows)
    shapes = {"first": (12, 8, True), "twice": (12, 12, False), "head": (3, 12, True)}
    for index, subnet in enumerate(supernet.space.to_subnets(rows)):
        assert average[index] == pytest.approx(np.mean(list(subnet.values())))
        wanted = 0
        for path, (out, features, bias) in shapes.items():
            bits = subnet[f"{path}.weight_bits"]
            wanted += out * math.ceil(features * bits / 8) + out * features // 4 * 4 + 4 * out * bias
        assert size[index] == wanted


def test_layers_are_taken_by_pattern() -> None:
    found = separate_bits(network(), BITS, group=4, where=("first", "h*"))
    assert Supernet(found).space.names == ("first.weight_bits", "head.weight_bits")
    assert not found.twice.weight.requires_grad


def test_the_balanced_sampler_trains_it() -> None:
    supernet = adapted(trained=False)
    x = weights(64, 8).float()
    wanted = network()(x).detach()
    optimizer = torch.optim.AdamW(adapter_parameters(supernet), 0.01)
    sampler = Balanced(supernet.space, generator(0), period=20)

    def error() -> float:
        with supernet.activate(dict.fromkeys(supernet.space.names, 2)), torch.no_grad():
            return float((supernet(x) - wanted).square().mean())

    before = error()
    for _ in range(60):
        for path in sampler.step():
            optimizer.zero_grad()
            with supernet.activate(path.subnet):
                (supernet(x) - wanted).square().mean().backward()
        optimizer.step()
    assert error() < 0.7 * before


def test_quantize_refuses_layers_with_frozen_weights_and_takes_the_extracted_ones() -> None:
    supernet, x = adapted(), weights(1, 8).float()
    with pytest.raises(InputError, match=r"'first\.branches\.2'.*separate_bits.*Extract a subnet first"):
        quantize(supernet.module, x)
    plain = supernet.extract(supernet.space.largest())
    found = quantize(plain, x, weight_bits=(8,), activation_bits=(8,))
    torch.testing.assert_close(found(x, mode="float"), plain(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: separate_bits(network(), (4, 2)), r"bits of separate weights are \[4, 2\]; allowed: ascending"),
        (lambda: separate_bits(network(), (2, 9)), "whole numbers from 1 to 8"),
        (lambda: separate_bits(network(), where=("x*",)), r"no linear layer of the network matches \['x\*'\]"),
        (lambda: separate_bits(network(), group=5), "'first' has 8 inputs, which groups of 5 do not divide"),
        (
            lambda: separate_bits(nn.Sequential(elastic.Linear(4, Choice("w", (2, 4))))),
            r"the layer '0' has sizes that are choices \(w\).*Extract a subnet first",
        ),
        (
            lambda: bits_of(network(), adapted().space, np.zeros((1, 3), np.int16)),
            "the network has no layers with separate bits",
        ),
        (
            lambda: gptq(weights(2, 4), torch.full((4, 4), math.nan), 2, 4),
            "the inputs of a layer hold NaN or infinite values",
        ),
    ],
)
def test_what_cannot_be_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
