"""Sampling bit-widths so that every average gets its share of the training (LLM-QFA's scheduler).

Where every layer's bits are drawn alone, the average over ``L`` layers deviates from its mean by ``1 / sqrt(L)`` of what
one layer's bits do: nearly all subnets of a training have nearly the same average, and those with few or many bits are
never trained. The scheduler moves the mean instead, from the highest to the lowest average and back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.training.paths import RANDOM, Path, Uniform

if TYPE_CHECKING:
    from nasq.space import Choice, SearchSpace, Subnet

__all__ = ["Balanced"]

_STEEPEST = 60.0
"""Steepness at which a bit more is e^60 times as likely: all layers have their most bits."""
_HALVINGS = 60
_TRIES = 100


class Balanced(Uniform):
    """Subnets whose average of some choices follows a triangular wave (LLM-QFA, section 3.3).

    At step ``t`` the mean of the average is ``low + (high - low) |2 (t mod period) / period - 1|``: all choices at their
    largest option in step 0, all at their smallest half a period later. In between, each choice has option ``b`` with
    probability proportional to ``exp(eta b)``, the same ``eta`` for all, which gives the wanted mean; this is our reading:
    the paper does not say how probabilities follow from the mean, and its formula, as quoted, lacks the offset ``low``.
    All other choices of the space are drawn uniformly.

    Args:
        space: Where to draw.
        generator: The stream to draw from; its state is part of the sampler's.
        choices: Names of the choices to balance, which have numbers as options; ``None``: all whose names end in
            ``weight_bits``. Their plain average counts, whether they are active or not.
        period: Steps of a whole wave, 2 or more. The paper's 8,000 of 10,000 steps; 1,000 were too few there.
        paths: Subnets per step.

    Raises:
        InputError: No choice is balanced, one is unknown or has options that are no numbers, or the period is below 2.
    """

    def __init__(
        self,
        space: SearchSpace,
        generator: torch.Generator,
        choices: Sequence[str] | None = None,
        period: int = 8000,
        paths: int = 1,
    ) -> None:
        super().__init__(space, generator, paths)
        if period < 2:
            raise InputError(f"the period is {period} steps; allowed: 2 or more")
        names = [name for name in space.names if name.endswith("weight_bits")] if choices is None else list(choices)
        if not names:
            raise InputError(
                "no choice to balance: the space has none whose name ends in 'weight_bits'. Name the choices: "
                "Balanced(space, generator, choices=[...])."
            )
        self.names, self.period, self.time = names, period, 0
        self._columns = [space.positions[space[name].name] for name in names]
        self._options, self._allowed = _table([space[name] for name in names])
        self.low, self.high = (float(self._averages(extreme)) for extreme in (np.inf, -np.inf))

    def _averages(self, filler: float) -> Any:
        """The lowest (filler ``inf``) or highest (``-inf``) average."""
        padded = np.where(self._allowed, self._options, filler)
        return (padded.min(1) if filler > 0 else padded.max(1)).mean()

    def target(self, time: int) -> float:
        """The mean of the average in step ``time``, counted from 0."""
        return self.low + (self.high - self.low) * abs(2 * (time % self.period) / self.period - 1)

    def probabilities(self, mean: float) -> NDArray[np.float64]:
        """Probability of each option of each choice, ``[choices, options]``, for a mean of the average.

        Raises:
            InputError: No probabilities have that mean.
        """
        if not self.low <= mean <= self.high:
            raise InputError(f"an average of {mean:g} cannot be had; allowed: {self.low:g} to {self.high:g}")
        low, high = -_STEEPEST, _STEEPEST
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = float((self._weights(middle) * self._options).sum(1).mean()) < mean
            low, high = (middle, high) if below else (low, middle)
        at_the_end = {self.low: -np.inf, self.high: np.inf}.get(mean)
        return self._weights((low + high) / 2 if at_the_end is None else at_the_end)

    def _weights(self, steepness: float) -> NDArray[np.float64]:
        """Probabilities proportional to ``exp(steepness * option)``; at infinity all on one option."""
        if np.isinf(steepness):
            edge = np.where(self._allowed, np.sign(steepness) * self._options, -np.inf)
            return cast("NDArray[np.float64]", (edge == edge.max(1, keepdims=True)).astype(np.float64))
        powers = np.where(self._allowed, steepness * self._options, -np.inf)
        weights = np.exp(powers - powers.max(1, keepdims=True))
        return cast("NDArray[np.float64]", weights / weights.sum(1, keepdims=True))

    def step(self) -> list[Path]:
        """``paths`` subnets around the average that is due.

        Raises:
            InputError: The space's rules leave none of a hundred draws.
        """
        probabilities = self.probabilities(self.target(self.time))
        self.time += 1
        return [Path(self._draw(probabilities), RANDOM) for _ in range(self.paths)]

    def _draw(self, probabilities: NDArray[np.float64]) -> Subnet:
        bounds = np.cumsum(probabilities, axis=1)
        bounds[:, -1] = 1.0
        for _ in range(_TRIES):
            rows = self.space.sample_batch(1, self.generator)
            drawn = torch.rand(len(self.names), generator=self.generator, dtype=torch.float64).numpy()
            rows[0, self._columns] = (drawn[:, None] >= bounds).sum(1)
            settled, member = self.space.settle(rows)
            if member[0]:
                return self.space.to_subnet(settled[0])
        raise InputError(
            f"none of {_TRIES} subnets drawn with the balanced choices keeps the rules of the space. Balance fewer choices."
        )

    def spread(self, count: int, means: int = 64) -> NDArray[np.int16]:
        """Canonical rows ``[count, choices]`` whose averages are spread evenly from the lowest to the highest.

        Rows that break the space's rules are left out, so there may be fewer. The steps done stay as they are.

        Args:
            count: Rows to draw.
            means: Different means among them.
        """
        rows = self.space.sample_batch(count, self.generator)
        drawn = torch.rand(count, len(self.names), generator=self.generator, dtype=torch.float64).numpy()
        wanted = np.linspace(self.low, self.high, means)
        for mean, part in zip(wanted, np.array_split(np.arange(count), means), strict=True):
            bounds = np.cumsum(self.probabilities(float(mean)), axis=1)
            bounds[:, -1] = 1.0
            rows[part[:, None], self._columns] = (drawn[part, :, None] >= bounds).sum(2)
        settled, member = self.space.settle(rows)
        return settled[member]

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator and the steps done."""
        return {**super().state_dict(), "time": self.time}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        super().load_state_dict(state)
        self.time = int(state["time"])


def _table(choices: Sequence[Choice]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The options of all choices ``[choices, options]``, and where there is one."""
    width = max(len(choice.options) for choice in choices)
    options, allowed = np.zeros((len(choices), width)), np.zeros((len(choices), width), dtype=np.bool_)
    for row, choice in enumerate(choices):
        if not choice.is_size:
            raise InputError(
                f"choice {choice.name!r} has the options {list(choice.options)}, whose average means nothing. Balance "
                "choices of numbers."
            )
        options[row, : len(choice.options)] = choice.array
        allowed[row, : len(choice.options)] = True
    return options, allowed
