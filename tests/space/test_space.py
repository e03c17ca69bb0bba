from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import ArtifactError, InputError
from nasq.space import Choice, SearchSpace, Subnet

from .spaces import active_names, every_subnet, nest, search_spaces

DEPTH = Choice("depth", (1, 2, 3))
OP = Choice("op", ("conv", "pool"), default="pool")
KERNEL = Choice("kernel", (3, 5, 7), default=5)
WIDTH = Choice("width", (8, 16))
CONDITIONS = {
    "op": [(("depth", frozenset({2, 3})),)],
    "kernel": [(("depth", frozenset({2, 3})), ("op", frozenset({"conv"}))), (("depth", frozenset({3})),)],
}
SPACE = SearchSpace([DEPTH, OP, KERNEL, WIDTH], CONDITIONS, name="small")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_order_is_parents_first_and_otherwise_as_given():
    space = SearchSpace([KERNEL, WIDTH, OP, DEPTH], CONDITIONS)
    assert space.names == ("width", "depth", "op", "kernel")
    assert SPACE.names == ("depth", "op", "kernel", "width")
    assert len(SPACE) == 4 and SPACE["op"] is OP and SPACE.positions["kernel"] == 2
    assert SPACE.sizes.tolist() == [3, 2, 3, 2]


def test_size_by_hand():
    # depth 1: nothing; depth 2: conv with 3 kernels or pool; depth 3: 2 operators x 3 kernels. Times 2 widths.
    assert SPACE.size == (1 + (3 + 1) + 6) * 2
    assert repr(SPACE) == "SearchSpace('small', 4 choices, 22 subnets)"


@given(search_spaces(), st.integers(0, 2**32))
@settings(max_examples=150)
def test_rows_and_subnets_agree(space: SearchSpace, seed):
    raw = rng(seed).integers(0, space.sizes, size=(7, len(space))).astype(np.int16)
    rows = space.canonical(raw)
    subnets = space.to_subnets(raw)
    assert rows.dtype == np.int16
    assert np.array_equal(space.canonical(rows), rows)
    assert np.array_equal(space.active(rows), space.active(raw))
    for number, subnet in enumerate(subnets):
        options = {choice.name: choice.options[index] for choice, index in zip(space.choices, raw[number], strict=True)}
        active = active_names(space, options)
        assert subnet == {name: options[name] for name in active}
        assert space.canonical(subnet) == space.canonical(Subnet(options)) == subnet
        space.validate(subnet)
        assert space.contains(subnet)
        assert space.contains(Subnet(options)) == (len(active) == len(options))
    assert np.array_equal(space.to_rows(subnets), rows)
    assert space.to_subnets(rows) == subnets
    assert np.array_equal(space.sample_batch(1, rng(seed)), space.to_rows([space.sample(rng(seed))]))


@given(search_spaces(most=5))
def test_encode_tells_canonical_subnets_apart(space: SearchSpace):
    subnets = list(dict.fromkeys(Subnet(options) for options in every_subnet(space)))
    codes = space.encode(subnets)
    assert codes.dtype == np.float32 and codes.shape == (len(subnets), sum(len(c.options) for c in space.choices))
    assert len({code.tobytes() for code in codes}) == len(subnets) == space.size
    assert codes.sum(axis=1).tolist() == [len(subnet) for subnet in subnets]
    assert np.array_equal(codes, space.encode(space.to_rows(subnets)))
    assert np.array_equal(codes[:1], space.encode(subnets[0]))


def test_encode_by_hand():
    assert SPACE.encode({"depth": 2, "op": "conv", "kernel": 7, "width": 8}).tolist() == [
        [0, 1, 0, 1, 0, 0, 0, 1, 1, 0]
    ]
    assert SPACE.encode({"depth": 1, "width": 16}).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0, 1]]


