"""An Optuna sampler as a model of a search space: it learns rows with values and proposes rows."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.errors import choose_from, require
from nasq.search.objectives import Rows

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["SAMPLERS", "OptunaModel"]


def _tpe(samplers: Any, seed: int, population: int, startup: int) -> Any:
    return samplers.TPESampler(
        n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
    )  # `group` is what lets the multivariate form work on conditional choices


def _nsga2(samplers: Any, seed: int, population: int, startup: int) -> Any:
    return samplers.NSGAIISampler(population_size=max(2, population), seed=seed)


def _gp(samplers: Any, seed: int, population: int, startup: int) -> Any:
    return samplers.GPSampler(n_startup_trials=startup, seed=seed)


SAMPLERS: dict[str, Callable[[Any, int, int, int], Any]] = {"tpe": _tpe, "nsga2": _nsga2, "gp": _gp}
"""Optuna's samplers by the names used here."""

# How NSGAIISampler marks the generation of a trial; trials that are put in from outside need the mark.
_GENERATION = "NSGAIISampler:generation"


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces every study and warns of samplers that it calls experimental; inside, it does not."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)


class OptunaModel:
    """A study in memory: complete trials are what was evaluated; proposals leave nothing behind that a sampler reads.

    Choices are suggested in the space's order, parents first, each only where it is active. Ordered choices are
    integers, others categories.

    Args:
        space: What is searched; its rules may refuse what is suggested.
        objectives: How many; values are turned so that larger is better.
        sampler: One of :data:`SAMPLERS`.
        population: Of genetic samplers.
        startup: Complete trials before a model is made; random until then.

    Raises:
        InputError: The sampler is unknown.
    """

    def __init__(
        self, space: SearchSpace, objectives: int, sampler: str = "tpe", population: int = 24, startup: int = 10
    ) -> None:
        if sampler not in SAMPLERS:
            raise choose_from("Optuna sampler", sampler, SAMPLERS)
        self._space, self._kind = space, SAMPLERS[sampler]
        self._population, self._startup = population, startup
        self._optuna = require("optuna")
        self._count = 0
        distributions = self._optuna.distributions
        self._distributions = {
            choice.name: distributions.IntDistribution(0, len(choice.options) - 1)
            if choice.ordered
            else distributions.CategoricalDistribution(tuple(range(len(choice.options))))
            for choice in space.choices
        }
        self._free = [column for column in range(len(space)) if space.sizes[column] > 1]
        self._defaults = space.settle(np.zeros((1, len(space)), dtype=np.int16))[0][0]
        with _quiet():
            self._study = self._optuna.create_study(directions=["maximize"] * objectives)

    def __len__(self) -> int:
        return self._count

    def add(self, rows: Rows, values: Sequence[Sequence[float]]) -> None:
        """Learns canonical rows ``[n, choices]`` and their values ``[n, objectives]``."""
        active = self._space.active(rows)
        for row, mask, value in zip(rows.tolist(), active, values, strict=True):
            names = [self._space.names[column] for column in self._free if mask[column]]
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params={name: row[self._space.positions[name]] for name in names},
                    distributions={name: self._distributions[name] for name in names},
                    values=list(value),
                    system_attrs={_GENERATION: self._count // self._population},
                )
            )
            self._count += 1

    def propose(self, count: int, seed: int) -> Rows:
        """Up to ``count`` canonical rows; what the space's rules refuse is left out.

        Args:
            count: How many to suggest; those of one call know of each other.
            seed: Decides them, together with what was learned.
        """
        samplers = self._optuna.samplers
        with _quiet():
            self._study.sampler = self._kind(samplers, seed, self._population, self._startup)
            trials = [self._study.ask() for _ in range(count)]
            rows = np.stack([self._suggest(trial) for trial in trials])
            for trial in trials:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        settled, member = self._space.settle(rows)
        return settled[member]

    def _suggest(self, trial: Any) -> Rows:
        row: Rows = self._defaults.copy()
        active = self._space.active(row[None])[0]
        for column in self._free:
            if not active[column]:
                continue
            name = self._space.names[column]
            distribution = self._distributions[name]
            before = row[column]
            if hasattr(distribution, "choices"):
                row[column] = trial.suggest_categorical(name, distribution.choices)
            else:
                row[column] = trial.suggest_int(name, distribution.low, distribution.high)
            if row[column] != before:
                active = self._space.active(row[None])[0]
        return row
