from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from nasq import Choice
from nasq.errors import ArtifactError, InputError
from nasq.search.predictors import CQAP, Fit, Pairs, quality
from nasq.search.predictors.cqap import _ridge
from nasq.space import SearchSpace

SPACE = SearchSpace(
    [
        Choice("depth", (1, 2)),
        *(Choice(f"layer{index}.bits", (2, 4, 8)) for index in range(5)),
        Choice("form", ("tensor", "channel"), ordered=False),
        Choice("inner.bits", (2, 4)),
    ],
    {"inner.bits": [(("depth", (2,)),)]},
)
SMALL = Fit(epochs=40, lr=2e-3)


def truth(rows: np.ndarray) -> np.ndarray:
    """Saturating in the bits, other layers matter otherwise, and the form decides how much."""
    bits = np.array([2.0, 4.0, 8.0])[rows[:, 1:6]]
    loss = (np.array([1, 3, 0.5, 2, 0.2]) * 2.0**-bits).sum(1)
    return 90 - 8 * loss * (1 + rows[:, 6]) + rows[:, 0]


def pairs(count: int, seed: int = 0) -> Pairs:
    rows = SPACE.sample_batch(count, np.random.default_rng(seed))
    return Pairs(rows, truth(rows))


def test_it_learns_a_function_that_average_bits_do_not_tell() -> None:
    predictor = CQAP(SPACE, hidden=64, layers=3)
    error = predictor.fit(pairs(400), SMALL)
    unseen = pairs(300, 1)
    found = quality(predictor(unseen.rows), unseen.values)
    trivial = quality(unseen.rows[:, 1:6].mean(1), unseen.values)
    assert found.kendall > 0.85 > trivial.kendall and found.rmse < 1.0
    assert 0 < error < 1.5 and predictor.kendall(unseen) == found.kendall


def test_few_pairs_are_enough_for_the_linear_part() -> None:
    few, unseen = pairs(60), pairs(300, 1)
    both, published = CQAP(SPACE, 64, 3), CQAP(SPACE, 64, 3, linear=False)
    both.fit(few, SMALL)
    published.fit(few, SMALL)
    assert both.kendall(unseen) > published.kendall(unseen)


def test_weights_that_may_only_rise_are_the_bounded_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, y, decay = rng.normal(size=(60, 6)), rng.normal(size=60), 2.0
    rising = np.array([True, False, True, True, False, True])
    found = _ridge(torch.from_numpy(x), torch.from_numpy(y), decay, rising).numpy()
    rows = np.concatenate([x, np.sqrt(decay) * np.eye(6)])
    reference = lsq_linear(rows, np.concatenate([y, np.zeros(6)]), (np.where(rising, 0, -np.inf), np.inf), tol=1e-12)
    assert np.abs(found - reference.x).max() < 1e-6
    free = _ridge(torch.from_numpy(x), torch.from_numpy(y), decay, None).numpy()
    assert (free[rising] < -0.01).any() and (found[rising] >= 0).all() and (found[~rising] < 0).any()


def test_a_linear_truth_is_learned_to_the_last_digits() -> None:
    """Independent reference: the truth is a sum over options, whose coefficients the code can hold exactly."""
    rows = SPACE.sample_batch(300, np.random.default_rng(2))
    values = (rows[:, 1:6] * [1.0, 3.0, 0.5, 2.0, 0.2]).sum(1) + 5 * rows[:, 6]
    predictor = CQAP(SPACE, 16, 2)
    error = predictor.fit(Pairs(rows, values), Fit(epochs=1))
    assert error < 0.02 < 0.1 < values.std()


def test_distinct_subnets_have_distinct_codes_with_one_bit_per_active_choice() -> None:
    """Property 12 of EQ-Net."""
    rows = np.unique(SPACE.sample_batch(400, np.random.default_rng(0)), axis=0)
    codes = SPACE.encode(rows)
    assert len(np.unique(codes, axis=0)) == len(rows)
    assert set(np.unique(codes)) == {0.0, 1.0}
    assert np.array_equal(codes.sum(1), SPACE.active(rows).sum(1))


def test_the_network_is_the_released_one() -> None:
    network = CQAP(SPACE, linear=False).network
    layers = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
    assert [(part.in_features, part.out_features, part.bias is None) for part in layers] == [
        (int(SPACE.sizes.sum()), 200, False), *[(200, 200, False)] * 6, (200, 1, True),
    ]  # fmt: skip


def test_a_fit_is_repeatable_and_leaves_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    one, other = CQAP(SPACE, 16, 2), CQAP(SPACE, 16, 2)
    torch.rand(3)
    torch.set_rng_state(before)
    assert one.fit(pairs(60), Fit(epochs=3)) == other.fit(pairs(60), Fit(epochs=3))
    rows = pairs(20, 3).rows
    assert np.array_equal(one(rows), other(rows))
    assert torch.equal(torch.get_rng_state(), before)
    other.fit(pairs(60), Fit(epochs=3, seed=1))
    assert not np.array_equal(one(rows), other(rows))


def test_it_is_an_objective_and_survives_the_disk(tmp_path: Path) -> None:
    predictor = CQAP(SPACE, 16, 2)
    predictor.fit(pairs(60), Fit(epochs=3))
    rows = pairs(20, 3).rows
    objective = predictor.objective()
    assert (objective.on, objective.direction, objective.unit) == ("rows", "maximize", "%")
    assert np.array_equal(objective.measure(rows), predictor(rows))
    predictor.save(tmp_path / "p.safetensors")
    again = CQAP(SPACE, 16, 2)
    again.load(tmp_path / "p.safetensors")
    assert np.array_equal(again(rows), predictor(rows))
    with pytest.raises(ArtifactError, match="cannot be read as a predictor"):
        CQAP(SPACE, 8, 2).load(tmp_path / "p.safetensors")
    with pytest.raises(ArtifactError, match="belongs to a space with fingerprint"):
        CQAP(SearchSpace([Choice("a", (1, 2))]), 16, 2).load(tmp_path / "p.safetensors")
    (tmp_path / "p.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="cannot be read as a predictor"):
        again.load(tmp_path / "p.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read as a predictor"):
        again.load(tmp_path / "absent.safetensors")


def test_refusals() -> None:
    with pytest.raises(InputError, match="learned nothing yet"):
        CQAP(SPACE)(pairs(3).rows)
    flat = pairs(20)
    with pytest.raises(InputError, match=r"all 18 values are 1\.0: there is nothing to predict"):
        CQAP(SPACE).fit(Pairs(flat.rows, np.ones(20)))
    with pytest.raises(InputError, match="leaves one part empty"):
        CQAP(SPACE).fit(pairs(2))
    with pytest.raises(InputError, match="held_out between 0 and 1"):
        Fit(held_out=1.0)


def test_quality_is_the_pairwise_definition() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(size=40)
    b += a
    concordant = sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i in range(40) for j in range(i))
    found = quality(a, b)
    assert found.kendall == pytest.approx(concordant / (40 * 39 / 2))
    assert found.rmse == pytest.approx(float(np.sqrt(((a - b) ** 2).mean()))) and found.count == 40
    assert quality(a, b, a > 0).count == int((a > 0).sum())
    with pytest.raises(InputError, match="no rank correlation exists for 2 pairs"):
        quality(a[:2], b[:2])
    with pytest.raises(InputError, match="no rank correlation exists for 40 pairs"):
        quality(np.ones(40), b)