@given(search_spaces())
def test_json_round_trip(space: SearchSpace):
    again = SearchSpace.from_json(space.to_json())
    assert again == space and hash(again) == hash(space)
    assert again.choices == space.choices and again.conditions == space.conditions and again.size == space.size
    assert again.fingerprint == space.fingerprint and len(space.fingerprint) == 16
    assert pickle.loads(pickle.dumps(space)) == space == copy.deepcopy(space)


def test_the_fingerprint_sees_options_defaults_and_conditions():
    others = [
        SearchSpace([DEPTH, OP, KERNEL, WIDTH], name="small"),
        SearchSpace([DEPTH, OP, KERNEL, Choice("width", (8, 16), default=8)], CONDITIONS, name="small"),
        SearchSpace([DEPTH, OP, KERNEL, Choice("width", (8, 16.0))], CONDITIONS, name="small"),
        SPACE.restrict({"kernel": (3, 5)}),
    ]
    assert len({space.fingerprint for space in [SPACE, *others]}) == 5
    assert SPACE.fingerprint == SearchSpace([DEPTH, OP, KERNEL, WIDTH, WIDTH], CONDITIONS, "small").fingerprint


@given(search_spaces(), st.data())
@settings(max_examples=150)
def test_restrict_keeps_exactly_the_subnets_that_use_allowed_options(space: SearchSpace, data: st.DataObject):
    allowed = {
        choice.name: data.draw(st.lists(st.sampled_from(choice.options), min_size=1, unique_by=repr))
        for choice in space.choices
        if data.draw(st.booleans())
    }
    smaller = space.restrict(allowed)
    assert smaller.size <= space.size
    keep = {name: set(map(repr, options)) for name, options in allowed.items()}
    expected = {
        Subnet(options)
        for options in every_subnet(space)
        if all(repr(option) in keep.get(name, {repr(option)}) for name, option in options.items())
    }
    assert {Subnet(options) for options in every_subnet(smaller)} == expected
    for subnet in smaller.to_subnets(smaller.sample_batch(5, rng())):
        assert space.contains(subnet)
    for choice in smaller.choices:
        original = space[choice.name]
        assert choice.options == tuple(o for o in original.options if repr(o) in keep.get(choice.name, {repr(o)}))
        assert choice.ordered == original.ordered
        assert choice.default == original.default or original.default not in choice


def test_restrict_drops_what_can_never_be_active():
    assert SPACE.restrict({"depth": (1,)}).names == ("depth", "width")
    two = SPACE.restrict({"depth": (1, 2)})
    assert two.conditions["kernel"] == ((("depth", frozenset({2})), ("op", frozenset({"conv"}))),)
    assert two["depth"].default == 2 and two["op"].default == "pool"
    assert SPACE.restrict({"op": ["conv"]})["op"].default == "conv"
    assert SPACE.restrict({"depth": (3,)}).conditions == {}
    assert SPACE.restrict({}) == SPACE


def test_smallest_largest_and_default():
    assert SPACE.default() == {"depth": 3, "op": "pool", "kernel": 5, "width": 16}
    assert SPACE.smallest() == {"depth": 1, "width": 8}
    assert SPACE.largest() == {"depth": 3, "op": "pool", "kernel": 7, "width": 16}
    unordered = SearchSpace(
        [Choice("a", (1, 2, 3), default=2, ordered=False), Choice("b", (False, True), default=True)]
    )
    assert unordered.smallest() == unordered.largest() == unordered.default() == {"a": 2, "b": True}
    assert SearchSpace([Choice("stride", (2, 1))]).largest() == {"stride": 1}


def test_a_space_without_choices_has_one_empty_subnet():
    space = SearchSpace([])
    empty = Subnet()
    assert space.size == 1 and len(space) == 0
    assert space.sample(rng()) == space.default() == space.smallest() == space.largest() == empty
    assert space.mutate(empty, rng()) == space.crossover(empty, empty, rng()) == empty
    assert space.sample_batch(3, rng()).shape == (3, 0) and space.encode(empty).shape == (1, 0)
    assert list(space.neighbours(empty)) == [] and space.contains(empty) and space.restrict({}) == space
    assert SearchSpace.from_json(space.to_json()) == space


