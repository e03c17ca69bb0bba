"""Every algorithm of the table on a conditional space with rules and constraints: the promises that all of them make."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nasq.errors import InfeasibleError, InputError
from nasq.search import Algorithm, Constraint, Objective
from nasq.search.algorithms import ALGORITHMS, Assist, FullFidelity, Generational, make_algorithm
from nasq.space import Choice, SearchSpace, SpaceRules, Subnet

Rows = NDArray[np.int16]

# The slowest fits take as long as all the others together; they have a test of their own.
FAST = [name for name in ALGORITHMS if name not in ("gp", "predictor_boosted", "predictor_cqap")]
# What fits a model for every batch.
FITTED = ("bananas", "bohb", "predictor_forest", "tpe")


class Ascending(SpaceRules):
    """The second width is not below the first."""

    name = "ascending"

    def __init__(self) -> None:
        self.choices = (Choice("width0", (8, 16, 24)), Choice("width1", (8, 16, 24)))
        self.size = 6

    def valid(self, rows: Any) -> Any:
        return rows[:, 0] <= rows[:, 1]


def conditional(bits: int = 5) -> SearchSpace:
    """Widths under a rule, an operator, and bits that only a convolution has: ``6 * (bits ** 2 + 1)`` subnets."""
    wide = tuple(range(2, 2 + bits))
    choices = [
        *Ascending().choices,
        Choice("op", ("conv", "pool"), ordered=False),
        Choice("weight_bits", wide),
        Choice("activation_bits", wide),
    ]
    inside = ((("op", frozenset(["conv"])),),)
    return SearchSpace(
        choices, {"weight_bits": inside, "activation_bits": inside}, name="conditional", rules=Ascending()
    )


def quality(subnet: Mapping[str, Any]) -> float:
    return float(
        subnet["width0"] + 1.5 * subnet["width1"] + 3 * subnet.get("weight_bits", 0) - subnet.get("activation_bits", 0)
    )


def size(space: SearchSpace) -> Any:
    def bytes_of(rows: Rows) -> NDArray[np.float64]:
        held = np.where(space.active(rows), rows + 2, 0)  # every list of bits begins with 2
        bits = [held[:, space.positions[name]] for name in ("weight_bits", "activation_bits")]
        widths = 8 * (rows[:, space.positions["width0"]] + 1) + 12 * (rows[:, space.positions["width1"]] + 1)
        return np.asarray(widths + 3.0 * bits[0] + 3.0 * bits[1])

    return bytes_of


def values(space: SearchSpace, subnet: Subnet) -> dict[str, float]:
    return {"quality": quality(subnet), "size": float(size(space)(space.to_rows([subnet]))[0])}


def make(name: str, several: bool = False, upper: float = 75.0, bits: int = 5, **settings: Any) -> Algorithm:
    space = conditional(bits)
    objectives = [Objective("quality", "", "maximize", quality)]
    if several or name == "nsga3":
        objectives.append(Objective("size", "B", "minimize", size(space), on="rows"))
    return make_algorithm(
        name,
        space,
        objectives,
        [Constraint("size", "B", size(space), upper=upper)],
        partial=lambda subnet, fidelity: {**values(space, subnet), "quality": quality(subnet) * fidelity},
        **{"population": 5, "seed": 1, "batch": 5 if name in FITTED else None, **settings},
    )


def drive(algorithm: Algorithm, least: int) -> list[str]:
    """Asks and tells until so many subnets are known or nothing is left; checks what every ask promises."""
    space, asked_for = algorithm.space, list[str]()
    while len(asked_for) < least:
        asked = algorithm.ask()
        if not asked:
            break
        assert algorithm.ask() == []
        assert all(space.contains(subnet) for subnet in asked)
        assert all(constraint.violation(space.to_rows(asked)).max() == 0 for constraint in algorithm.constraints)
        for subnet in reversed(asked):
            algorithm.tell(subnet, values(space, subnet))
        asked_for += [subnet.id for subnet in asked]
    assert len(set(asked_for)) == len(asked_for)
    return asked_for


@pytest.mark.parametrize(
    ("name", "several"),
    [(name, several) for name in FAST for several in (False, True) if not several or name != "bohb"],
)
def test_every_algorithm_keeps_its_promises_and_resumes_to_the_same_sequence(name: str, several: bool) -> None:
    whole = drive(make(name, several), 16)
    assert len(whole) >= 16
    first = make(name, several)  # anew: equal seeds give equal searches
    head = drive(first, 8)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    resumed = make(name, several)
    resumed.load_state_dict(state)
    assert head + drive(resumed, len(whole) - len(head)) == whole


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(FAST)))
def test_the_slow_fits_keep_the_promises_too(name: str) -> None:
    whole = drive(make(name), 9)
    first = make(name)
    head = drive(first, 6)
    resumed = make(name)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert head + drive(resumed, len(whole) - len(head)) == whole


@pytest.mark.parametrize("name", FAST)
def test_seeds_matter_and_a_state_of_another_is_refused(name: str) -> None:
    algorithm, other = make(name, seed=1), make(name, seed=2)
    assert drive(algorithm, 5) != drive(other, 5)
    with pytest.raises(InputError, match="begun with seed = 1 and is continued with 2"):
        make(name, seed=2).load_state_dict(algorithm.state_dict())


@pytest.mark.parametrize("name", FAST)
def test_a_small_space_is_exhausted_and_then_done(name: str) -> None:
    space = conditional(2)
    rows = np.unique(space.sample_batch(3000, np.random.default_rng(0)), axis=0)
    kept = int((size(space)(rows) <= 60).sum())
    assert space.size == len(rows) == 30 and 8 < kept < 30
    algorithm = make(name, upper=60.0, bits=2)
    found = drive(algorithm, 1000)
    assert algorithm.done and algorithm.ask() == []
    if isinstance(algorithm, FullFidelity):
        inner = algorithm.algorithm
        assert isinstance(inner, Generational)
        assert len({row.tobytes() for row in inner._rows}) == kept >= len(found)
    else:
        assert len(found) == kept


@pytest.mark.parametrize("name", FAST)
def test_impossible_constraints_end_with_the_explanation(name: str) -> None:
    with pytest.raises(InfeasibleError, match="no feasible subnet was found"):
        make(name, upper=1.0).ask()


@pytest.mark.parametrize("name", ["random", "regularized_evolution", "reinforce", "bohb", "local_search", "tpe"])
def test_assistance_moves_proposals_towards_its_score(name: str) -> None:
    space = conditional()

    def narrow(rows: Rows) -> NDArray[np.float64]:
        return -(rows[:, 0] + rows[:, 1]).astype(np.float64)

    def level(assist: Assist | None) -> float:
        algorithm = make(name, assist=assist)
        inner = algorithm.algorithm if isinstance(algorithm, FullFidelity) else algorithm
        assert isinstance(inner, Generational)
        drive(algorithm, 10)
        return float(narrow(inner._rows).mean())

    assert level(Assist("narrow", narrow)) > level(None)
    state = make(name, assist=Assist("narrow", narrow)).state_dict()
    with pytest.raises(InputError, match=r"begun with assist = \['narrow', 10, 4\] and is continued with None"):
        make(name).load_state_dict(state)
    assert len(space) == 5


def test_names_and_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"unknown search algorithm 'nsga4'. Did you mean 'nsga[23]'\?"):
        make("nsga4")
    with pytest.raises(InputError, match="'random' takes no settings of its own, and 'crossover_rate' is given"):
        make("random", crossover_rate=0.5)
    with pytest.raises(
        InputError, match=r"unknown setting 'keepfront'. Did you mean 'keep_front'\? Allowed: crossover_rate, "
    ):
        make("nsga2", keepfront=True)
    with pytest.raises(InputError, match="'hyperband' evaluates subnets in part"):
        make_algorithm("hyperband", conditional(), [Objective("quality", "", "maximize", quality)])
    with pytest.raises(InputError, match="the batch is 0 subnets"):
        make("genetic", batch=0)
    with pytest.raises(InputError, match="0 proposals per start"):
        Assist("x", lambda rows: np.zeros(len(rows)), starts=0)
    with pytest.raises(InputError, match=r"NSGA-III got 1 objective\(s\)"):
        make_algorithm("nsga3", conditional(), [Objective("quality", "", "maximize", quality)])
    with pytest.raises(InputError, match="a tournament has 0 competitors"):
        make("regularized_evolution", sample=0)
    with pytest.raises(InputError, match=r"the learning rate is 0\.0"):
        make("reinforce", learning_rate=0.0)
    with pytest.raises(InputError, match="Hyperband got eta 1"):
        make("hyperband", eta=1)
    with pytest.raises(InputError, match=r"unknown predictor 'forests'. Did you mean 'forest'"):
        make("bananas", predictor="forests")
    with pytest.raises(InputError, match="unknown Optuna sampler 'cma'"):
        make("tpe", sampler="cma")
    with pytest.raises(InputError, match="no generation of the search is finished yet"):
        algorithm = make("random")
        assert isinstance(algorithm, Generational)
        algorithm.best()
