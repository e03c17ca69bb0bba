from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from nasq.errors import InputError
from nasq.space import Choice, SearchSpace, as_numpy


def test_a_numpy_generator_is_used_itself():
    rng = np.random.default_rng(0)
    assert as_numpy(rng) is rng


def test_a_torch_generator_advances_by_one_draw_whatever_is_asked():
    space = SearchSpace([Choice(f"c{i}", range(4)) for i in range(9)])
    one, many, plain = (torch.Generator().manual_seed(7) for _ in range(3))
    space.sample_batch(1, one)
    space.mutate(space.sample_batch(0, np.random.default_rng(0)), many)
    torch.randint(0, 2**63 - 1, (1,), generator=plain)
    assert torch.equal(one.get_state(), plain.get_state()) and torch.equal(many.get_state(), plain.get_state())
    assert space.sample(one) != space.sample(many.manual_seed(8))


def test_equal_seeds_give_equal_subnets():
    space = SearchSpace([Choice(f"c{i}", range(4)) for i in range(9)])
    a, b = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    assert space.sample(a) == space.sample(b)
    assert np.array_equal(space.sample_batch(5, a), space.sample_batch(5, b))


@pytest.mark.parametrize("wrong", [0, None, "seed", torch.zeros(1), np.random.RandomState(0)])
def test_a_seed_is_no_generator(wrong):
    with pytest.raises(InputError, match=r"rng is .*Give a"):
        as_numpy(wrong)


def test_space_and_targets_work_without_torch():
    code = (
        "import sys, numpy as np, nasq.space as s, nasq.targets as t; t.load('generic');"
        "rng = np.random.default_rng(0); space = s.SearchSpace([s.Choice('a', (1, 2))]);"
        "space.mutate(space.sample(rng), rng);"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
