from __future__ import annotations

import numpy as np
import pytest

from nasq.errors import InputError
from nasq.search import transferred
from nasq.space import Choice, SearchSpace, Subnet

from .toy import Costs, joint_space, limit

SPACE = joint_space()


def test_members_stay_as_they_are_and_come_once() -> None:
    subnets = SPACE.to_subnets(SPACE.sample_batch(20, np.random.default_rng(0)))
    assert transferred(SPACE, [], [*subnets, *subnets[:5]]) == list(dict.fromkeys(subnets))


def test_what_breaks_a_constraint_is_left_out() -> None:
    subnets = list(SPACE.to_subnets(SPACE.sample_batch(40, np.random.default_rng(0))))
    costs = Costs(SPACE)
    sizes = costs(SPACE.to_rows(subnets))["bytes"]
    middle = float(np.median(sizes))
    wanted = [subnet for subnet, size in zip(subnets, sizes, strict=True) if size <= middle]
    assert transferred(SPACE, [limit(costs, "bytes", upper=middle)], subnets) == list(dict.fromkeys(wanted))
    with pytest.raises(InputError, match=r"none of the 40 subnets .* each breaks bytes <= 1 B.*without --warm-start"):
        transferred(SPACE, [limit(costs, "bytes", upper=1.0)], subnets)


def test_options_of_another_space_become_the_nearest_ones() -> None:
    here = SearchSpace([
        Choice("width", (8, 16, 32)), Choice("op", ("conv", "pool"), ordered=False), Choice("bits", (2, 4, 8)),
        Choice("flag", (False, True), ordered=False),
    ])  # fmt: skip
    there = Subnet({"width": 20, "op": "attention", "kernel": 5, "flag": 3})
    # The nearest width; an operator that is not here, and a number for a truth value: the default; bits are only here.
    assert transferred(here, [], [there]) == [Subnet({"width": 16, "op": "conv", "bits": 8, "flag": False})]
    with pytest.raises(
        InputError, match=r"no choice of the other search is in the space .*kernel.*this one width, op, bits"
    ):
        transferred(here, [], [Subnet({"kernel": 3})])


def test_a_conditional_choice_appears_where_it_becomes_active() -> None:
    shallow, deep = joint_space(4), joint_space(6)
    subnet = shallow.largest()
    (found,) = transferred(deep, [], [subnet])
    assert deep.contains(found)
    assert {name: found[name] for name in found if name in subnet and name != "depth"} == {
        name: subnet[name] for name in subnet if name in found and name != "depth"
    }
