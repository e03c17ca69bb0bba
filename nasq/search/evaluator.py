"""What gives subnets their values: the protocol, and the evaluator made of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nasq.errors import InputError
from nasq.search.objectives import Measure, Objective

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["Evaluator", "ObjectiveEvaluator"]


class Evaluator(Protocol):
    """Gives one subnet its values; a deterministic function of the subnet, or a resumed search differs.

    Anything that has these two members will do: a supernet, a predictor, a table, a cascade of them.
    """

    @property
    def names(self) -> Sequence[str]:
        """The names of the values, in the order of the columns they are written to."""

    def __call__(self, subnet: Subnet) -> Mapping[str, float]:
        """Exactly one finite value for each name."""


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
        rows = self._space.to_rows([subnet])
        cheap = {name: float(measure(rows)[0]) for name, measure in self._on_rows.items()}
        costly = {name: objective.evaluate(subnet) for name, objective in self._on_subnet.items()}
        values = {**cheap, **costly}
        return {name: values[name] for name in self._names}
