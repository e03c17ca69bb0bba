"""Every algorithm by name: one table for the run's configuration, the command line and the benchmarks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nasq.errors import InputError, choose_from
from nasq.search.algorithm import Algorithm
from nasq.search.algorithms.assist import Assist
from nasq.search.algorithms.evolution import NSGA2, NSGA3, GeneticAlgorithm, RegularizedEvolution
from nasq.search.algorithms.generational import Common, Generational
from nasq.search.algorithms.hyperband import FullFidelity, Hyperband, Partial
from nasq.search.algorithms.local_search import LocalSearch
from nasq.search.algorithms.optuna_search import OptunaSearch
from nasq.search.algorithms.predictor_guided import PredictorGuided
from nasq.search.algorithms.random_search import RandomSearch
from nasq.search.algorithms.reinforce import Reinforce
from nasq.search.objectives import Constraint, Objective

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["ALGORITHMS", "Entry", "make_algorithm"]


@dataclass(frozen=True)
class Entry:
    """One algorithm of the table.

    Attributes:
        kind: Its class.
        settings: What the name stands for beyond the class.
        partial: Whether it evaluates subnets at fidelities below 1.
    """

    kind: Callable[..., Generational]
    settings: dict[str, Any] = field(default_factory=dict)
    partial: bool = False


ALGORITHMS: dict[str, Entry] = {
    "bananas": Entry(PredictorGuided, {"predictor": "mlp"}),
    "bohb": Entry(Hyperband, {"model": True}, partial=True),
    "genetic": Entry(GeneticAlgorithm),
    "gp": Entry(OptunaSearch, {"sampler": "gp"}),
    "hyperband": Entry(Hyperband, partial=True),
    "local_search": Entry(LocalSearch),
    "nsga2": Entry(NSGA2),
    "nsga3": Entry(NSGA3),
    "optuna_nsga2": Entry(OptunaSearch, {"sampler": "nsga2"}),
    "predictor_boosted": Entry(PredictorGuided, {"predictor": "boosted"}),
    "predictor_cqap": Entry(PredictorGuided, {"predictor": "cqap"}),
    "predictor_forest": Entry(PredictorGuided, {"predictor": "forest"}),
    "random": Entry(RandomSearch),
    "regularized_evolution": Entry(RegularizedEvolution),
    "reinforce": Entry(Reinforce),
    "successive_halving": Entry(Hyperband, {"brackets": 1}, partial=True),
    "tpe": Entry(OptunaSearch, {"sampler": "tpe"}),
}
"""The algorithms by the names that ``search.algorithm`` takes."""


def make_algorithm(
    name: str,
    space: SearchSpace,
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
    *,
    population: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    initial: Sequence[Subnet] = (),
    assist: Assist | None = None,
    partial: Partial | None = None,
    **settings: Any,
) -> Algorithm:
    """An algorithm in its initial state.

    Args:
        name: One of :data:`ALGORITHMS`.
        space: What to search.
        objectives: At least one.
        constraints: What every proposal keeps.
        population: Subnets in the first generation; ``None``: the algorithm's own number.
        batch: Subnets in each later one; ``None``: what suits the algorithm.
        seed: A non-negative integer.
        initial: Subnets to evaluate first.
        assist: Chooses among more proposals than are needed; the GradSign-assisted form of the algorithm.
        partial: Values of a subnet at a fidelity below 1, for the algorithms that need it; others leave it alone.
        settings: Of the algorithm's class.

    Raises:
        InputError: The name or a setting is unknown, or ``partial`` is missing.
    """
    if name not in ALGORITHMS:
        raise choose_from("search algorithm", name, ALGORITHMS)
    entry = ALGORITHMS[name]
    if entry.partial and partial is None:
        raise InputError(
            f"{name!r} evaluates subnets in part, such as on fewer images, and was given no way to do so. Give `partial`, "
            "or take an algorithm with full evaluations alone, such as 'tpe'."
        )
    given: dict[str, Any] = {**entry.settings, **settings}
    allowed = _own_settings(entry.kind)
    for setting in settings:
        if not allowed:
            raise InputError(f"{name!r} takes no settings of its own, and {setting!r} is given. Leave it out.")
        if setting not in allowed:
            raise choose_from("setting", setting, allowed, f"These are what {name!r} takes.")
    common: Common = {"population": population, "batch": batch, "seed": seed, "initial": initial, "assist": assist}
    algorithm = entry.kind(space, objectives, constraints, **common, **given)
    if isinstance(algorithm, Hyperband):
        assert partial is not None
        return FullFidelity(algorithm, partial)
    return algorithm


def _own_settings(kind: Callable[..., Generational]) -> set[str]:
    """What an algorithm takes beyond what all of them take: the keyword-only arguments of its class and their bases."""
    assert isinstance(kind, type)
    signatures = [inspect.signature(vars(one)["__init__"]) for one in kind.__mro__ if "__init__" in vars(one)]
    named = {p.name for each in signatures for p in each.parameters.values() if p.kind is p.KEYWORD_ONLY}
    return named - Common.__annotations__.keys()
