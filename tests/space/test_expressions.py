from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.space import (
    Choice,
    Expression,
    Function,
    Lookup,
    SearchSpace,
    choices_of,
    maximum_of,
    maximum_of_size,
    minimum_of,
    round_to,
    value_of,
    values_of,
)

WIDTH = Choice("width", (8, 12, 24))
EXPAND = Choice("expand", (1, 3, 6))
SCALE = Choice("scale", (0.5, 1, 1.5))
FLAG = Choice("flag", (False, True))
OP = Choice("op", ("conv", "pool", "skip"))
CHOICES = (WIDTH, EXPAND, SCALE, FLAG, OP)


def sum_of(*numbers):
    return sum(numbers)


def by_name(op, size):
    return {"conv": size, "pool": 2 * size, "skip": 1}[op]


def typed(value):
    return {int: 1, float: 2, bool: 3}[type(value)]


@st.composite
def sizes(draw, depth=3):
    leaves = st.sampled_from(
        [*CHOICES[:4], Lookup(OP, {"conv": 3, "pool": 0, "skip": 2.5}), Lookup(SCALE, {0.5: 4, 1: 1, 1.5: 2})]
    )
    kind = (
        draw(st.sampled_from(("leaf", "+", "-", "*", "//", "max", "min", "round", "call", "typed")))
        if depth
        else "leaf"
    )
    if kind == "leaf":
        return draw(leaves)
    left = draw(sizes(depth=depth - 1))
    right = draw(st.one_of(sizes(depth=depth - 1), st.integers(1, 9), st.sampled_from((0.5, 1.5))))
    swap = draw(st.booleans())
    a, b = (right, left) if swap else (left, right)
    match kind:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "//":
            return left // draw(st.sampled_from((1, 2, 3, 0.5, WIDTH, EXPAND, SCALE, WIDTH * EXPAND)))
        case "max":
            return maximum_of(a, b)
        case "min":
            return minimum_of(a, b)
        case "round":
            return round_to(left, draw(st.integers(1, 9)))
        case "typed":
            return Function(typed, draw(st.sampled_from(CHOICES[:4])), maximum=3)
        case _:
            return Function(by_name, OP, draw(sizes(depth=0)), maximum=48)


SPACE = SearchSpace(CHOICES)
ALL_ROWS = np.array(list(itertools.product(*(range(len(choice.options)) for choice in CHOICES))), dtype=np.int16)


@given(sizes())
def test_scalars_and_arrays_agree_and_the_maximum_is_exact(size: Expression):
    subnets = SPACE.to_subnets(ALL_ROWS)
    exact = [size.evaluate(lambda choice, subnet=subnet: subnet[choice.name]) for subnet in subnets]
    assert size.maximum == max(exact)
    low, high = size.bounds()
    assert low <= min(exact) and max(exact) <= high
    halves = size * 2 + 0  # most values are whole or half
    if all(float(2 * value).is_integer() for value in exact):
        values = values_of(halves, SPACE, ALL_ROWS)
        assert values.dtype == np.int64
        assert values.tolist() == [2 * value for value in exact] == [value_of(halves, subnet) for subnet in subnets]


@given(sizes())
def test_expressions_survive_pickle_and_deepcopy(size: Expression):
    again = pickle.loads(pickle.dumps(size))
    assert again == size and hash(again) == hash(size) and copy.deepcopy(size) == size
    assert again.maximum == size.maximum and again.choices == size.choices
    assert str(size) == str(again) and repr(size) == repr(again)


def test_extremes_of_plain_numbers_are_plain():
    assert (maximum_of(3, 5), minimum_of(3, 5), maximum_of_size(maximum_of(3, WIDTH))) == (5, 3, 24)
    with pytest.raises(InputError, match="cannot be used as a size"):
        maximum_of(3, OP)


