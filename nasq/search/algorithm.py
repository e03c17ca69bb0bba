"""The interface of every search algorithm, and the bookkeeping that algorithms with generations share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.search.explain import explain, infeasible
from nasq.search.feasible import keys, unseen
from nasq.search.objectives import Constraint, Objective, Rows, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["Algorithm", "Generational"]

# Keeps the random stream of the explanation apart from those of the generations, which count up from 0.
_EXPLANATION = 2**32


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


class Generational(ABC):
    """Ask/tell for algorithms that propose a batch, wait for all its values, and go on from there.

    A generation's randomness comes from ``(seed, generation)`` alone and its proposals from the generations before it,
    so a generation that was cut short is proposed again, subnet for subnet.

    Args:
        space: What to search.
        objectives: At least one; names are unique.
        constraints: What every proposal keeps.
        population: Subnets in a generation.
        seed: A non-negative integer.
        initial: Subnets to evaluate first, such as another run's front.

    Raises:
        InputError: A setting is out of range, a name is used twice, or an initial subnet breaks a constraint.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        population: int,
        seed: int,
        initial: Sequence[Subnet] = (),
    ) -> None:
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a search needs objectives with different names, not {names}.")
        if population < 1:
            raise InputError(f"the population is {population}; it must be at least 1.")
        if seed < 0:
            raise InputError(f"the seed is {seed}; it must not be negative.")
        self.space = space
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.population = population
        self.seed = seed
        self._initial = self._feasible_rows(initial)
        self._reset()

    def _reset(self) -> None:
        self._generation = 0
        self._done = False
        self._rows: Rows = self._initial[:0]
        self._values: list[tuple[float, ...]] = []
        self._asked: list[Subnet] = []
        self._handed: set[str] = set()
        self._told: dict[str, tuple[float, ...]] = {}

    @property
    def generation(self) -> int:
        """Number of the generation that the next asked subnets belong to."""
        return self._generation

    @property
    def done(self) -> bool:
        """Whether no unseen feasible subnet was found any more."""
        return self._done

    @property
    def evaluated(self) -> int:
        """Subnets of finished generations."""
        return len(self._values)

    def ask(self) -> list[Subnet]:
        """The subnets of this generation that were not asked yet; empty while their values are awaited.

        Raises:
            InfeasibleError: Not one feasible subnet was found; the message says what survives each constraint.
        """
        if not self._asked and not self._done:
            self._start()
        fresh = [subnet for subnet in self._asked if subnet.id not in self._handed]
        self._handed.update(subnet.id for subnet in fresh)
        return fresh

    def _start(self) -> None:
        rng = np.random.default_rng([self.seed, self._generation])
        rows = self._first(rng) if self._generation == 0 else self._next(rng)
        if not len(rows) and not self._values:
            raise infeasible(explain(self.space, self.constraints, np.random.default_rng([self.seed, _EXPLANATION])))
        self._asked = list(self.space.to_subnets(rows))
        self._done = not self._asked

    def _first(self, rng: np.random.Generator) -> Rows:
        """Generation 0: the initial subnets, then what the algorithm starts from."""
        missing = self.population - len(self._initial)
        if missing <= 0:
            return self._initial
        return np.concatenate([self._initial, self._begin(missing, rng, set(keys(self._initial)))])

    @abstractmethod
    def _begin(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        """Up to ``count`` feasible rows to start from, none of them in ``seen``."""

    @abstractmethod
    def _next(self, rng: np.random.Generator) -> Rows:
        """Feasible rows that are not in :meth:`_seen`; none where nothing is left."""

    @abstractmethod
    def _absorb(self, first: int) -> None:
        """Takes note of a finished generation: ``_rows[first:]`` with ``_values[first:]``."""

    def tell(self, subnet: Subnet, values: Mapping[str, float]) -> None:
        """Takes the values of one asked subnet, in any order; the last one of a generation finishes it.

        Raises:
            InputError: The subnet is not awaited, or an objective is missing.
            NasqError: A value is not finite.
        """
        if subnet.id not in self._handed or subnet.id in self._told:
            state = "was told already" if subnet.id in self._told else "was not asked for"
            raise InputError(f"subnet {subnet.id} {state}; tell each asked subnet once.")
        self._told[subnet.id] = self._signed(subnet, values)
        if len(self._told) == len(self._asked):
            self._finish()

    def _signed(self, subnet: Subnet, values: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives' values, turned so that larger is better."""
        missing = [objective.name for objective in self.objectives if objective.name not in values]
        if missing:
            raise InputError(f"subnet {subnet.id} was told without {', '.join(missing)}; every objective is needed.")
        for objective in self.objectives:
            if not math.isfinite(values[objective.name]):
                raise NasqError(f"{objective.name!r} of subnet {subnet.id} is {values[objective.name]}, not finite.")
        return tuple(objective.sign * float(values[objective.name]) for objective in self.objectives)

    def _finish(self) -> None:
        first = len(self._values)
        self._rows = np.concatenate([self._rows, self.space.to_rows(self._asked)])
        # In the order of asking, so that the order of telling has no influence.
        self._values += [self._told[subnet.id] for subnet in self._asked]
        self._asked, self._handed, self._told = [], set(), {}
        self._generation += 1
        self._absorb(first)

    def _seen(self) -> set[bytes]:
        return set(keys(self._rows))

    def _fresh(self, rows: Rows, seen: set[bytes]) -> Rows:
        """Those of canonical ``rows`` that are new and keep every constraint, each once."""
        rows = unseen(rows, seen)
        return rows[violations(self.constraints, rows) == 0.0] if len(rows) else rows

    def _feasible_rows(self, subnets: Sequence[Subnet]) -> Rows:
        rows = unseen(self.space.canonical(self.space.to_rows(list(subnets))), ())
        if not len(rows):
            return rows
        for constraint in self.constraints:
            broken = np.flatnonzero(constraint.violation(rows))
            if len(broken):
                value = constraint.measure(rows)[broken[0]]
                raise InputError(
                    f"the initial subnet {self.space.to_subnets(rows[broken[:1]])[0].id} breaks {constraint}: it has "
                    f"{value:.6g}. Leave it out."
                )
        return rows

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a saved state to make sense here."""
        return {
            "algorithm": type(self).__name__,
            "population": self.population,
            "seed": self.seed,
            "objectives": [[objective.name, objective.direction] for objective in self.objectives],
            "constraints": [[c.name, c.lower, c.upper] for c in self.constraints],
            "initial": self._initial.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what is asked next, as JSON-able values."""
        return {
            "settings": self._settings(),
            "generation": self._generation,
            "rows": self._rows.tolist(),
            "values": [list(values) for values in self._values],
            "told": {identity: list(values) for identity, values in self._told.items()},
            **self._own_state(),
        }

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What an algorithm adds to the state."""

    @abstractmethod
    def _load_own(self, state: Mapping[str, Any]) -> None:
        """Reads what :meth:`_own_state` wrote; whatever is raised says that the state is damaged."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; subnets asked but not told then are asked again.

        Raises:
            InputError: The state is of other settings; the message names the first that differs.
            ArtifactError: The state lacks a part, or its parts do not fit.
        """
        self._compare(state)
        try:
            self._load(state)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            self._reset()
            raise ArtifactError(f"the saved state of the search is damaged: {error!r}.") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        self._reset()
        rows = np.array(state["rows"], dtype=np.int16).reshape(len(state["rows"]), len(self.space))
        self._rows = self.space.canonical(rows)
        self._values = [tuple(map(float, values)) for values in state["values"]]
        self._generation = int(state["generation"])
        self._load_own(state)
        if [len(values) for values in self._values] != [len(self.objectives)] * len(rows):
            raise ValueError("rows and values do not fit")
        told = {str(identity): tuple(map(float, values)) for identity, values in state["told"].items()}
        if told:
            self._start()
            self._told, self._handed = told, set(told)
            if not self._handed < {subnet.id for subnet in self._asked}:
                raise ValueError("it was told values of subnets that it does not ask for")

    def _compare(self, state: Mapping[str, Any]) -> None:
        saved = state.get("settings")
        if not isinstance(saved, Mapping):
            raise ArtifactError("the saved state of the search is damaged: it has no settings.")
        for name, value in self._settings().items():
            if saved.get(name) != value:
                raise InputError(
                    f"this search was begun with {name} = {saved.get(name)!r} and is continued with {value!r}. Use "
                    "the same setting, or another directory."
                )
