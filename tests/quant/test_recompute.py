"""Quantized activations that are computed again: the same gradients, less that is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nasq import Supernet
from nasq.quant import calibrate, quantize
from nasq.quant.fake import fake_quantize
from nasq.quant.recompute import Again, recomputed, session


def _network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def _supernet() -> Supernet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = quantize(_network(), torch.zeros(1, 3, 8, 8), activation_symmetry=("symmetric", "asymmetric"))
        calibrate(network, torch.randn(8, 3, 8, 8))
    return Supernet(network.train())


def _gradients(supernet: Supernet, seed: int, forget: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    subnet = supernet.space.sample(generator)
    x = torch.randn(5, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    supernet.zero_grad()
    with supernet.activate(subnet):
        if forget:
            with recomputed():
                y = supernet(x)
        else:
            y = supernet(x)
        y.square().sum().backward()
    return [parameter.grad for parameter in supernet.parameters()]


@pytest.mark.parametrize("seed", range(4))
def test_the_gradients_are_the_same_bits(seed: int) -> None:
    supernet = _supernet()
    kept = [None if one is None else one.clone() for one in _gradients(supernet, seed, False)]
    again = _gradients(supernet, seed, True)
    assert sum(one is not None for one in kept) > 6
    for one, other in zip(kept, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other is not None and torch.equal(one, other))


def test_what_a_layer_reads_is_not_kept() -> None:
    weight, step = torch.ones(1, 1, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    x = torch.rand(1000, 1, requires_grad=True)
    seen: list[Again | None] = []

    def forward() -> Tensor:
        q = fake_quantize(x * 2, step, 0.0, 7.0)
        active = session()
        if active is not None:
            seen.append(active.find(q.detach()))
        return nn.functional.linear(q, weight)

    with recomputed():
        y = forward()
    assert isinstance(seen[0], Again) and seen[0].value is None
    y.sum().backward()
    assert seen[0].value is None  # made for the layer, used by the step, and gone
    assert torch.equal(seen[0].get(), (x.detach() * 2 / 0.1).clamp(0, 7).round() * 0.1)
    assert session() is None


def test_only_the_very_tensor_is_forgotten() -> None:
    step = torch.tensor(0.5)
    x = torch.rand(64, requires_grad=True)
    with recomputed():
        active = session()
        assert active is not None
        q = fake_quantize(x, step, 0.0, 3.0)
        assert isinstance(active.find(q), Again)
        assert active.find(x) is None
        assert active.find(q[:32]) is None  # a part of it
        assert active.find(q.reshape(8, 8)) is None
        with torch.no_grad():
            q.add_(1)
        assert active.find(q) is None  # not what was made any more
        address = q.data_ptr()
        del q
        other = torch.full((64,), 9.0)
        active.known[other.data_ptr()] = active.known.pop(address)  # memory that is used again
        assert active.find(other) is None
        half = fake_quantize(x.bfloat16(), step, 0.0, 3.0)
        assert active.find(half) is None
        rows = fake_quantize(x.reshape(8, 8), torch.full((8, 1), 0.5), 0.0, 3.0)
        assert active.find(rows) is None


def test_two_readers_and_a_second_backward_pass() -> None:
    step = torch.tensor(0.3, requires_grad=True)
    x, a, b = (torch.rand(6, 6, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))

    def run(forget: bool) -> list[Tensor]:
        made: list[Tensor] = []
        if forget:
            with recomputed():
                q = fake_quantize(x, step, 0.0, 3.0)
                y = (q @ a).sum() + (q @ b).square().sum()
        else:
            q = fake_quantize(x, step, 0.0, 3.0)
            y = (q @ a).sum() + (q @ b).square().sum()
        for _ in range(2):
            made += torch.autograd.grad(y, (x, step, a, b), retain_graph=True)
        (first,) = torch.autograd.grad(y, (b,), create_graph=True)
        made += torch.autograd.grad(first.square().sum(), (x, step, b))
        return made

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_a_change_in_place_is_still_found() -> None:
    x, weight = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4, requires_grad=True)
    with recomputed():
        h = x * 2
        y = h @ weight
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match=r"\[4, 4\], was modified by an in-place operation"):
        y.sum().backward()