def test_known_values():
    active = {"width": 24, "expand": 3, "op": "pool", "scale": 1.5}
    assert value_of(EXPAND * WIDTH, active) == 72
    assert value_of(WIDTH // 7, active) == 3
    assert value_of(100 // WIDTH, active) == 4
    assert value_of(100 - WIDTH, active) == 76
    assert value_of(WIDTH - 1, active) == 23
    assert value_of(2 + WIDTH, active) == 26
    assert value_of(np.int64(2) * WIDTH, active) == 48
    assert value_of(WIDTH * SCALE, active) == 36
    assert value_of(maximum_of(WIDTH, EXPAND * 10), active) == 30
    assert value_of(minimum_of(WIDTH, 20), active) == 20
    assert value_of(Function(by_name, OP, WIDTH, maximum=48), active) == 48
    assert value_of(Lookup(OP, {"conv": 1, "pool": 5, "skip": 0}), active) == 5
    assert value_of(17, active) == maximum_of_size(17) == 17
    assert value_of(FLAG + FLAG, {"flag": True}) == 2


def test_missing_choices_have_their_default():
    assert value_of(EXPAND * WIDTH, {}) == 6 * 24
    space = SearchSpace([WIDTH])
    assert values_of(EXPAND * WIDTH, space, np.array([[0], [1]], dtype=np.int16)).tolist() == [48, 72]
    assert values_of(Function(sum_of, 2, 3, maximum=9), space, np.zeros((3, 1), dtype=np.int16)).tolist() == [5] * 3
    assert values_of(7, space, np.zeros((2, 1), dtype=np.int16)).tolist() == [7, 7]
    assert values_of(WIDTH, space, np.zeros((0, 1), dtype=np.int16)).tolist() == []


def slow_round(value: int, divisor: int) -> int:
    candidates = [k * divisor for k in range(1, value // divisor + 3)]
    nearest = min(candidates, key=lambda c: (abs(c - value), -c))
    return nearest if nearest >= 0.9 * value else nearest + divisor


@given(st.integers(1, 800), st.integers(1, 16))
def test_round_to_is_the_nearest_multiple_that_loses_at_most_a_tenth(value, divisor):
    rounded = round_to(value, divisor)
    assert rounded == slow_round(value, divisor)
    assert rounded % divisor == 0 and rounded >= divisor and rounded >= 0.9 * value


def test_round_to_by_hand():
    assert [round_to(v, 8) for v in (1, 8, 11, 12, 19, 20, 33.6)] == [8, 8, 16, 16, 24, 24, 32]
    assert value_of(round_to(WIDTH * 1.5, 8), {"width": 12}) == 24  # 18 -> 16 would lose 11 %


def test_choices_are_listed_once_in_order_of_appearance():
    assert choices_of(EXPAND * WIDTH + WIDTH // 2) == (EXPAND, WIDTH)
    assert choices_of(8) == ()
    assert choices_of(WIDTH) == (WIDTH,)


def test_maximum_with_too_many_combinations_is_the_bound():
    many = [Choice(f"n{i}", range(1, 101)) for i in range(3)]
    total = many[0] + many[1] * many[2]
    assert total.maximum == 100 + 100 * 100
    assert Function(sum_of, *many, maximum=777).maximum == 777
    assert (Function(sum_of, *many, maximum=777) + 1).maximum == 778
    assert round_to(total, 8).maximum == 10104
    spanning_zero = many[0] // (many[1] - many[2])
    with pytest.raises(InputError, match=r"too many combinations .*Wrap it in Function"):
        _ = spanning_zero.maximum
    assert value_of(spanning_zero, {"n0": 7, "n1": 5, "n2": 2}) == 2


def test_maximum_is_exact_where_the_interval_is_not():
    assert (WIDTH * 10 - WIDTH * 9).maximum == 24
    assert maximum_of_size(WIDTH * 10 - WIDTH * 9) == 24


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: OP * 2, "choice 'op' has the options .* not all numbers, so it cannot be used as a size"),
        (lambda: OP.maximum, "cannot be used as a size"),
        (lambda: WIDTH * True, "is True. Give a number"),
        (lambda: WIDTH * float("inf"), "not a finite number"),
        (lambda: round_to(WIDTH, 0), "divisor of round_to is 0"),
        (lambda: round_to(WIDTH, 1.5), "divisor of round_to is 1.5"),
        (lambda: round_to("8", 8), "the size in round_to is '8'"),
        (lambda: value_of(WIDTH * SCALE, {"width": 8, "scale": 0.5}) and value_of(WIDTH * 0.3, {}), "whole number"),
        (lambda: value_of(2.5, {}), "the size is 2.5, which is not a whole number"),
        (lambda: value_of(WIDTH, {"width": 9}), "choice 'width' has no option 9. Allowed: 8, 12, 24"),
        (lambda: value_of(4 // (FLAG * 1), {}), r"\(4 // \(flag \* 1\)\) divides by zero"),
        (lambda: values_of(4 // (FLAG * 1), SPACE, ALL_ROWS), "divides by zero"),
        (lambda: values_of(WIDTH * 0.3, SPACE, ALL_ROWS), r"size \(width \* 0.3\) is 2.4"),
        (lambda: Lookup(OP, {"conv": 1}), r"Lookup\('op'\) has no value for \['pool', 'skip'\]"),
        (lambda: Lookup(FLAG, {0: 1, 1: 2}), "choice 'flag' has no option 0"),
        (lambda: Lookup(OP, {"conv": 1, "pool": 2, "skip": "x"}), "value of 'skip' in .* is 'x'. Give a number"),
        (lambda: Lookup("op", {}), "Give a Choice and a table"),
        (lambda: Function(3, WIDTH, maximum=3), "3, which cannot be called"),
        (lambda: Function(sum_of, WIDTH, maximum=3, minimum=4), "minimum 4 above its maximum 3"),
        (lambda: Function(sum_of, None, maximum=3), "an argument of sum_of is None"),
        (lambda: Function(sum_of, WIDTH, maximum=20).maximum, r"sum_of\(24\) is 24, above its declared maximum=20"),
        (lambda: value_of(Function(sum_of, 0 - WIDTH, maximum=9), {}), r"is -24, below its declared minimum=0"),
        (lambda: value_of(Function(by_name, WIDTH, 2, maximum=9), {}), r"by_name\(24, 2\) failed: KeyError: 24"),
        (lambda: value_of(Function(str, WIDTH, maximum=9), {}), r"the size str\(24\) is '24'. Give a number"),
        (lambda: WIDTH * 2**50, r"may reach \d+, more than 2\^53"),
        (lambda: WIDTH + Choice("width", (1, 2)), "two different choices named 'width'"),
    ],
)  # fmt: skip
def test_bad_sizes_are_named(use, message):
    with pytest.raises(InputError, match=message):
        use()


def test_other_operands_and_comparisons_are_type_errors():
    for wrong in (lambda: WIDTH * "2", lambda: WIDTH * np.arange(3), lambda: np.arange(3) * WIDTH, lambda: WIDTH / 2):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError):
        _ = WIDTH > 3


def test_a_restricted_space_is_read_by_its_own_options_and_a_foreign_one_is_refused():
    small = SPACE.restrict({"width": (12, 24)})
    rows = np.zeros((1, 5), dtype=np.int16)
    assert values_of(WIDTH, small, rows).tolist() == [12]
    with pytest.raises(InputError, match="choice 'width' has no option 5"):
        values_of(WIDTH, SearchSpace([Choice("width", (5, 8))]), np.zeros((1, 1), dtype=np.int16))


def test_a_function_is_called_once_per_combination_of_arguments():
    calls = []

    def counted(a, b):
        calls.append((a, b))
        return a * b

    rows = np.tile(ALL_ROWS, (5, 1))
    values = values_of(Function(counted, WIDTH, EXPAND, maximum=1000), SPACE, rows)
    assert len(calls) == len(set(calls)) == 9
    assert values.tolist() == [WIDTH.options[row[0]] * EXPAND.options[row[1]] for row in rows]


def test_equal_expressions_are_equal_and_types_count():
    assert WIDTH * 2 == WIDTH * 2 and hash(WIDTH * 2) == hash(WIDTH * 2)
    assert WIDTH * 2 != WIDTH * 2.0 and WIDTH * 2 != 2 * WIDTH and WIDTH * 2 != WIDTH + 2
    assert round_to(WIDTH, 8) != round_to(WIDTH, 4)
    assert str(round_to(WIDTH * 1.5, 8) // EXPAND) == "(round_to((width * 1.5), 8) // expand)"
