from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.search.pareto import front, hypervolume, knee

MIN2 = ("minimize", "minimize")


def slow_front(values: np.ndarray, signs: np.ndarray) -> list[bool]:
    points = values * signs
    return [
        not any((other <= point).all() and (other < point).any() for other in points)
        for point in points
    ]  # fmt: skip


@given(
    st.integers(1, 4).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(st.integers(0, 5), min_size=m, max_size=m), min_size=1, max_size=25),
            st.lists(st.sampled_from(["minimize", "maximize"]), min_size=m, max_size=m),
        )
    )
)
def test_front_equals_the_definition(case: tuple[list[list[int]], list[str]]) -> None:
    values, directions = case
    signs = np.array([1 if direction == "minimize" else -1 for direction in directions])
    assert front(values, directions).tolist() == slow_front(np.array(values), signs)  # type: ignore[arg-type]


def test_equal_points_stay_on_the_front_together() -> None:
    assert front([[1, 2], [1, 2], [2, 2], [2, 1]], MIN2).tolist() == [True, True, False, True]


def test_hypervolume_of_known_shapes() -> None:
    assert hypervolume([[1, 3], [2, 2], [3, 1]], [4, 4], MIN2) == pytest.approx(6.0)
    assert hypervolume([[0.0, 0.0, 0.0]], [2, 3, 4], ("minimize",) * 3) == pytest.approx(24.0)
    assert hypervolume([[0.5, 10]], [0.0, 40], ("maximize", "minimize")) == pytest.approx(15.0)
    assert hypervolume([[3.0]], [5.0], ("minimize",)) == pytest.approx(2.0)
    # Two boxes of 2x2x1 and 1x1x3 that share 1x1x1.
    assert hypervolume([[1, 1, 2], [2, 2, 0]], [3, 3, 3], ("minimize",) * 3) == pytest.approx(4 + 3 - 1)


def test_points_outside_the_reference_add_nothing() -> None:
    assert hypervolume([[5, 0], [4, 1], [1, 4]], [4, 4], MIN2) == 0.0
    inside = hypervolume([[1, 1]], [4, 4], MIN2)
    assert hypervolume([[1, 1], [0, 5], [2, 2]], [4, 4], MIN2) == inside == 9.0


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(1, 7), st.integers(0, 2**31))
def test_hypervolume_equals_inclusion_and_exclusion(m: int, n: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 6, (n, m)).astype(float)
    reference = np.full(m, 5.0)
    total = 0.0
    for size in range(1, n + 1):
        for chosen in itertools.combinations(values, size):
            corner = np.max(chosen, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(0, reference - corner)))
    assert hypervolume(values, reference, ("minimize",) * m) == pytest.approx(total)


@pytest.mark.parametrize(("m", "n"), [(2, 300), (3, 80), (4, 25)])
def test_hypervolume_equals_pymoo(m: int, n: int) -> None:
    indicators = pytest.importorskip("pymoo.indicators.hv")
    values = np.random.default_rng(m).random((n, m)) ** 2
    wanted = float(indicators.HV(ref_point=np.full(m, 1.1))(values))
    assert hypervolume(values, np.full(m, 1.1), ("minimize",) * m) == pytest.approx(wanted, rel=1e-12)
    mirrored = values.copy()
    mirrored[:, 0] = -mirrored[:, 0]
    directions = ("maximize", *("minimize",) * (m - 1))
    reference = np.array([-1.1, *(1.1,) * (m - 1)])
    assert hypervolume(mirrored, reference, directions) == pytest.approx(wanted, rel=1e-12)  # type: ignore[arg-type]


def test_knee_is_where_the_front_bends() -> None:
    values = [[0, 10], [1, 2], [2, 1.8], [10, 0], [9, 9]]
    assert knee(values, MIN2) == 1
    scaled = np.array(values) * [1000, -0.01]
    assert knee(scaled, ("minimize", "maximize")) == 1


def test_knee_of_one_point_and_of_one_objective() -> None:
    assert knee([[3, 4]], MIN2) == 0
    assert knee([[3], [1], [2]], ("minimize",)) == 1
    with pytest.raises(InputError, match="no knee of an empty front"):
        knee(np.zeros((0, 2)), MIN2)


def test_bad_values_are_named() -> None:
    with pytest.raises(InputError, match=r"shape \(2, 2\) do not fit 3 directions"):
        front([[1, 2], [3, 4]], ("minimize",) * 3)
    with pytest.raises(InputError, match="NaN, first in row 1"):
        front([[1, 2], [3, float("nan")]], MIN2)
    with pytest.raises(InputError, match="unknown direction 'min'"):
        front([[1, 2]], ("min", "minimize"))  # type: ignore[arg-type]