def test_samples_are_uniform_over_options_and_independent():
    rows = SearchSpace([WIDTH, KERNEL]).sample_batch(60_000, rng(1))
    counts = np.bincount(rows[:, 0] * 3 + rows[:, 1], minlength=6)
    # Each cell has mean 10,000 and standard deviation 91.
    assert np.abs(counts - 10_000).max() < 5 * 91


def test_a_parent_that_is_inactive_holds_nothing_even_where_only_the_nearest_parent_is_named():
    space = SearchSpace(
        [Choice("a", (0, 1)), Choice("b", (0, 1)), Choice("c", (0, 1))],
        {"b": [(("a", frozenset({1})),)], "c": [(("b", frozenset({0, 1})),)]},
    )
    assert space.size == 1 + 4
    assert space.canonical(np.array([[0, 1, 0]], dtype=np.int16)).tolist() == [[0, 1, 1]]


def test_conditions_are_simplified():
    everywhere = SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({1})),), ()]})
    assert everywhere.conditions == {}
    all_options = SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({1, 2, 3})),)]})
    assert all_options.conditions == {}
    absorbed = SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({3})),), (("depth", frozenset({2, 3})),)] * 2})
    assert absorbed.conditions == {"op": ((("depth", frozenset({2, 3})),),)}
    nested = SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({2, 3})), ("depth", frozenset({1, 2})))]})
    assert nested.conditions == {"op": ((("depth", frozenset({2})),),)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SearchSpace([DEPTH, Choice("depth", (1, 2))]), "two different choices are named 'depth'.*rename one"),
        (lambda: SearchSpace(["depth"]), "given 'depth' as a choice"),
        (lambda: SearchSpace([DEPTH], {"dept": []}), "unknown choice in the conditions 'dept'. Did you mean 'depth'"),
        (lambda: SearchSpace([DEPTH, OP], {"op": [(("dep", frozenset({1})),)]}), "conditions of 'op': 'dep'. Did you"),
        (lambda: SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({4})),)]}), "choice 'depth' has no option 4"),
        (lambda: SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({True})),)]}), "has no option True"),
        (lambda: SearchSpace([OP, DEPTH], {"depth": [(("op", "conv"),)]}), "'depth' on 'op' is 'conv'. Give a set"),
        (lambda: SearchSpace([DEPTH, OP], {"op": []}), "choice 'op' can never be active"),
        (lambda: SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset()),)]}), "choice 'op' can never be active"),
        (
            lambda: SearchSpace([DEPTH, OP], {"op": [(("depth", frozenset({1})), ("depth", frozenset({2})))]}),
            "choice 'op' can never be active: no options of its parents lead to it",
        ),
        (
            lambda: SearchSpace(
                [DEPTH, OP, WIDTH], {"op": [(("depth", frozenset({1})),)], "depth": [(("op", frozenset({"conv"})),)]}
            ),
            "the choices 'depth', 'op' wait for each other",
        ),
        (lambda: SearchSpace([Choice("many", range(40_000))]), "'many' has 40000 options. Allowed: 32767"),
        (lambda: SPACE["widht"], "unknown choice 'widht'. Did you mean 'width'"),
        (lambda: SPACE.sample_batch(-1, rng()), "cannot sample -1 subnets"),
        (lambda: SPACE.restrict({"widht": (8,)}), "unknown choice 'widht'. Did you mean 'width'"),
        (lambda: SPACE.restrict({"width": (9,)}), "choice 'width' has no option 9. Allowed: 8, 16"),
        (lambda: SPACE.restrict({"width": ()}), r"'width' is restricted to no option. Keep one of \[8, 16\]"),
        (lambda: SPACE.restrict({"op": "conv"}), r"'op' is restricted to 'conv'. Give a tuple of options: \('conv',\)"),
        (lambda: SPACE.restrict({"width": 8}), r"Give a tuple of options: \(8,\)"),
        (lambda: SPACE.active(np.zeros((2, 3), dtype=np.int16)), r"shape \(2, 3\) and type int16.*\[n, 4\]"),
        (lambda: SPACE.active(np.zeros(4, dtype=np.int16)), r"shape \(4,\)"),
        (lambda: SPACE.canonical(np.zeros((1, 4))), "type float64"),
        (lambda: SPACE.canonical(np.array([[0, 2, 0, 0]])), "row 0 has the option index 2 for choice 'op'.* 0 to 1"),
        (lambda: SPACE.canonical(np.array([[0, 0, -1, 0]])), "option index -1 for choice 'kernel'"),
        (lambda: SPACE.canonical(np.array([[2**40, 0, 0, 0]])), "option index 1099511627776 for choice 'depth'"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        ({"depth": 1, "widht": 8}, "unknown choice 'widht'. Did you mean 'width'.*Allowed: depth, kernel, op, width"),
        ({"depth": 4, "width": 8}, "choice 'depth' has no option 4. Allowed: 1, 2, 3"),
        ({"depth": True, "width": 8}, "choice 'depth' has no option True"),
        ({"depth": 1}, "no option for the active choice 'width'"),
        ({}, "no option for the active choices 'depth', 'op', 'kernel', 'width'"),
        ({"depth": 2, "op": "conv", "width": 8}, "active choice 'kernel'"),
        (
            {"depth": 1, "width": 8, "kernel": 3},
            "options for 'kernel', which it does not use: 'kernel' is active only if .*"
            "'depth' is 2 or 3 and 'op' is 'conv'.*; or 'depth' is 3|"
            "options for 'kernel'.*'depth' is 3; or 'depth' is 2 or 3 and 'op' is 'conv'",
        ),
        ("depth", "a subnet is 'depth'. Give a Subnet"),
    ],
)
def test_validate_says_what_is_wrong(subnet, message):
    with pytest.raises(InputError, match=message):
        SPACE.validate(subnet)
    assert not SPACE.contains(subnet)


