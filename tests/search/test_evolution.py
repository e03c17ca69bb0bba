from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from nasq.errors import ArtifactError, InfeasibleError, InputError, NasqError
from nasq.search import NSGA2, Objective, ObjectiveEvaluator, RandomSearch, hypervolume
from nasq.search.algorithms import Generational
from nasq.search.algorithms.state import require_settings
from nasq.search.feasible import spread
from nasq.space import Choice, SearchSpace, Subnet

from .toy import ACCURACY, Costs, joint_space, limit, objective

ALGORITHMS = [NSGA2, RandomSearch]


def make(
    kind: type[Generational] = NSGA2, blocks: int = 4, upper: float | None = 1200.0, **settings: Any
) -> Generational:
    space = joint_space(blocks)
    costs = Costs(space)
    constraints = [] if upper is None else [limit(costs, "bytes", upper=upper)]
    settings = {"population": 12, "seed": 3, **settings}
    return kind(space, [ACCURACY, objective(costs)], constraints, **settings)


def drive(algorithm: Generational, generations: int, reverse: bool = False) -> list[tuple[str, float, float]]:
    evaluate = ObjectiveEvaluator(algorithm.space, algorithm.objectives)
    history = []
    for _ in range(generations):
        asked = algorithm.ask()
        for subnet in reversed(asked) if reverse else asked:
            algorithm.tell(subnet, evaluate(subnet))
        history += [(subnet.id, *evaluate(subnet).values()) for subnet in asked]
    return history


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_asked_subnets_are_new_canonical_and_feasible(kind: type[Generational]) -> None:
    algorithm = make(kind)
    costs = Costs(algorithm.space)
    evaluate = ObjectiveEvaluator(algorithm.space, algorithm.objectives)
    seen: set[Subnet] = set()
    for generation in range(6):
        assert algorithm.generation == generation
        asked = algorithm.ask()
        assert len(asked) == 12
        assert algorithm.ask() == []
        assert seen.isdisjoint(asked)
        seen.update(asked)
        assert all(algorithm.space.contains(subnet) for subnet in asked)
        assert (costs(algorithm.space.to_rows(asked))["bytes"] <= 1200).all()
        for subnet in asked:
            algorithm.tell(subnet, evaluate(subnet))
    assert algorithm.evaluated == len(seen) == 72


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_equal_seeds_give_equal_searches_and_the_order_of_telling_does_not_matter(kind: type[Generational]) -> None:
    first = drive(make(kind), 5)
    assert drive(make(kind), 5) == first
    assert drive(make(kind), 5, reverse=True) == first
    assert drive(make(kind, seed=4), 5) != first


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("told", [0, 5])
def test_a_saved_state_continues_exactly(kind: type[Generational], told: int) -> None:
    whole = drive(make(kind), 6)
    algorithm = make(kind)
    drive(algorithm, 3)
    evaluate = ObjectiveEvaluator(algorithm.space, algorithm.objectives)
    for subnet in algorithm.ask()[:told]:
        algorithm.tell(subnet, evaluate(subnet))
    state = json.loads(json.dumps(algorithm.state_dict(), allow_nan=False))
    resumed = make(kind)
    resumed.load_state_dict(state)
    assert resumed.generation == 3
    rest = drive(resumed, 3)
    assert [entry[0] for entry in rest] == [entry[0] for entry in whole[36 + told :]]


def test_states_of_other_settings_are_refused() -> None:
    state = make().state_dict()
    with pytest.raises(InputError, match="begun with population = 12 and is continued with 13"):
        make(population=13).load_state_dict(state)
    with pytest.raises(InputError, match="begun with algorithm = 'NSGA2' and is continued with 'RandomSearch'"):
        make(RandomSearch).load_state_dict(state)
    with pytest.raises(InputError, match="constraints"):
        make(upper=1300.0).load_state_dict(state)
    with pytest.raises(InputError, match="mutation_rate"):
        make(mutation_rate=0.5).load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"rows": [[0]]},
        {"values": []},
        {"told": {"nobody": [1.0, 2.0]}},
        {"ends": [0, 99]},
        {"ends": "x"},
    ],
)
def test_damaged_states_are_refused(damage: dict[str, Any]) -> None:
    algorithm = make()
    drive(algorithm, 2)
    state = {**algorithm.state_dict(), **damage}
    with pytest.raises(ArtifactError, match="the saved state of the search is damaged"):
        make().load_state_dict(state)


def test_nsga2_beats_random_search() -> None:
    def volume(kind: type[Generational], seed: int) -> float:
        values = np.array([entry[1:] for entry in drive(make(kind, 8, 3000.0, seed=seed, population=16), 10)])
        values[:, 1] = np.log10(values[:, 1])
        return hypervolume(values, [0.0, 8.0], ("maximize", "minimize"))

    pairs = [(volume(NSGA2, seed), volume(RandomSearch, seed)) for seed in range(3)]
    assert all(ours > random for ours, random in pairs)
    assert np.mean([ours / random for ours, random in pairs]) > 1.05


def test_a_kept_front_loses_nothing_that_is_not_dominated() -> None:
    def parents(keep: bool) -> tuple[list[int], set[int]]:
        algorithm = make(upper=None, population=4, seed=0, keep_front=keep)
        drive(algorithm, 6)
        assert isinstance(algorithm, NSGA2)
        values = algorithm._values
        best = {i for i, a in enumerate(values) if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in values)}
        return algorithm._parents, best

    kept, best = parents(True)
    assert set(kept) == best and len(best) > 4
    assert len(parents(False)[0]) == 4
    with pytest.raises(InputError, match="begun with keep_front = False and is continued with True"):
        make(keep_front=True).load_state_dict(make().state_dict())


