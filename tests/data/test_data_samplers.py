from __future__ import annotations

import pytest
import torch

from nasq.data import DataSampler, UniformSampler
from nasq.errors import InputError


def _sampler(n: int = 50, seed: int = 0) -> UniformSampler:
    return UniformSampler(n, torch.Generator().manual_seed(seed))


def test_every_epoch_is_another_permutation() -> None:
    sampler = _sampler()
    assert isinstance(sampler, DataSampler)
    epochs = [sampler.indices(epoch) for epoch in range(3)]
    for indices in epochs:
        assert indices.dtype == torch.int64
        assert sorted(indices.tolist()) == list(range(50))
    assert len({tuple(indices.tolist()) for indices in epochs}) == 3
    assert sampler.weights(epochs[0]) is None


def test_the_state_goes_on_where_it_was() -> None:
    sampler, other = _sampler(), _sampler(seed=5)
    sampler.indices(0)
    state = sampler.state_dict()
    after = [sampler.indices(epoch).tolist() for epoch in (1, 2)]
    sampler.observe(torch.arange(2), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    other.load_state_dict(state)
    assert [other.indices(epoch).tolist() for epoch in (1, 2)] == after


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="needs at least one sample; got n = 0"):
        _sampler(0)
    with pytest.raises(InputError, match="state is that of 50 samples; this data set has 40"):
        _sampler(40).load_state_dict(_sampler(50).state_dict())
