"""Starting a search from what another one found: its subnets, carried over to this space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nasq.errors import InputError
from nasq.search.objectives import Constraint, feasible
from nasq.space import Subnet

if TYPE_CHECKING:
    from nasq.space import Choice, Option, SearchSpace

__all__ = ["transferred"]


def transferred(space: SearchSpace, constraints: Sequence[Constraint], subnets: Sequence[Subnet]) -> list[Subnet]:
    """The feasible subnets of ``space`` that are, or come nearest to, those of another one; each once, in their order.

    A choice that both spaces have keeps its option; where only this space has it, or the option is not there, it takes the
    nearest one (of numbers), else its default.

    Args:
        space: Where to search now.
        constraints: What is left out where it breaks one.
        subnets: Such as another run's front.

    Raises:
        InputError: The spaces have no choice in common, or nothing feasible is left; says how many broke a constraint.
    """
    if subnets and not any(name in space.positions for subnet in subnets for name in subnet):
        raise InputError(
            f"no choice of the other search is in the space {space.name!r}: it decides {', '.join(list(subnets[0])[:3])}, "
            f"this one {', '.join(space.names[:3])}. Start from a run of a related space."
        )
    found: dict[Subnet, None] = {}
    for subnet in subnets:
        moved = {choice.name: _option(choice, subnet) for choice in space.choices}
        try:
            found.setdefault(space.canonical(Subnet(moved)))
        except InputError:
            continue  # the rules of this space forbid it
    members = list(found)
    kept: Sequence[bool] = feasible(constraints, space.to_rows(members)).tolist() if members else []
    left = [subnet for subnet, good in zip(members, kept, strict=True) if good]
    if not left:
        bounds = ", ".join(map(str, constraints)) or "the rules of the space"
        raise InputError(
            f"none of the {len(subnets)} subnets of the other search can start this one: each breaks {bounds}. Begin without "
            "--warm-start, or loosen the constraints."
        )
    return left


def _option(choice: Choice, subnet: Mapping[str, Option]) -> Option:
    wanted = subnet.get(choice.name, choice.default)
    if wanted in choice.options:
        return wanted
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (wanted, *choice.options)):
        return choice.default
    return min(choice.options, key=lambda option: abs(float(option) - float(wanted)))
