"""REINFORCE: a distribution over the options of every choice, moved towards subnets that were better than usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nasq.errors import InputError
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Common, Generational
from nasq.search.objectives import Constraint, Objective, Rows, Values

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["Reinforce"]

_DECAY = (0.9, 0.999)
_MOVING = 0.9


class Reinforce(Generational):
    """Policy gradient (Williams, Machine Learning 8, 1992) with a moving-average baseline and Adam, as in NAS-Bench-201.

    Every choice has independent logits; an inactive choice neither counts in a subnet's probability nor learns from it.
    Rewards are divided by the standard deviation of all rewards so far, so that the learning rate means the same
    whatever the objective's unit (NAS-Bench-201 takes accuracies as they are, with its own rate). Known and infeasible
    subnets are drawn again and teach nothing.

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        objectives: At least one; several give the reward by front and crowding among all evaluated.
        population: Random subnets to begin with; the policy learns from them too.
        batch: Subnets for each update; ``None``: one.
        assist: Chooses among more draws than are needed.
        learning_rate: Of Adam, per update.

    Raises:
        InputError: The learning rate is not above 0.
    """

    _POPULATION = 10

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        learning_rate: float = 0.1,
        **common: Unpack[Common],
    ) -> None:
        if not learning_rate > 0:
            raise InputError(f"the learning rate is {learning_rate}; it must be above 0.")
        self.learning_rate = learning_rate
        super().__init__(space, objectives, constraints, **common)

    def _default_batch(self, population: int) -> int:
        return 1

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "learning_rate": self.learning_rate}

    def _reset(self) -> None:
        super()._reset()
        count, most = len(self.space), int(self.space.sizes.max(initial=1))
        allowed = np.arange(most) < self.space.sizes[:, None]
        self._logits = np.where(allowed, 0.0, -np.inf)
        self._moments = np.zeros((2, count, most))
        self._baseline: float | None = None

    def probabilities(self) -> Values:
        """The policy: ``[choices, most options]``, each row sums to 1."""
        weights: Values = np.exp(self._logits - self._logits.max(axis=1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def _absorb(self, first: int) -> None:
        merit = fitness(self._values)
        scale = float(merit.std()) or 1.0
        rewards = merit[first:] / scale
        baseline = float(merit.mean()) / scale if self._baseline is None else self._baseline / scale
        advantage = rewards - baseline
        chosen = self._rows[first:, :, None] == np.arange(self._logits.shape[1])
        active = self.space.active(self._rows[first:])[:, :, None]
        # The gradient of log p: one-hot minus probabilities, where the choice was made at all.
        gradient = (advantage[:, None, None] * active * (chosen - self.probabilities())).mean(axis=0)
        self._step(gradient, self.generation)
        self._baseline = scale * (_MOVING * baseline + (1 - _MOVING) * float(rewards.mean()))

    def _step(self, gradient: Values, number: int) -> None:
        """One ascending step of Adam."""
        for moment, decay, value in zip(self._moments, _DECAY, (gradient, gradient**2), strict=True):
            moment += (1 - decay) * (value - moment)
        mean, square = (m / (1 - d**number) for m, d in zip(self._moments, _DECAY, strict=True))
        self._logits = self._logits + self.learning_rate * mean / (np.sqrt(square) + 1e-8)

    def _next(self, rng: np.random.Generator) -> Rows:
        # The largest of the logarithms plus Gumbel noise is a draw from the policy.
        def draws() -> Rows:
            noise = rng.gumbel(size=(max(self.brood, 4), *self._logits.shape))
            rows, member = self.space.settle((self._logits + noise).argmax(axis=2).astype(np.int16))
            return rows[member]

        return self._propose(draws, rng)
