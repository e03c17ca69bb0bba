"""An evaluation in levels: what is hopeless by a cheap look is not looked at closely.

A subnet is hopeless where, with the most accuracy that a level leaves possible, several subnets that are known fully still
dominate it. The levels: a zero-cost proxy, a predictor, accuracy on part of the validation images (stopped in the middle
where hope ends), the full evaluation. What a level gives up on is told to the algorithm with that level's estimate, recorded
with the level's number, and never part of a front.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.search.explain import wilson
from nasq.search.objectives import Measure, Objective, Values
from nasq.search.results import FULL, LEVEL, Record

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["LEVELS", "Cascade", "CascadeSettings", "Ridge", "Spent", "spent"]

LevelName = Literal["proxy", "predictor", "part"]
LEVELS: tuple[str, ...] = ("proxy", "predictor", "part", "full")
"""The levels' names; a record's ``level`` is 1 for the first and 4 for the last."""
_PENALTIES = tuple(10.0**power for power in range(-3, 5))


@dataclass(frozen=True)
class CascadeSettings:
    """How a cascade decides.

    Attributes:
        levels: Those before the full evaluation, any of ``"proxy"``, ``"predictor"``, ``"part"``.
        confidence: Standard deviations that an estimate may be wrong by.
        dominators: Fully evaluated subnets that must dominate a hopeless one.
        least: Fully evaluated subnets before a proxy or a predictor is believed.

    Raises:
        InputError: An unknown level, or a number out of its range.
    """

    levels: tuple[LevelName, ...] = ("proxy", "predictor", "part")
    confidence: float = 3.0
    dominators: int = 4
    least: int = 24

    def __post_init__(self) -> None:
        unknown = [name for name in self.levels if name not in LEVELS[:-1]]
        if unknown or len(set(self.levels)) != len(self.levels):
            raise InputError(
                f"the levels of a cascade are {list(self.levels)}; allowed: each of {', '.join(LEVELS[:-1])} once."
            )
        if not self.confidence > 0 or self.dominators < 1 or self.least < 3:
            raise InputError(
                f"a cascade has confidence {self.confidence}, dominators {self.dominators} and least {self.least}; allowed: "
                "above 0, 1 or more, 3 or more."
            )


class Ridge:
    """Ridge regression on standardised features whose penalty, and whose error, come from leaving one out.

    The leave-one-out residuals of a linear smoother are exact without refitting: ``r_i / (1 - H_ii)`` (PRESS; Allen,
    Technometrics 16, 1974).

    Args:
        x: Features ``[n, p]``, with ``n`` of at least 3.
        y: What to predict, ``[n]``.
    """

    def __init__(self, x: Values, y: Values) -> None:
        self._mean, spread = x.mean(axis=0), x.std(axis=0)
        self._scale = np.where(spread > 0, spread, 1.0)
        u, s, vt = np.linalg.svd((x - self._mean) / self._scale, full_matrices=False)
        self._level = float(y.mean())
        centred = y - self._level
        best = math.inf
        for penalty in _PENALTIES:
            shrunk = s**2 / (s**2 + penalty * len(y))
            hat = (u**2 * shrunk).sum(axis=1) + 1 / len(y)
            left_out = (centred - u @ (shrunk * (u.T @ centred))) / np.maximum(1 - hat, 1e-9)
            error = float(np.sqrt((left_out**2).mean()))
            if error < best:
                best, factor = error, s / (s**2 + penalty * len(y))
                self.weights: Values = vt.T @ (factor * (u.T @ centred))
                self.penalty = penalty
        self.error = best

    def predict(self, x: Values) -> Values:
        """Predictions ``[m]`` for features ``[m, p]``; each has a standard error of about :attr:`error`."""
        predicted: Values = self._level + ((x - self._mean) / self._scale) @ self.weights
        return predicted


class Cascade:
    """An evaluator in levels; see the module. It learns between generations only, so that workers agree.

    Args:
        space: Of the subnets.
        objectives: The first is the accuracy, a share of images from 0 to 1; the others are on rows.
        measures: Recorded as well.
        settings: Which levels, and how they decide.
        proxy: Score of a subnet; one that is not finite has no say.
        part: The images of a part of the validation set as they come: pairs (right, seen), both so far.
        clock: Seconds from any origin.

    Raises:
        InputError: The first objective is not to be maximised or not on subnets, another is on subnets, or a level lacks its
            function.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        measures: Sequence[Measure],
        settings: CascadeSettings,
        *,
        proxy: Callable[[Subnet], float] | None = None,
        part: Callable[[Subnet], Iterable[tuple[int, int]]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        first, *others = objectives
        if first.direction != "maximize" or first.on != "subnet" or any(other.on != "rows" for other in others):
            raise InputError(
                "a cascade saves evaluations of accuracy: it must be the first objective, and all others must be costs, not "
                f"{', '.join(objective.name for objective in objectives)}. Change search.objectives or search.cascade.levels."
            )
        for level, function in (("proxy", proxy), ("part", part)):
            if level in settings.levels and function is None:
                raise InputError(f"the cascade's level {level!r} needs a function that gives it.")
        self.settings, self._space, self._accuracy, self._costs = settings, space, first, others
        self._measures = {one.name: one for one in (*measures, *(other.measure for other in others))}
        self._proxy, self._part, self._clock = proxy, part, clock
        # The numbers of records that are known fully, better = larger: accuracy first.
        self._known: Values = np.zeros((0, len(objectives)))
        self._scores: dict[str, float] = {}
        self._models: dict[str, Ridge] = {}

    @property
    def names(self) -> Sequence[str]:
        """The objectives, the measures, the level, the proxy's score (1 in ``proxy_failed``: it was not finite), seconds."""
        costs = [name for name in self._measures if name not in {one.name for one in self._costs}]
        objectives = [self._accuracy.name, *(one.name for one in self._costs)]
        return [*objectives, *costs, LEVEL, "proxy_score", "proxy_failed", *(f"{level}_seconds" for level in LEVELS)]

    def known(self, subnet: Subnet) -> dict[str, float]:
        """The values that cost nothing."""
        rows = self._space.to_rows([subnet])
        return {name: float(measure(rows)[0]) for name, measure in self._measures.items()}

    def learn(self, records: Sequence[Record]) -> None:
        """Takes the records of earlier generations; proxy and predictor are fitted to those that are known fully."""
        full = [record for record in records if record.full]
        better = [[self._accuracy.sign * r.values[self._accuracy.name],
                   *(c.sign * r.values[c.name] for c in self._costs)] for r in full]  # fmt: skip
        self._known = np.array(better).reshape(len(full), 1 + len(self._costs))
        self._models = {}
        if len(full) < self.settings.least:
            return
        y = np.array([record.values[self._accuracy.name] for record in full])
        if "proxy" in self.settings.levels:
            scores = np.array([record.values["proxy_score"] for record in full])
            finite = np.array([record.values["proxy_failed"] for record in full]) == 0
            if finite.sum() >= self.settings.least:
                self._models["proxy"] = Ridge(scores[finite, None], y[finite])
        if "predictor" in self.settings.levels:
            self._models["predictor"] = Ridge(self._features([record.subnet for record in full]), y)

    def _features(self, subnets: Sequence[Subnet]) -> Values:
        """One-hot options and the logarithms of the costs, ``[n, p]``."""
        rows = self._space.to_rows(subnets)
        costs = [np.log1p(np.maximum(measure(rows), 0.0)) for measure in self._measures.values()]
        return np.column_stack([self._space.encode(rows).astype(np.float64), *costs])

    def _hopeless(self, accuracy: float, known: Mapping[str, float]) -> bool:
        """Whether enough subnets dominate this one even with such an accuracy."""
        point = np.array([accuracy, *(cost.sign * known[cost.name] for cost in self._costs)])
        dominating = (self._known >= point).all(axis=1) & (self._known > point).any(axis=1)
        return int(dominating.sum()) >= self.settings.dominators

    def __call__(self, subnet: Subnet) -> dict[str, float]:
        """The values; of a hopeless subnet the accuracy is an estimate and the level less than 4."""
        known, seconds, extra = (
            self.known(subnet),
            dict.fromkeys(LEVELS, 0.0),
            {"proxy_score": 0.0, "proxy_failed": 0.0},
        )
        for level in (*(one for one in LEVELS if one in self.settings.levels), LEVELS[-1]):
            start = self._clock()
            accuracy, hopeless = self._level(level, subnet, known, extra)
            seconds[level] = self._clock() - start
            if hopeless:
                break
        values = {**known, **extra, self._accuracy.name: accuracy, LEVEL: LEVELS.index(level) + 1.0}
        values |= {f"{name}_seconds": value for name, value in seconds.items()}
        return {name: values[name] for name in self.names}

    def _level(
        self, level: str, subnet: Subnet, known: Mapping[str, float], extra: dict[str, float]
    ) -> tuple[float, bool]:
        """A level's estimate of the accuracy, and whether it gives up."""
        if level == "full":
            return self._accuracy.evaluate(subnet), False
        if level == "part":
            return self._partial(subnet, known)
        if level == "proxy":
            assert self._proxy is not None
            score = float(self._proxy(subnet))
            if not math.isfinite(score):
                extra["proxy_failed"] = 1.0
                return 0.0, False
            extra["proxy_score"] = score
            features: Values = np.array([[score]])
        else:
            features = self._features([subnet])
        if level not in self._models:
            return 0.0, False
        model = self._models[level]
        guess = float(np.clip(model.predict(features)[0], 0.0, 1.0))
        return guess, self._hopeless(guess + self.settings.confidence * model.error, known)

    def _partial(self, subnet: Subnet, known: Mapping[str, float]) -> tuple[float, bool]:
        assert self._part is not None
        right = seen = 0
        for right, seen in self._part(subnet):
            if self._hopeless(wilson(right, seen, self.settings.confidence)[1], known):
                return right / seen, True
        return right / max(seen, 1), False


@dataclass(frozen=True)
class Spent:
    """What a level of a cascade cost.

    Attributes:
        level: Its name.
        subnets: How many it looked at.
        ended: How many of them went no further.
        seconds: All together; with several workers more than the time that passed.
    """

    level: str
    subnets: int
    ended: int
    seconds: float


def spent(records: Sequence[Record]) -> list[Spent]:
    """Where the time of a search with a cascade went; empty for one without."""
    if not records or LEVEL not in records[0].values:
        return []
    levels: NDArray[np.float64] = np.array([record.values[LEVEL] for record in records])
    found = []
    for number, level in enumerate(LEVELS, 1):
        seconds = np.array([record.values[f"{level}_seconds"] for record in records])
        looked = int(((levels >= number) & ((seconds > 0) | (number == FULL))).sum())
        found.append(Spent(level, looked, int((levels == number).sum()), float(seconds.sum())))
    return found
