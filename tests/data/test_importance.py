from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.data import DataSampler
from nasq.data.importance import ImportanceSampler, draw, fold, linear_smoothing, logit_gradient_norm, smoothed
from nasq.errors import InputError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sampler(n: int = 40, epochs: int = 4, seed: int = 0, **options: object) -> ImportanceSampler:
    return ImportanceSampler(n, _generator(seed), epochs, **options)  # type: ignore[arg-type]


def test_the_statistic_is_the_gradient_of_the_loss_with_respect_to_the_logits() -> None:
    logits = torch.randn(20, 7, generator=_generator(), dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (20,), generator=_generator(1))
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    assert logits.grad is not None
    torch.testing.assert_close(logit_gradient_norm(logits.detach(), labels), logits.grad.norm(dim=1))


def test_the_statistic_is_zero_where_all_is_right_and_root_two_where_all_is_wrong() -> None:
    sure = torch.tensor([[1000.0, 0.0, 0.0], [1000.0, 0.0, 0.0]])
    assert logit_gradient_norm(sure, torch.tensor([0, 1])).tolist() == pytest.approx([0.0, math.sqrt(2)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.floats(0, 1))
def test_a_smoothed_distribution_sums_to_one_and_keeps_its_floor(values: list[float], importance: float) -> None:
    p = smoothed(torch.tensor(values), importance)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(p.min()) >= (1 - importance) / len(values) * (1 - 1e-9)
    if len(set(values)) == 1:
        assert p.tolist() == pytest.approx([1 / len(values)] * len(values))


def test_folding_is_the_loop_over_occurrences() -> None:
    generator = _generator(3)
    running, seen = torch.zeros(6), torch.zeros(6, dtype=torch.bool)
    slow: dict[int, float] = {}
    for _ in range(5):
        at = torch.randint(0, 6, (9,), generator=generator)
        values = torch.rand(9, generator=generator)
        fold(running, seen, at, values)
        for index, value in zip(at.tolist(), values.tolist(), strict=True):
            slow[index] = (slow[index] + value) / 2 if index in slow else value
    assert seen.tolist() == [index in slow for index in range(6)]
    assert running.tolist() == pytest.approx([slow.get(index, 0.0) for index in range(6)], rel=1e-6)


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    counts = draw(p, 10_000, _generator()).bincount(minlength=4)
    assert counts[1] == 0
    expected = 10_000 * p[p > 0]
    # Chi-square, 2 degrees of freedom: above 13.8 in 1 of 1,000 draws.
    assert float(((counts[p > 0] - expected) ** 2 / expected).sum()) < 13.8


def test_the_first_epoch_visits_every_sample_once() -> None:
    sampler = _sampler()
    assert isinstance(sampler, DataSampler)
    assert sorted(sampler.indices(0).tolist()) == list(range(40))
    assert sampler.weights(torch.arange(3)) is None


def _after_an_epoch(hard: int, **options: object) -> ImportanceSampler:
    """A sampler that saw every sample once; ``hard`` is wrong with certainty, all others are half right."""
    sampler = _sampler(**options)
    sampler.indices(0)
    logits = torch.zeros(40, 2)
    logits[hard] = torch.tensor([-50.0, 50.0])
    sampler.observe(torch.arange(40), logits, torch.zeros(40, dtype=torch.int64))
    return sampler


def test_a_hard_sample_is_drawn_in_proportion() -> None:
    sampler = _after_an_epoch(7)
    indices = sampler.indices(2)
    assert sampler.probabilities is not None and indices.shape == (40,)
    importance, half = 0.5, math.sqrt(0.5)
    expected = importance * math.sqrt(2) / (39 * half + math.sqrt(2)) + (1 - importance) / 40
    assert float(sampler.probabilities[7]) == pytest.approx(expected)
    assert int(indices.min()) >= 0 and int(indices.max()) < 40
    many = draw(sampler.probabilities, 40_000, _generator(5)).bincount(minlength=40)
    assert int(many[7]) == pytest.approx(40_000 * expected, rel=0.1)


def test_samples_that_were_not_drawn_count_as_zero_unless_kept() -> None:
    for keep in (False, True):
        sampler = _after_an_epoch(7, keep=keep)
        sampler.indices(1)
        sampler.observe(torch.tensor([3]), torch.zeros(1, 2), torch.tensor([0]))
        sampler.indices(3)
        assert sampler.probabilities is not None
        forgotten = float(sampler.probabilities[7]) == pytest.approx(0.25 / 40)
        assert forgotten is not keep


def test_reweighting_makes_the_gradient_unbiased_and_importance_lowers_its_variance() -> None:
    generator = _generator(1)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    x[:4] *= 20  # a few samples have most of the gradient
    y = torch.randn(40, generator=generator, dtype=torch.float64)
    gradients = 2 * (x @ torch.ones(3, dtype=torch.float64) - y)[:, None] * x  # of (w.x - y)^2 at w = 1
    full = gradients.mean(0)

    def spread(p: torch.Tensor) -> float:
        estimates = gradients / (40 * p[:, None])
        mean = (p[:, None] * estimates).sum(0)
        torch.testing.assert_close(mean, full)  # the exact expectation over draws
        return float((p * (estimates - full).square().sum(1)).sum())

    optimal = smoothed(gradients.norm(dim=1), 1.0)
    assert spread(optimal) < spread(smoothed(gradients.norm(dim=1), 0.0))
    sampler = _after_an_epoch(7, reweight=True)
    indices = sampler.indices(2)
    weights = sampler.weights(indices)
    assert weights is not None and sampler.probabilities is not None
    drawn = draw(sampler.probabilities, 200_000, generator)
    every = sampler.weights(drawn)
    assert every is not None
    estimate = (gradients[drawn] * every[:, None]).mean(0)
    torch.testing.assert_close(estimate, full, rtol=0.05, atol=0.05 * float(full.norm()))


def test_the_schedule_starts_uniform_rises_and_stays_below_one() -> None:
    values = [linear_smoothing(epoch, 10) for epoch in range(10)]
    assert values[0] == 0 and values == sorted(set(values)) and values[-1] < 1


def test_the_state_goes_on_where_it_was() -> None:
    sampler, other = _after_an_epoch(7), _sampler(seed=9)
    sampler.indices(1)
    sampler.observe(torch.arange(20), torch.randn(20, 2, generator=_generator(2)), torch.ones(20, dtype=torch.int64))
    other.load_state_dict(sampler.state_dict())
    assert other.indices(2).tolist() == sampler.indices(2).tolist()
    assert sampler.probabilities is not None and other.probabilities is not None
    assert torch.equal(sampler.probabilities, other.probabilities)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="needs n of 1 or more; got n = 0"):
        _sampler(0)
    with pytest.raises(InputError, match="needs epochs of 1 or more; got epochs = 0"):
        _sampler(epochs=0)
    with pytest.raises(InputError, match="state is that of 40 samples; this data set has 30"):
        _sampler(30).load_state_dict(_sampler(40).state_dict())
    with pytest.raises(InputError, match=r"share of importance in epoch 1 is 2\.0; allowed: 0 to 1"):
        _after_an_epoch(7, importance=lambda epoch, epochs: 2.0).indices(1)
    broken = _sampler()
    broken.observe(torch.arange(1), torch.full((1, 2), math.nan), torch.tensor([0]))
    with pytest.raises(InputError, match="logits were NaN"):
        broken.indices(1)
