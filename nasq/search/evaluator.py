"""What gives subnets their values: the protocol, and the evaluator made of objectives."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nasq.errors import InputError, NasqError
from nasq.search.objectives import Measure, Objective

if TYPE_CHECKING:
    from nasq.search.results import Record
    from nasq.space import SearchSpace, Subnet

__all__ = ["Evaluator", "LearningEvaluator", "ObjectiveEvaluator", "measured", "prepare"]


class Evaluator(Protocol):
    """Gives one subnet its values; a deterministic function of the subnet, or a resumed search differs.

    Anything that has these two members will do: a supernet, a predictor, a table, a cascade of them.
    """

    @property
    def names(self) -> Sequence[str]:
        """The names of the values, in the order of the columns they are written to."""

    def __call__(self, subnet: Subnet) -> Mapping[str, float]:
        """Exactly one finite value for each name."""


@runtime_checkable
class LearningEvaluator(Protocol):
    """An evaluator that goes by what is known already, such as a cascade with a predictor."""

    def learn(self, records: Sequence[Record]) -> None:
        """Takes the records of all generations before the present one, in a fixed order; the same give the same values."""


def prepare(evaluator: Evaluator, records: Sequence[Record]) -> None:
    """Shows an evaluator that learns what is known, before a generation."""
    if isinstance(evaluator, LearningEvaluator):
        evaluator.learn(records)


def measured(
    evaluator: Evaluator, subnet: Subnet, clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, float], float]:
    """The checked values of a subnet, in the order of the evaluator's names, and the seconds that they took.

    Raises:
        NasqError: A value is missing, not announced, or not finite.
    """
    start = clock()
    values = dict(evaluator(subnet))
    seconds = clock() - start
    if set(values) != set(evaluator.names):
        raise NasqError(
            f"the evaluator gave {', '.join(sorted(values))} for subnet {subnet.id}; it announced "
            f"{', '.join(evaluator.names)}."
        )
    bad = [name for name, value in values.items() if not abs(value) < float("inf")]
    if bad:
        raise NasqError(f"{bad[0]!r} of subnet {subnet.id} is {values[bad[0]]}, not finite.")
    return {name: float(values[name]) for name in evaluator.names}, seconds


class ObjectiveEvaluator:
    """Evaluates objectives, and further measures that are only recorded (such as costs that nobody optimises).

    Args:
        space: What the subnets belong to.
        objectives: On subnets or on rows.
        measures: Recorded beside the objectives; those that are objectives already are left out.

    Raises:
        InputError: A name is used for two different things.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], measures: Sequence[Measure] = ()) -> None:
        self._space = space
        self._on_subnet = {objective.name: objective for objective in objectives if objective.on == "subnet"}
        on_rows = {objective.name: objective.measure for objective in objectives if objective.on == "rows"}
        self._on_rows = {**{measure.name: measure for measure in measures}, **on_rows}
        clash = self._on_subnet.keys() & self._on_rows.keys()
        if clash or len(self._on_subnet) + len(on_rows) != len(objectives):
            named = ", ".join(objective.name for objective in objectives)
            raise InputError(f"two different values have one name, among {named} and the costs. Rename one.")
        further = [measure.name for measure in measures if measure.name not in on_rows]
        self._names = tuple(dict.fromkeys([*(objective.name for objective in objectives), *further]))

    @property
    def names(self) -> Sequence[str]:
        """The objectives, then the further measures."""
        return self._names

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """The value of each name."""
        cheap = self.known(subnet)
        costly = {name: objective.evaluate(subnet) for name, objective in self._on_subnet.items()}
        values = {**cheap, **costly}
        return {name: values[name] for name in self._names}

    def known(self, subnet: Subnet) -> dict[str, float]:
        """The values that cost nothing: objectives on rows and further measures."""
        rows = self._space.to_rows([subnet])
        return {name: float(measure(rows)[0]) for name, measure in self._on_rows.items()}
