from __future__ import annotations

from math import prod

from hypothesis import given, settings

from nasq.space import Choice, SearchSpace

from .spaces import every_subnet, nest, search_spaces


@given(search_spaces())
@settings(max_examples=300)
def test_size_equals_brute_force(space: SearchSpace):
    assert space.size == len({tuple(sorted(subnet.items())) for subnet in every_subnet(space)})


def test_a_nest_of_145_choices_by_formula():
    space = nest()
    block = 2 + 3 * 3 * 7**4
    assert len(space) == 145
    assert space.size == sum(block**depth for depth in range(1, 5)) ** 5


def test_unconditional_choices_multiply_and_no_choices_are_one_subnet():
    choices = [Choice(f"c{i}", range(2 + i)) for i in range(9)]
    assert SearchSpace(choices).size == prod(range(2, 11))
    assert SearchSpace([]).size == 1


def test_a_choice_shared_by_many_branches():
    # 60 gates of 3 options, the last option of each uses the same activation: 3^60 with it except where no gate does.
    gates = [Choice(f"g{i}", ("a", "b", "c")) for i in range(60)]
    act = Choice("act", ("relu", "relu6"))
    space = SearchSpace([*gates, act], {"act": [((gate.name, frozenset({"c"})),) for gate in gates]})
    assert space.size == 2**60 + 2 * (3**60 - 2**60)


def test_a_chain_of_many_shared_choices_does_not_explode():
    # s_i is used where gate i or gate i + 1 is on: a transfer matrix counts it.
    n = 80
    gates = [Choice(f"g{i}", (0, 1)) for i in range(n)]
    shared = [Choice(f"s{i}", (0, 1, 2)) for i in range(n - 1)]
    conditions = {f"s{i}": [((f"g{i}", frozenset({1})),), ((f"g{i + 1}", frozenset({1})),)] for i in range(n - 1)}
    off, on = 1, 1
    for _ in range(n - 1):
        off, on = off + 3 * on, 3 * (off + on)
    assert SearchSpace([*gates, *shared], conditions).size == off + on


def test_a_deep_nest():
    # Branch in branch in branch: each level adds one stop and one way on.
    n = 100
    choices = [Choice(f"c{i}", ("stop", "on")) for i in range(n)]
    conditions = {f"c{i}": [tuple((f"c{j}", frozenset({"on"})) for j in range(i))] for i in range(1, n)}
    assert SearchSpace(choices, conditions).size == n + 1