def _changed(**fields: object) -> str:
    return json.dumps({**json.loads(SPACE.to_json()), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        (SPACE.to_json()[:-5], "corrupt or truncated"),
        ("[]", "cannot be read"),
        ("{}", "KeyError.'schema'"),
        (_changed(schema=2), "has the schema 2; this nasq reads schema 1. Install"),
        (_changed(schema=True), "has the schema True"),
        (_changed(choices=3), "not valid"),
        (_changed(choices=[{"name": "a", "options": []}]), "not valid"),
        (_changed(conditions=[]), "not valid"),
        (_changed(conditions={"op": [[["depth", [9]]]]}), "choice 'depth' has no option 9"),
        (_changed(conditions={"op": [[["depth", [[9]]]]]}), "not valid"),
        ('{"schema":1,"schema":1}', "duplicate key 'schema'"),
    ],
)
def test_corrupt_json_is_refused(text, message):
    with pytest.raises(ArtifactError, match=message):
        SearchSpace.from_json(text)


def test_the_parts_of_a_space_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        SPACE.sizes[0] = 9
    with pytest.raises(TypeError):
        SPACE.positions["depth"] = 3
    with pytest.raises(TypeError):
        SPACE.conditions["op"] = ()


def test_a_big_nest_has_canonical_rows():
    space = nest()
    rows = space.sample_batch(300, rng())
    assert np.array_equal(space.canonical(rows), rows)
    assert np.array_equal(space.to_rows(space.to_subnets(rows)), rows)
    shallow = rows[:, space.positions["s0.depth"]] == 0
    assert not space.active(rows)[shallow][:, space.positions["s0.b1.op"]].any()
