"""Validity that structure cannot express: predicates over whole subnets, and which subnets are the same.

Most spaces need none of this: what matters in a subnet follows from the containers that choices stand in. A space of
graphs is different: a cell may have too many edges or be disconnected, and two cells may be the same up to the order of
their vertices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.choice import Choice
from nasq.space.conditions import Uses
from nasq.space.count import count, count_ruled

__all__ = ["Bound", "Rows", "SpaceRules", "describe"]

Rows = NDArray[np.int16]
Bools = NDArray[np.bool_]


class SpaceRules(ABC):
    """Which combinations of some choices are valid, and which of them are one and the same.

    A network defines ``space_rules() -> SpaceRules``; :class:`nasq.Supernet` reads it with the choices. All methods work
    on rows of option indices of :attr:`choices`, int16 ``[n, len(choices)]``, in that order and with all of their options,
    also where the space has more choices or was restricted. Rules are immutable.

    A canonical row stands for all rows that are the same. It has to be valid, and canonical itself. What the canonical
    form leaves out has to be visible in the options (a vertex that no path reaches has the operator ``"none"``), so that
    choices inside it are inactive by structure.

    Attributes:
        name: Says the rules apart from others, with their parameters: ``"nas_bench_101(vertices=7, edges=9)"``. Two rules
            of one name are equal.
        choices: The choices they are about. They must always be active.
        size: How many canonical rows there are, exactly.
    """

    name: str
    choices: tuple[Choice, ...]
    size: int

    @abstractmethod
    def valid(self, rows: Rows) -> Bools:
        """Which rows are valid, ``[n]``."""

    def canonical(self, rows: Rows) -> Rows:
        """The canonical form of valid rows; by default each is its own."""
        return rows

    def members(self) -> Rows:
        """Every canonical row once, in any order: needed for the size of a restricted space.

        Raises:
            InputError: These rules cannot list them.
        """
        raise InputError(
            f"the rules {self.name!r} do not list their members, so the size of a part of the space, or of a space with "
            "choices that depend on theirs, is not known. Implement SpaceRules.members()."
        )

    def __deepcopy__(self, memo: object) -> SpaceRules:
        return self


class Bound:
    """Rules applied to the rows of one space, whose choices may be more, in another order, with fewer options.

    Args:
        rules: The rules.
        choices: The space's choices.
        conditional: Names of the choices that are not always active.

    Raises:
        InputError: The space lacks one of the rules' choices, has options they do not know, or it is conditional.
    """

    def __init__(self, rules: SpaceRules, choices: Sequence[Choice], conditional: frozenset[str]) -> None:
        self.rules = rules
        places = {choice.name: place for place, choice in enumerate(choices)}
        for choice in rules.choices:
            if choice.name not in places or choice.name in conditional:
                state = "conditional" if choice.name in places else "absent"
                raise InputError(
                    f"the rules {rules.name!r} are about the choice {choice.name!r}, which is {state} in the space. Rules "
                    "need choices that every subnet has."
                )
        self.columns = np.array([places[choice.name] for choice in rules.choices], dtype=np.int64)
        self._to, self._from = [], []
        for choice in rules.choices:
            known = [choice.index(option) for option in choices[places[choice.name]].options]
            back = np.full(len(choice.options), -1, dtype=np.int16)
            back[known] = np.arange(len(known))
            self._to.append(np.array(known, dtype=np.int16))
            self._from.append(back)
        self.restricted = any((back < 0).any() for back in self._from)

    def own(self, rows: Rows) -> Rows:
        """The rules' columns of the space's rows, in the rules' options ``[n, len(rules.choices)]``."""
        columns = [table[rows[:, column]] for table, column in zip(self._to, self.columns, strict=True)]
        return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0), dtype=np.int16)

    def inside(self, own: Rows) -> Bools:
        """Which of the rules' rows have only options that the space has left."""
        kept = [back[own[:, place]] >= 0 for place, back in enumerate(self._from)]
        return np.all(np.stack(kept, axis=1), axis=1) if kept else np.ones(len(own), dtype=np.bool_)

    def settle(self, rows: Rows) -> tuple[Rows, Bools]:
        """The rows with the rules' columns in canonical form, and which of them belong to the space.

        A row belongs to the space if it is valid and its canonical form has options of this space only. The others are
        returned as they were.
        """
        own = self.own(rows)
        valid = np.asarray(self.rules.valid(own))
        if valid.shape != (len(rows),) or valid.dtype != np.bool_:
            raise InputError(
                f"valid() of the rules {self.rules.name!r} returned {valid.dtype} of shape {valid.shape} for {len(rows)} "
                f"rows. It has to return one bool per row, [{len(rows)}]."
            )
        places = np.flatnonzero(valid)
        canonical = np.asarray(self.rules.canonical(own[places])) if len(places) else own[places]
        if canonical.shape != (len(places), own.shape[1]):
            raise InputError(
                f"canonical() of the rules {self.rules.name!r} returned the shape {canonical.shape} for "
                f"{(len(places), own.shape[1])}. It has to return rows of the same shape."
            )
        kept = self.inside(canonical)
        places, canonical = places[kept], canonical[kept]
        settled = rows.copy()
        for place, (back, column) in enumerate(zip(self._from, self.columns, strict=True)):
            settled[places, column] = back[canonical[:, place]]
        member = np.zeros(len(rows), dtype=np.bool_)
        member[places] = True
        return settled, member

    def count(self, sizes: Sequence[int], uses: Sequence[Uses]) -> int:
        """How many canonical subnets the space has; see :func:`nasq.space.count.count_ruled`."""
        own = set(self.columns.tolist())
        if not self.restricted and not any(part[0] in own for found in uses for use in found for part in use):
            rest = [1 if index in own else size for index, size in enumerate(sizes)]
            return self.rules.size * count(rest, uses)
        members = np.asarray(self.rules.members())
        members = members[self.inside(members)]
        back = [table[members[:, place]] for place, table in enumerate(self._from)]
        return count_ruled(sizes, uses, self.columns.tolist(), np.stack(back, axis=1))


def describe(rules: SpaceRules) -> dict[str, Any]:
    """The rules as they stand in a space's JSON."""
    return {"name": rules.name, "choices": [choice.name for choice in rules.choices]}
