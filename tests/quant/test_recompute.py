"""Quantized activations that are computed again: the same gradients, less that is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from nasq import Supernet
from nasq.quant import calibrate, quantize, recompute
from nasq.quant.fake import fake_quantize
from nasq.quant.layers import apply
from nasq.quant.recompute import Again, again_of, forgetting, recomputed


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
def test_the_gradients_are_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Again] = []
    get = Again.get
    monkeypatch.setattr(Again, "get", lambda self: made.append(self) or get(self))
    supernet = _supernet()
    kept = [None if one is None else one.clone() for one in _gradients(supernet, seed, False)]
    assert not made
    again = _gradients(supernet, seed, True)
    assert len(made) >= 2  # what the second convolution and the linear layer read, at least
    assert sum(one is not None for one in kept) > 6
    for one, other in zip(kept, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (other is not None and torch.equal(one, other))


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nasq.quant.fake.WORTH", 1)


def test_what_a_layer_reads_is_not_kept() -> None:
    layer, step = nn.Linear(1, 1, bias=False), torch.tensor(0.1, requires_grad=True)
    x = torch.rand(1000, 1, requires_grad=True)
    kept: list[Tensor] = []
    with recomputed(), torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        source = x * 2
        q = fake_quantize(source, step, 0.0, 7.0)
        again = again_of(q)
        assert isinstance(again, Again) and again.value is None
        y = apply(layer, q, layer.weight, None)
    large = {one.data_ptr() for one in kept if one.numel() == 1000}
    assert source.data_ptr() in large and q.data_ptr() not in large
    alive = weakref.ref(q)
    del q
    assert alive() is None  # nothing that autograd holds on to refers to it
    y.sum().backward()
    assert again.value is None  # made for the layer, used by the step, and gone
    assert torch.equal(again.get(), (x.detach() * 2 / 0.1).clamp(0, 7).round() * 0.1)
    assert again_of(fake_quantize(x, step, 0.0, 7.0)) is None  # it is over


def test_only_the_very_tensor_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    step, x = torch.tensor(0.5), torch.rand(64, requires_grad=True)
    with recomputed():
        q = fake_quantize(x, step, 0.0, 3.0)
        assert isinstance(again_of(q), Again)
        assert again_of(x) is None and again_of(q[:32]) is None and again_of(q.reshape(8, 8)) is None
        with torch.no_grad():
            q.add_(1)
        assert again_of(q) is None  # not what was made any more
        assert again_of(fake_quantize(x.bfloat16(), step, 0.0, 3.0)) is None
        assert again_of(fake_quantize(x.reshape(8, 8), torch.full((8, 1), 0.5), 0.0, 3.0)) is None
        with torch.no_grad():
            assert again_of(fake_quantize(x, step, 0.0, 3.0)) is None
        monkeypatch.setattr("nasq.quant.fake.WORTH", 65)
        assert again_of(fake_quantize(x, step, 0.0, 3.0)) is None
    assert recompute.WORTH == 2**18


def test_two_readers_and_a_second_backward_pass() -> None:
    step = torch.tensor(0.3, requires_grad=True)
    x, a, b = (torch.rand(6, 6, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    layer = nn.Linear(6, 6, bias=False)

    def run(forget: bool) -> list[Tensor]:
        with recomputed(forget):
            q = fake_quantize(x, step, 0.0, 3.0)
            assert (again_of(q) is not None) == forget
            y = apply(layer, q, a, None).sum() + apply(layer, q, b, None).square().sum()
        made: list[Tensor] = []
        for _ in range(2):
            made += torch.autograd.grad(y, (x, step, a, b), retain_graph=True)
        (first,) = torch.autograd.grad(y, (b,), create_graph=True)
        made += torch.autograd.grad(first.square().sum(), (x, step, b), retain_graph=True)
        (second,) = torch.autograd.grad(y, (step,), create_graph=True)
        return made + list(torch.autograd.grad(second.square().sum(), (x, step, b)))

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_a_change_in_place_is_still_found() -> None:
    x, weight = torch.rand(4, 4, requires_grad=True), torch.rand(4, 4, requires_grad=True)
    with recomputed():
        q = fake_quantize(x, torch.tensor(0.3), 0.0, 3.0)
        other = weight * 2
        with forgetting(q):
            y = q @ other
    with torch.no_grad():
        other.add_(1)
    with pytest.raises(RuntimeError, match=r"\[4, 4\], was modified by an in-place operation"):
        y.sum().backward()
