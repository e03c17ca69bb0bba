"""Successive halving, Hyperband and BOHB: many subnets on few images, the better ones on more.

These ask for subnets *at a fidelity*: a share of a full evaluation, such as of the validation images or of the epochs.
:class:`FullFidelity` makes any of them an ordinary algorithm, by evaluating the lower fidelities itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import numpy as np

from nasq.errors import InputError
from nasq.search.algorithm import Algorithm
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Common, Generational
from nasq.search.algorithms.optuna_model import OptunaModel
from nasq.search.feasible import descend
from nasq.search.objectives import Constraint, Objective, Rows, Values, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["FullFidelity", "Hyperband", "MultiFidelity", "Partial"]

Partial = Callable[["Subnet", float], Mapping[str, float]]
"""Values of a subnet at a fidelity above 0 and below 1; a deterministic function."""

# Of BOHB's proposals, the share that is random, as published.
_RANDOM = 1 / 3
_REPAIRS = 12


class MultiFidelity(Algorithm, Protocol):
    """An algorithm whose asked subnets are to be evaluated at :attr:`fidelity`, and told as usual.

    A subnet is asked for once at each fidelity at most.
    """

    @property
    def fidelity(self) -> float:
        """Of the subnets asked at present: above 0; 1 is a full evaluation."""


class Hyperband(Generational):
    """Hyperband (Li et al., JMLR 18, 2018); with one bracket successive halving, with a model BOHB (Falkner et al., 2018).

    A bracket begins with many subnets at a low fidelity; the best ``1 / eta`` of each rung go on to ``eta`` times the
    fidelity, up to a full evaluation. Brackets with fewer subnets begin higher. A generation is a rung.

    BOHB's model is Optuna's multivariate TPE on what the highest fidelity with more values than choices has shown; a
    third of the proposals is random. (The paper's model is a kernel density of its own; the idea is the same.)

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        objectives: At least one; several are ordered by front and crowding within a rung.
        population: Subnets in the first rung of the bracket that begins lowest.
        initial: Subnets to evaluate first; they begin at the lowest fidelity too.
        assist: Chooses among more new subnets than are needed.
        eta: One of so many goes on.
        lowest: The lowest fidelity; rounded to a power of ``1 / eta``.
        brackets: How many kinds of bracket take turns, the lowest first; ``None``: all. 1 is successive halving.
        model: Whether proposals come from a model (BOHB).

    Raises:
        InputError: ``eta`` is below 2, ``lowest`` is not between 0 and 1, or ``brackets`` is below 1.
    """

    _POPULATION = 27

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        eta: int = 3,
        lowest: float = 1 / 9,
        brackets: int | None = None,
        model: bool = False,
        **common: Unpack[Common],
    ) -> None:
        if eta < 2 or not 0 < lowest < 1 or (brackets is not None and brackets < 1):
            raise InputError(
                f"Hyperband got eta {eta}, a lowest fidelity of {lowest} and {brackets} brackets; eta is at least 2, the "
                "fidelity lies between 0 and 1, and there is at least one bracket."
            )
        self.eta, self.model = eta, model
        self.rungs = max(1, round(-np.log(lowest) / np.log(eta)))
        self.brackets = min(self.rungs + 1, brackets or self.rungs + 1)
        super().__init__(space, objectives, constraints, **common)

    def _settings(self) -> dict[str, Any]:
        own = {"eta": self.eta, "rungs": self.rungs, "brackets": self.brackets, "model": self.model}
        return {**super()._settings(), **own}

    def _reset(self) -> None:
        super()._reset()
        self._bracket, self._level = 0, self.rungs
        self._promoted = self._rows[:0]
        self._levels: list[int] = []
        models = range(self.rungs + 1) if self.model else ()
        self._models = {level: OptunaModel(self.space, len(self.objectives), startup=1) for level in models}

    @property
    def fidelity(self) -> float:
        """Of the subnets asked at present; 1 is a full evaluation."""
        return float(float(self.eta) ** -self._level)

    def cost(self) -> float:
        """What was told so far, in full evaluations."""
        return float(sum(float(self.eta) ** -level for level in self._levels))

    def _merit(self) -> Values:
        """Only full evaluations count; where there is none yet, the highest fidelity."""
        levels = np.array(self._levels)
        merit = np.full(len(levels), -np.inf)
        full = np.flatnonzero(levels == levels.min())
        merit[full] = fitness([self._values[index] for index in full])
        return merit

    def _absorb(self, first: int) -> None:
        rows, values = self._rows[first:], self._values[first:]
        self._levels += [self._level] * len(values)
        if self.model:
            self._models[self._level].add(rows, values)
        if self._level == 0:
            self._bracket = (self._bracket + 1) % self.brackets
            self._level, self._promoted = self.rungs - self._bracket, self._rows[:0]
            return
        order = np.argsort(-fitness(values), kind="stable")
        self._promoted = rows[order[: max(1, len(rows) // self.eta)]]
        self._level -= 1

    def _size(self) -> int:
        """Subnets in the first rung of the present bracket: all brackets cost about the same."""
        size: float = self.population * float(self.eta) ** -self._bracket * (self.rungs + 1) / (self._level + 1)
        return max(1, ceil(size))

    def _next(self, rng: np.random.Generator) -> Rows:
        if len(self._promoted):
            return self._promoted
        model = self._trained()
        if model is None:
            return self._begin(self._size(), rng, self._seen())
        random = self._begin(round(_RANDOM * self._size()), rng, self._seen())
        proposed = self._propose(lambda: self._modelled(model, rng), rng, self._size() - len(random))
        known = {row.tobytes() for row in random}
        return np.concatenate([random, proposed[[row.tobytes() not in known for row in proposed]]])

    def _trained(self) -> OptunaModel | None:
        """The model of the highest fidelity that has seen enough; ``None`` where none has, or none is wanted."""
        ready = (level for level in sorted(self._models) if len(self._models[level]) > len(self.space))
        return next((self._models[level] for level in ready), None)

    def _modelled(self, model: OptunaModel, rng: np.random.Generator) -> Rows:
        rows = model.propose(self._size() * self._choice, int(rng.integers(2**31)))
        if len(rows) and violations(self.constraints, rows).any():
            rows = descend(self.space, self.constraints, rows, rng, _REPAIRS)
        return rows


class FullFidelity:
    """Makes an algorithm of several fidelities an ordinary one: it asks for full evaluations only.

    Lower fidelities are evaluated in :meth:`ask`, in this process. A search that is killed there evaluates the rungs
    since the last full one again.

    Args:
        algorithm: Of several fidelities.
        partial: Values of a subnet at a fidelity below 1.
    """

    def __init__(self, algorithm: MultiFidelity, partial: Partial) -> None:
        self.algorithm, self.partial = algorithm, partial

    @property
    def space(self) -> SearchSpace:
        """What is searched."""
        return self.algorithm.space

    @property
    def objectives(self) -> Sequence[Objective]:
        """What is better."""
        return self.algorithm.objectives

    @property
    def constraints(self) -> Sequence[Constraint]:
        """What every subnet keeps."""
        return self.algorithm.constraints

    @property
    def generation(self) -> int:
        """Number of the rung that the next asked subnets belong to; those of lower fidelity count."""
        return self.algorithm.generation

    @property
    def done(self) -> bool:
        """Whether no unseen feasible subnet was found any more."""
        return self.algorithm.done

    def ask(self) -> list[Subnet]:
        """The next subnets to evaluate in full; before that, whatever leads there is evaluated in part."""
        while True:
            fidelity = self.algorithm.fidelity
            asked = self.algorithm.ask()
            if fidelity == 1 or not asked:
                return asked
            for subnet in asked:
                self.algorithm.tell(subnet, self.partial(subnet, fidelity))

    def tell(self, subnet: Subnet, values: Mapping[str, float]) -> None:
        """Takes the values of a full evaluation."""
        self.algorithm.tell(subnet, values)

    def state_dict(self) -> dict[str, Any]:
        """That of the algorithm; partial values are in it."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        self.algorithm.load_state_dict(state)
