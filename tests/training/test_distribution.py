from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator, quantized_supernet, tiny_images, tiny_supernet
from scipy import stats
from torch import nn

from nasq.data import AugmentPolicy
from nasq.errors import InputError
from nasq.training import TrainConfig, Trainer, WeightDistribution
from nasq.training.distribution import moments


def uniform(count: int) -> torch.Tensor:
    return torch.linspace(-1, 1, count)


def test_moments_are_scipys_with_the_unbiased_deviation() -> None:
    w = torch.randn(8, 4, 3, 3, generator=generator(0)).double().exp()
    skewness, kurtosis = moments(w.float())
    n = w.numel()
    shrink = math.sqrt((n - 1) / n)  # scipy divides by n
    assert float(skewness) == pytest.approx(stats.skew(w.flatten()) * shrink**3, rel=1e-4)
    assert float(kurtosis) == pytest.approx(stats.kurtosis(w.flatten(), fisher=False) * shrink**4, rel=1e-4)


def test_uniform_gaussian_and_symmetric_weights() -> None:
    """Property 9 of EQ-Net: about 0 for a uniform tensor, 1.44 for a Gaussian, no skewness for symmetric values."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(300, 300))
    penalty = WeightDistribution(net, skewness=1.0, kurtosis=1.0)
    with torch.no_grad():
        net[1].weight.copy_(uniform(90_000).reshape(300, 300))
    assert float(penalty().detach()) < 1e-4
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(300, 300, generator=generator(0)))
    assert float(penalty().detach()) == pytest.approx((3 - 1.8) ** 2, abs=0.15)
    half = torch.rand(500, generator=generator(1)).exp()
    assert abs(float(moments(torch.cat([half, -half]))[0])) < 1e-5


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 100), st.floats(-3, 3), st.integers(0, 100))
def test_affine_changes_of_the_weights_change_nothing(scale: float, shift: float, seed: int) -> None:
    w = torch.randn(400, generator=generator(seed)).double().exp()
    plain, moved = moments(w), moments(scale * (w + shift))
    assert float(moved[0]) == pytest.approx(float(plain[0]), rel=1e-2)
    assert float(moved[1]) == pytest.approx(float(plain[1]), rel=1e-2)


@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
def test_a_constant_weight_costs_nothing_and_pulls_nowhere(value: float) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 8))
    nn.init.constant_(net[1].weight, value)
    penalty = WeightDistribution(net)()
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(0, abs=1e-12) and not bool(net[1].weight.grad.any())


def test_the_first_layer_is_left_out_and_the_mean_is_over_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    penalty = WeightDistribution(net, 0.5, 0.25)
    wanted = 0.0
    for layer in (net[2], net[4]):
        skewness, kurtosis = moments(layer.weight.detach())
        wanted += (0.5 * float(skewness) ** 2 + 0.25 * (float(kurtosis) - 1.8) ** 2) / 2
    value = penalty()
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-5)
    value.backward()
    assert net[0].weight.grad is None and net[2].weight.grad is not None and net[4].weight.grad is not None


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"weight of skewness is -1; allowed: a number, 0 or more"):
        WeightDistribution(nn.Sequential(nn.Linear(4, 4), nn.Linear(8, 8)), skewness=-1)
    with pytest.raises(InputError, match="needs a convolution or linear layer behind the first"):
        WeightDistribution(nn.Linear(8, 8))


def test_training_adds_it_once_per_step_and_it_flattens_the_weights() -> None:
    data = tiny_images(32)
    config = TrainConfig(epochs=1, batch_size=16, lr=0.01, warmup_epochs=0, bf16=False)
    calls: list[float] = []
    supernet = quantized_supernet()
    penalty = WeightDistribution(supernet, 1.0, 0.5)

    def counted() -> torch.Tensor:
        calls.append(float(penalty().detach()))
        return penalty()

    Trainer(supernet, data, config, augment=AugmentPolicy(), penalty=counted).run()
    assert len(calls) == 2
    flat, plain = tiny_supernet(), tiny_supernet()
    longer = replace(config, epochs=8, sampler="uniform", distill=0.0)
    Trainer(plain, data, longer).run()
    Trainer(flat, data, replace(longer, skewness=1.0, kurtosis=0.5)).run()
    assert float(WeightDistribution(flat, 1.0, 0.5)().detach()) < 0.8 * float(
        WeightDistribution(plain, 1.0, 0.5)().detach()
    )
