"""The interface of every search algorithm; :mod:`nasq.search.algorithms` holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from nasq.search.objectives import Constraint, Objective

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["Algorithm"]


class Algorithm(Protocol):
    """What a :class:`~nasq.search.study.Study` drives: ask for subnets, tell their values.

    ``ask`` gives canonical, feasible subnets that were never given before. An empty list means that the algorithm waits
    for values that it was not told yet or, where ``done``, that it has nothing left. Values may be told in any order.
    """

    @property
    def space(self) -> SearchSpace:
        """What is searched."""

    @property
    def objectives(self) -> Sequence[Objective]:
        """What is better."""

    @property
    def constraints(self) -> Sequence[Constraint]:
        """What every subnet keeps."""

    @property
    def generation(self) -> int:
        """Number of the generation that the next asked subnets belong to."""

    @property
    def done(self) -> bool:
        """Whether no unseen feasible subnet was found any more."""

    def ask(self) -> list[Subnet]:
        """The next subnets to evaluate."""

    def tell(self, subnet: Subnet, values: Mapping[str, float]) -> None:
        """Takes the values of one asked subnet; names beyond the objectives are ignored."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what is asked next, as JSON-able values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; subnets asked but not told then are asked again."""
