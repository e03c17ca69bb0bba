"""What algorithms share that propose a batch, wait for all its values, and go on: archive, checks, resumable state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np

from nasq.errors import ArtifactError, InputError, NasqError
from nasq.search.algorithms.assist import Assist
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.proposing import collect, initial_rows, remaining
from nasq.search.algorithms.state import History, require_settings
from nasq.search.explain import explain, infeasible
from nasq.search.feasible import keys
from nasq.search.objectives import Constraint, Objective, Rows, Values

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["Common", "Generational"]

# Keeps the random stream of the explanation apart from those of the generations, which count up from 0.
_EXPLANATION = 2**32


class Common(TypedDict, total=False):
    """The keyword arguments of every algorithm; see :class:`Generational`."""

    population: int | None
    seed: int
    initial: Sequence[Subnet]
    batch: int | None
    assist: Assist | None


class Generational(ABC):
    """Ask/tell for algorithms that propose a batch, wait for all its values, and go on from there.

    A generation's randomness comes from ``(seed, generation)`` alone and its proposals from the generations before it,
    so a generation that was cut short is proposed again, subnet for subnet. What an algorithm has learned is a function
    of the generations told: a saved state holds these alone, and reading it learns them again, one by one.

    Args:
        space: What to search.
        objectives: At least one; names are unique.
        constraints: What every proposal keeps.
        population: Subnets in the first generation; ``None``: the algorithm's own number.
        seed: A non-negative integer.
        initial: Subnets to evaluate first, such as another run's front.
        batch: Subnets in each later generation, evaluated at the same time where there are several workers; ``None``:
            what suits the algorithm.
        assist: Chooses among more proposals than are needed.

    Raises:
        InputError: A setting is out of range, a name is used twice, or an initial subnet breaks a constraint.
    """

    _POPULATION: ClassVar[int] = 32

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        population: int | None = None,
        seed: int = 0,
        initial: Sequence[Subnet] = (),
        batch: int | None = None,
        assist: Assist | None = None,
    ) -> None:
        population = self._POPULATION if population is None else population
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) != len(names):
            raise InputError(f"a search needs objectives with different names, not {names}.")
        if population < 1:
            raise InputError(f"the population is {population}; it must be at least 1.")
        batch = self._default_batch(population) if batch is None else batch
        if batch < 1:
            raise InputError(f"the batch is {batch} subnets; it must be at least 1.")
        if seed < 0:
            raise InputError(f"the seed is {seed}; it must not be negative.")
        self.space = space
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self.population, self.batch = population, batch
        self.seed = seed
        self.assist = assist
        self._initial = initial_rows(space, self.constraints, initial)
        self._reset()

    def _default_batch(self, population: int) -> int:
        """Subnets in later generations where the user says nothing."""
        return population

    def _reset(self) -> None:
        self._ends = [0]
        self._done = False
        self._rows: Rows = self._initial[:0]
        self._values: list[tuple[float, ...]] = []
        self._known: set[bytes] = set()
        self._asked: list[Subnet] = []
        self._handed: set[str] = set()
        self._told: dict[str, tuple[float, ...]] = {}

    @property
    def generation(self) -> int:
        """Number of the generation that the next asked subnets belong to."""
        return len(self._ends) - 1

    @property
    def done(self) -> bool:
        """Whether no unseen feasible subnet was found any more."""
        return self._done

    @property
    def evaluated(self) -> int:
        """Subnets of finished generations."""
        return len(self._values)

    def best(self) -> Subnet:
        """The subnet that the algorithm would take: the first of the best that it evaluated.

        With several objectives it is one of the front, the most isolated. An algorithm with a model may trust that more
        than a single noisy value.

        Raises:
            InputError: No generation is finished yet.
        """
        if not self._values:
            raise InputError(
                "no generation of the search is finished yet, so there is no best subnet. Tell its values."
            )
        return self.space.to_subnet(self._rows[int(np.argmax(self._merit()))])

    def _merit(self) -> Values:
        """How good every evaluated subnet is, ``[evaluated]``."""
        return fitness(self._values)

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
        rng = np.random.default_rng([self.seed, self.generation])
        rows = self._first(rng) if self.generation == 0 else self._next(rng)
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

    def _begin(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        """Up to ``count`` feasible rows to start from, none of them in ``seen``: random ones, the assistant's best."""
        return self._random(count, rng, seen, 1 if self.assist is None else self.assist.starts)

    @property
    def _choice(self) -> int:
        """Proposals for each child."""
        return 1 if self.assist is None else self.assist.offspring

    @property
    def brood(self) -> int:
        """Children that are made at a time, before known and infeasible ones are taken out."""
        return self.batch * self._choice

    def _random(self, count: int, rng: np.random.Generator, seen: set[bytes], factor: int) -> Rows:
        """``count`` random feasible rows outside ``seen``: the assistant's best of ``factor`` times as many."""
        rows = remaining(self.space, self.constraints, factor * count, rng, seen)
        return rows if self.assist is None else self.assist.best(rows, count)

    def _propose(self, make: Callable[[], Rows], rng: np.random.Generator, count: int | None = None) -> Rows:
        """``count`` (of a generation) new feasible rows of those that ``make`` gives, canonical ones, call by call.

        Where children are all known: neighbours of the best, then random subnets.
        """
        count = self.batch if count is None else count
        seen = self._seen()
        pool = count * self._choice
        rows = np.concatenate([self._rows[:0], *collect(self.constraints, make, pool, seen)])
        if self.assist is not None:
            rows = self.assist.best(rows, count)
        if len(rows) == count:
            return rows
        near = collect(self.constraints, lambda: self._near(count, rng), count - len(rows), seen, rounds=1)
        rows = np.concatenate([rows, *near])
        return np.concatenate([rows, self._random(count - len(rows), rng, seen, 1)])

    def _near(self, count: int, rng: np.random.Generator) -> Rows:
        """All neighbours of some of the best subnets, in random order."""
        best = np.argsort(-fitness(self._values), kind="stable")[: max(4, count)]
        found = [n for subnet in self.space.to_subnets(self._rows[best]) for n in self.space.neighbours(subnet)]
        return self.space.to_rows([found[index] for index in rng.permutation(len(found))])

    @abstractmethod
    def _next(self, rng: np.random.Generator) -> Rows:
        """Feasible rows that are not in :meth:`_seen`; none where nothing is left."""

    def _absorb(self, first: int) -> None:  # noqa: B027 (an algorithm may learn nothing)
        """Learns from a finished generation: ``_rows[first:]`` with ``_values[first:]``, a function of what was told."""

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
        # In the order of asking, so that the order of telling has no influence.
        self._take(self.space.to_rows(self._asked), [self._told[subnet.id] for subnet in self._asked])
        self._asked, self._handed, self._told = [], set(), {}

    def _take(self, rows: Rows, values: Sequence[tuple[float, ...]]) -> None:
        """Puts a whole generation into the archive and learns from it."""
        first = len(self._values)
        self._rows = np.concatenate([self._rows, rows])
        self._values += values
        self._known.update(keys(rows))
        self._ends.append(len(self._values))
        self._absorb(first)

    def _seen(self) -> set[bytes]:
        """Keys of every evaluated row, for the caller to add to."""
        return set(self._known)

    def _settings(self) -> dict[str, Any]:
        """What must be equal for a saved state to make sense here."""
        return {
            "algorithm": type(self).__name__,
            "population": self.population,
            "batch": self.batch,
            "seed": self.seed,
            "objectives": [[objective.name, objective.direction] for objective in self.objectives],
            "constraints": [[c.name, c.lower, c.upper] for c in self.constraints],
            "initial": self._initial.tolist(),
            "assist": None if self.assist is None else [self.assist.name, self.assist.starts, self.assist.offspring],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what is asked next, as JSON-able values."""
        history = History(self._rows, self._values, self._ends, self._told)
        return {"settings": self._settings(), **history.to_json()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken; subnets asked but not told then are asked again.

        Raises:
            InputError: The state is of other settings; the message names the first that differs.
            ArtifactError: The state lacks a part, or its parts do not fit.
        """
        require_settings(state, self._settings())
        try:
            self._load(History.read(state, self.space, len(self.objectives)))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            self._reset()
            raise ArtifactError(f"the saved state of the search is damaged: {error!r}.") from error

    def _load(self, history: History) -> None:
        self._reset()
        for start, end in pairwise(history.ends):
            self._take(history.rows[start:end], history.values[start:end])
        if history.told:
            self._start()
            self._told, self._handed = history.told, set(history.told)
            if not self._handed < {subnet.id for subnet in self._asked}:
                raise ValueError("it was told values of subnets that it does not ask for")