def test_spread_starts_range_over_costs_with_bits_on_their_own() -> None:
    algorithm = make(upper=None, population=24, spread_starts=True)
    assert isinstance(algorithm, NSGA2)
    space = algorithm.space
    cost = objective(Costs(space)).measure
    asked = cost(space.to_rows(algorithm.ask()))
    others = np.quantile(cost(algorithm._two_levels(np.random.default_rng(1))), [0.25, 0.5, 0.75])
    assert len(asked) == 24 and (np.diff(asked) >= 0).all()
    assert all(5 <= count <= 7 for count in np.bincount(np.searchsorted(others, asked)))
    columns = [space.names.index(name) for name in ("b0.width", "b0.activation_bits")]
    one = np.corrcoef(spread(space, 4000, np.random.default_rng(0))[:, columns], rowvar=False)[0, 1]
    two = np.corrcoef(algorithm._two_levels(np.random.default_rng(0))[:, columns], rowvar=False)[0, 1]
    assert one > 0.3 and abs(two) < 0.1
    with pytest.raises(InputError, match="begun with spread_starts = False and is continued with True"):
        make(spread_starts=True).load_state_dict(make().state_dict())


def test_a_state_from_before_a_setting_existed_goes_on_where_it_is_off() -> None:
    begun = make()
    drive(begun, 2)
    state = begun.state_dict()
    for name in ("keep_front", "spread_starts"):
        del state["settings"][name]
    later = make()
    later.load_state_dict(state)
    assert later.ask() == begun.ask()
    with pytest.raises(InputError, match="begun with spread_starts = None and is continued with True"):
        make(spread_starts=True).load_state_dict(state)
    with pytest.raises(InputError, match=r"begun with decay = None and is continued with 0\.0"):
        require_settings({"settings": {"decay": None}}, {"decay": 0.0})  # there, and another value


def test_one_objective_is_climbed() -> None:
    space = joint_space(3)
    costs = Costs(space)
    algorithm = NSGA2(space, [ACCURACY], [limit(costs, "bytes", upper=800.0)], population=16, seed=0)
    evaluate = ObjectiveEvaluator(space, [ACCURACY])
    best: list[float] = []
    for _ in range(15):
        asked = algorithm.ask()
        values = [evaluate(subnet) for subnet in asked]
        best.append(max([*best[-1:], *(value["accuracy"] for value in values)]))
        for subnet, value in zip(asked, values, strict=True):
            algorithm.tell(subnet, value)
    everything = space.sample_batch(60_000, np.random.default_rng(9))
    allowed = space.to_subnets(everything[costs(everything)["bytes"] <= 800][:20_000])
    reference = max(ACCURACY.evaluate(subnet) for subnet in allowed)
    assert best[-1] > best[0]
    assert best[-1] >= reference - 0.5


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_a_small_space_is_exhausted_and_then_done(kind: type[Generational]) -> None:
    space = SearchSpace([Choice("a", (1, 2, 3)), Choice("b", (1, 2, 3, 4))])
    objectives = [objective_of(space)]
    algorithm = kind(space, objectives, [], population=5, seed=0)
    evaluate = ObjectiveEvaluator(space, objectives)
    found = []
    while asked := algorithm.ask():
        assert len(found) < 12
        found += asked
        for subnet in asked:
            algorithm.tell(subnet, evaluate(subnet))
    assert algorithm.done
    assert len(set(found)) == len(found) == space.size == 12
    assert algorithm.ask() == []


def objective_of(space: SearchSpace) -> Objective:
    return Objective("sum", "", "minimize", lambda rows: rows.sum(axis=1).astype(float), on="rows")


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_impossible_constraints_end_with_the_explanation(kind: type[Generational]) -> None:
    algorithm = make(kind, upper=1.0)
    with pytest.raises(InfeasibleError, match=r"no feasible subnet was found(.|\n)*bytes <= 1 B: 0 % survive"):
        algorithm.ask()


def test_a_tight_constraint_is_still_searched() -> None:
    algorithm = make(blocks=12, upper=90.0)
    history = drive(algorithm, 4)
    assert len(history) == 48
    assert len({entry[0] for entry in history}) == 48


def test_initial_subnets_come_first() -> None:
    space = joint_space()
    small = space.smallest()
    other = space.canonical(small.updated({"b0.width": 16}))
    algorithm = make(initial=[small, other, small])
    assert algorithm.ask()[:2] == [small, other]
    with pytest.raises(InputError, match=r"initial subnet \w+ breaks bytes <= 1.2 kB: it has"):
        make(initial=[space.largest()])


def test_tell_checks_what_it_is_told() -> None:
    algorithm = make()
    first, second = algorithm.ask()[:2]
    with pytest.raises(InputError, match=f"{first.id} was told without bitops"):
        algorithm.tell(first, {"accuracy": 1.0})
    with pytest.raises(NasqError, match=f"'accuracy' of subnet {first.id} is nan"):
        algorithm.tell(first, {"accuracy": float("nan"), "bitops": 1.0})
    algorithm.tell(second, {"accuracy": 1.0, "bitops": 2.0})
    with pytest.raises(InputError, match=f"{second.id} was told already"):
        algorithm.tell(second, {"accuracy": 1.0, "bitops": 2.0})
    with pytest.raises(InputError, match="was not asked for"):
        algorithm.tell(joint_space().largest(), {"accuracy": 1.0, "bitops": 2.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"crossover_rate": 1.5}, "crossover_rate is 1.5"),
        ({"mutation_rate": -0.1}, "mutation_rate is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_objectives_need_different_names() -> None:
    space = joint_space()
    with pytest.raises(InputError, match="objectives with different names"):
        NSGA2(space, [ACCURACY, ACCURACY])
    with pytest.raises(InputError, match="objectives with different names"):
        NSGA2(space, [])
