from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasq.errors import InputError, NasqError
from nasq.search import (
    Bound,
    Constraint,
    Goal,
    Measure,
    Objective,
    format_number,
    measures,
    parse_bound,
    parse_constraints,
    parse_number,
)
from nasq.search.objectives import feasible, violations

from .toy import Costs, joint_space, limit


@pytest.mark.parametrize(
    ("text", "value"),
    [("20k", 20_000), ("20K", 20_000), ("1.5M", 1_500_000), ("2G", 2e9), ("3T", 3e12), ("4", 4), (".5", 0.5),
     ("1e3", 1000), (" 7 k ", 7000), ("-2", -2), ("2e2k", 200_000)],
)  # fmt: skip
def test_numbers_have_decimal_suffixes(text: str, value: float) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "k", "20m", "20kB", "20Ki", "1,000", "nan", "inf", "1e999", "0x10", "1 2"])
def test_other_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match=r"number .*"):
        parse_number(text)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(20_000, "", "20k"), (20_000, "B", "20 kB"), (1_234_567, "", "1.235M"), (4, "bits", "4 bits"), (0.5, "", "0.5"),
     (-3000, "", "-3k"), (0, "", "0")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert format_number(value, unit) == text


@given(st.floats(-1e14, 1e14))
def test_written_numbers_read_back_to_four_digits(value: float) -> None:
    assert parse_number(format_number(value)) == pytest.approx(value, rel=5.1e-4)


def test_bounds_are_read() -> None:
    names = ["bytes", "bitops", "average_weight_bits"]
    assert parse_bound("bytes<=20k", names) == Bound("bytes", upper=20_000)
    assert parse_bound(" bitops >= 5M ", names) == Bound("bitops", lower=5e6)
    assert str(parse_bound("average_weight_bits<=4", names)) == "average_weight_bits <= 4"
    assert str(Bound("bytes", 1000, 2000)) == "1k <= bytes <= 2k"
    assert str(Bound("bytes", lower=1000)) == "bytes >= 1k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bytes<20k", r"cannot read the bound 'bytes<20k'.*Names: bitops, bytes"),
        ("bytes", r"cannot read the bound 'bytes'"),
        ("bites<=20k", r"unknown quantity 'bites'\. Did you mean 'bytes'\?.*It was in the bound 'bites<=20k'"),
        ("bytes<=20m", r"in the bound 'bytes<=20m': cannot read the number '20m'.*such as 20k"),
        ("bytes<=", r"in the bound 'bytes<=': cannot read the number ''"),
    ],
)
def test_unreadable_bounds_name_the_text_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_bound(text, ["bytes", "bitops"])


def test_bounds_that_say_nothing_or_leave_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="'bytes' needs a finite lower or upper limit"):
        Bound("bytes")
    with pytest.raises(InputError, match="2k <= bytes <= 1k leaves nothing"):
        Constraint("bytes", "B", lambda rows: np.zeros(len(rows)), 2000, 1000)


def test_unknown_directions_and_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"unknown direction 'maximise'.*Did you mean 'maximize'"):
        Goal("accuracy", "%", "maximise")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"unknown kind of objective 'row'.*'accuracy'"):
        Objective("accuracy", "%", "maximize", len, on="row")  # type: ignore[arg-type]


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=20), st.floats(0.5, 60.0))
def test_violation_is_zero_exactly_where_the_bound_holds(numbers: list[float], upper: float) -> None:
    values = np.array(numbers)
    excess = Bound("x", upper=upper).violation(values)
    assert ((excess == 0) == (values <= upper)).all()
    assert excess == pytest.approx(np.maximum(0, values / upper - 1), abs=1e-12)
    below = Bound("x", lower=upper).violation(values)
    assert ((below == 0) == (values >= upper)).all()


def test_violations_add_up_and_decide_feasibility() -> None:
    space = joint_space()
    costs = Costs(space)
    rows = space.sample_batch(200, np.random.default_rng(0))
    values = costs(rows)
    constraints = [limit(costs, "bytes", upper=900.0), limit(costs, "bitops", lower=2e6)]
    wanted = np.maximum(0, values["bytes"] / 900 - 1) + np.maximum(0, 1 - values["bitops"] / 2e6)
    assert violations(constraints, rows) == pytest.approx(wanted)
    good = (values["bytes"] <= 900) & (values["bitops"] >= 2e6)
    assert (feasible(constraints, rows) == good).all()
    assert 0 < good.sum() < 200
    assert (violations([], rows) == 0).all()


def test_constraints_of_texts_share_one_evaluation() -> None:
    space = joint_space()
    costs = Costs(space)
    constraints = parse_constraints(["bytes<=1k", "bitops<=5M"], costs.measures())
    assert [str(constraint) for constraint in constraints] == ["bytes <= 1 kB", "bitops <= 5M"]
    rows = space.sample_batch(50, np.random.default_rng(0))
    first = violations(constraints, rows)
    assert costs.calls == 1
    rows[:] = space.sample_batch(50, np.random.default_rng(1))
    assert costs.calls == 1
    second = violations(constraints, rows)
    assert costs.calls == 2
    assert (first != second).any()


def test_a_cost_that_the_network_does_not_have_is_named() -> None:
    space = joint_space()
    known = measures(Costs(space))
    with pytest.raises(
        InputError, match=r"'average_weight_bits' is not a cost of this network. Its costs: bitops, bytes"
    ):
        known["average_weight_bits"](space.sample_batch(2, np.random.default_rng(0)))


def test_measures_check_what_they_are_given() -> None:
    rows = np.zeros((3, 2), dtype=np.int16)
    with pytest.raises(NasqError, match=r"'bytes' gave values of shape \(2,\) for 3 rows"):
        Measure("bytes", "B", lambda rows: np.zeros(2))(rows)
    with pytest.raises(NasqError, match=r"'bytes' is nan for the row \[0, 0\]"):
        Measure("bytes", "B", lambda rows: np.array([1.0, np.nan, 2.0]))(rows)


def test_objectives_refuse_values_that_are_not_finite() -> None:
    subnet = joint_space().default()
    assert Objective("a", "", "minimize", lambda subnet: 2).evaluate(subnet) == 2.0
    with pytest.raises(NasqError, match=f"the objective 'a' is nan for subnet {subnet.id}"):
        Objective("a", "", "minimize", lambda subnet: float("nan")).evaluate(subnet)
