"""Predictors that say how sure they are: ensembles on the codes of subnets, cheap enough to be fitted after every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError, choose_from, require
from nasq.search.objectives import Rows, Values

if TYPE_CHECKING:
    from nasq.ranking.nodes import NodeStatistics
    from nasq.ranking.ranker import RankerConfig
    from nasq.space import SearchSpace

__all__ = ["PREDICTORS", "Boosted", "Codes", "CqapEnsemble", "Forest", "MLPEnsemble", "ParZC", "Predictor", "predictor"]

Features = Callable[[Rows], NDArray[Any]]
"""Rows ``[n, choices]`` to further numbers ``[n, features]`` that a predictor may use: costs, proxies."""


class Predictor(Protocol):
    """Learns values of rows; predicts them with an uncertainty."""

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """Learns ``values`` ``[n]`` of canonical rows ``[n, choices]`` from the start; ``seed`` decides everything random."""

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """Mean and standard deviation, ``[n]`` each, in the unit of the values."""


class Codes:
    """What a predictor sees of a subnet: its one-hot code, and further features, standardised.

    Features that are positive everywhere enter as logarithms. Mean and deviation are those of 512 random subnets,
    always the same.

    Args:
        space: Whose subnets.
        features: Rows to ``[n, features]``; ``None``: the code alone.
    """

    def __init__(self, space: SearchSpace, features: Features | None = None) -> None:
        self.space, self.features = space, features
        if features is not None:
            sample = np.asarray(features(space.sample_batch(512, np.random.default_rng(0))), dtype=np.float64)
            self._log = (sample > 0).all(axis=0)
            scaled = self._scaled(sample)
            self._mean, self._std = scaled.mean(axis=0), np.where(scaled.std(axis=0) > 0, scaled.std(axis=0), 1.0)

    def _scaled(self, values: Values) -> Values:
        return np.where(self._log, np.log(np.where(self._log, np.maximum(values, 1e-300), 1.0)), values)

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """Codes ``[n, length]``."""
        code = self.space.encode(rows)
        if self.features is None:
            return code
        own = self._scaled(np.asarray(self.features(rows), dtype=np.float64))
        return np.concatenate([code, ((own - self._mean) / self._std).astype(np.float32)], axis=1)


class Forest:
    """A random forest of scikit-learn (Breiman, Machine Learning 45, 2001): the trees' spread is the uncertainty.

    Args:
        codes: Of subnets.
        trees: How many.
    """

    def __init__(self, codes: Codes, trees: int = 60) -> None:
        self.codes, self.trees = codes, trees
        self._members: Sequence[Any] = ()

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """See :class:`Predictor`."""
        kind = require("sklearn.ensemble").RandomForestRegressor
        model = kind(self.trees, max_features=0.5, random_state=seed % 2**32)
        self._members = model.fit(self.codes(rows), values).estimators_

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """See :class:`Predictor`."""
        return _spread(self._members, self.codes(rows))


class Boosted:
    """Gradient boosted trees of scikit-learn, several that see random parts of the data.

    Args:
        codes: Of subnets.
        members: How many.
        trees: In each.
    """

    def __init__(self, codes: Codes, members: int = 4, trees: int = 100) -> None:
        self.codes, self.members, self.trees = codes, members, trees
        self._members: Sequence[Any] = ()

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """See :class:`Predictor`."""
        kind = require("sklearn.ensemble").GradientBoostingRegressor
        x = self.codes(rows)
        seeds = np.random.default_rng(seed).integers(2**32, size=self.members)
        models = (
            kind(n_estimators=self.trees, subsample=0.7, max_features=0.5, random_state=int(one)) for one in seeds
        )
        self._members = [model.fit(x, values) for model in models]

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """See :class:`Predictor`."""
        return _spread(self._members, self.codes(rows))


def _spread(members: Sequence[Any], x: NDArray[np.float32]) -> tuple[Values, Values]:
    if not members:
        raise InputError("the predictor has learned nothing yet. Call fit.")
    predicted = np.array([member.predict(x) for member in members], dtype=np.float64)
    return predicted.mean(axis=0), predicted.std(axis=0)


class MLPEnsemble:
    """Perceptrons with two hidden layers, trained side by side in NumPy; each weighs the data in a random way.

    BANANAS (White et al., AAAI 2021) has five networks of ten or more layers on path codes; these are small, on one-hot
    codes, and their weights of the data (a Bayesian bootstrap) take the place of different starts alone.

    Args:
        codes: Of subnets.
        members: How many.
        hidden: Units in each hidden layer.
        steps: Of Adam, each on all the data; the rate falls to 0 along a cosine.
        learning_rate: At the start.
        decay: Of the weights, decoupled.
    """

    def __init__(
        self,
        codes: Codes,
        members: int = 5,
        hidden: int = 48,
        steps: int = 150,
        learning_rate: float = 0.01,
        decay: float = 0.01,
    ) -> None:
        self.codes, self.members, self.hidden = codes, members, hidden
        self.steps, self.learning_rate, self.decay = steps, learning_rate, decay
        self._weights: list[NDArray[np.float32]] = []
        self._mean, self._std = 0.0, 1.0

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """See :class:`Predictor`."""
        rng = np.random.default_rng(seed)
        x = self.codes(rows)
        self._mean, self._std = float(np.mean(values)), float(np.std(values)) or 1.0
        wanted = ((np.asarray(values) - self._mean) / self._std).astype(np.float32)[None, :, None]
        importance = rng.exponential(size=(self.members, len(x), 1)).astype(np.float32) * (2.0 / len(x))
        self._weights = self._start(x.shape[1], rng)
        moments = [[np.zeros_like(weight) for weight in self._weights] for _ in range(2)]
        for step in range(1, self.steps + 1):
            gradients = _gradients(self._weights, x, wanted, importance)
            rate = self.learning_rate * 0.5 * (1 + np.cos(np.pi * step / self.steps))
            for index, gradient in enumerate(gradients):
                first, second = moments[0][index], moments[1][index]
                first += 0.1 * (gradient - first)
                second += 0.001 * (gradient * gradient - second)
                size = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
                shrink = self.decay if index % 2 == 0 else 0.0  # biases keep their size
                self._weights[index] = (self._weights[index] * (1 - rate * shrink) - rate * size).astype(np.float32)

    def _start(self, inputs: int, rng: np.random.Generator) -> list[NDArray[np.float32]]:
        sizes = [inputs, self.hidden, self.hidden, 1]
        weights: list[NDArray[np.float32]] = []
        for before, after in pairwise(sizes):
            scale = np.sqrt(2.0 / before)
            weights.append((scale * rng.standard_normal((self.members, before, after))).astype(np.float32))
            weights.append(np.zeros((self.members, 1, after), dtype=np.float32))
        return weights

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """See :class:`Predictor`."""
        if not self._weights:
            raise InputError("the predictor has learned nothing yet. Call fit.")
        predicted = _forward(self._weights, self.codes(rows))[-1][..., 0].astype(np.float64)
        return predicted.mean(axis=0) * self._std + self._mean, predicted.std(axis=0) * self._std


def _forward(weights: list[NDArray[np.float32]], x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Outputs ``[members, n, units]`` of every layer: two with ReLU, and the last."""
    layers: list[NDArray[np.float32]] = []
    value = x
    for index in range(0, len(weights), 2):
        value = value @ weights[index] + weights[index + 1]
        if index < len(weights) - 2:
            value = np.maximum(value, 0)
        layers.append(value)
    return layers


def _gradients(
    weights: list[NDArray[np.float32]],
    x: NDArray[np.float32],
    wanted: NDArray[np.float32],
    importance: NDArray[np.float32],
) -> list[NDArray[np.float32]]:
    """The gradient of the weighted squared error for every weight."""
    layers = _forward(weights, x)
    back = importance * (layers[-1] - wanted)
    found: list[NDArray[np.float32]] = []
    for index in range(len(layers) - 1, -1, -1):
        below = layers[index - 1] if index else x[None]
        found = [below.transpose(0, 2, 1) @ back, back.sum(axis=1, keepdims=True), *found]
        if index:
            back = (back @ weights[2 * index].transpose(0, 2, 1)) * (below > 0)
    return found


class CqapEnsemble:
    """Several :class:`~nasq.search.predictors.CQAP` with different seeds.

    Args:
        space: Whose subnets.
        members: How many.
        epochs: Of each fit.
    """

    def __init__(self, space: SearchSpace, members: int = 3, epochs: int = 60) -> None:
        self.space, self.members, self.epochs = space, members, epochs
        self._members: list[Any] = []

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """See :class:`Predictor`."""
        from nasq.search.predictors.cqap import CQAP, Fit  # loads torch
        from nasq.search.predictors.pairs import Pairs

        pairs = Pairs(rows, np.asarray(values, dtype=np.float64))
        self._members = [CQAP(self.space) for _ in range(self.members)]
        for member, one in zip(
            self._members, np.random.default_rng(seed).integers(2**31, size=self.members), strict=True
        ):
            member.fit(pairs, Fit(epochs=self.epochs, held_out=max(0.1, 1 / len(pairs)), seed=int(one)))

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """See :class:`Predictor`."""
        if not self._members:
            raise InputError("the predictor has learned nothing yet. Call fit.")
        predicted = np.array([member(rows) for member in self._members])
        return predicted.mean(axis=0), predicted.std(axis=0)


class ParZC:
    """The ranker of :mod:`nasq.ranking` on node-wise statistics of untrained subnets; it predicts an order, not a unit.

    Args:
        statistics: Rows to node-wise statistics, one pass over a batch for each subnet: what costs time here. Keep those
            that come again.
        config: Of the ranker.
    """

    def __init__(
        self, statistics: Callable[[Rows], Sequence[NodeStatistics]], config: RankerConfig | None = None
    ) -> None:
        self.statistics, self.config = statistics, config
        self._ranker: Any = None
        self._mean, self._std = 0.0, 1.0

    def fit(self, rows: Rows, values: Values, seed: int) -> None:
        """See :class:`Predictor`."""
        from dataclasses import replace

        from nasq.ranking.ranker import RankerConfig, fit  # loads torch

        config = replace(self.config or RankerConfig(), seed=seed % 2**20)
        self._mean, self._std = float(np.mean(values)), float(np.std(values))
        self._ranker = fit(self.statistics(rows), values, config=config)

    def __call__(self, rows: Rows) -> tuple[Values, Values]:
        """See :class:`Predictor`."""
        if self._ranker is None:
            raise InputError("the predictor has learned nothing yet. Call fit.")
        mean, std = self._ranker.predict(self.statistics(rows))
        return mean * self._std + self._mean, std * self._std


PREDICTORS: dict[str, Callable[[SearchSpace, Features | None], Predictor]] = {
    "boosted": lambda space, features: Boosted(Codes(space, features)),
    "cqap": lambda space, features: CqapEnsemble(space),
    "forest": lambda space, features: Forest(Codes(space, features)),
    "mlp": lambda space, features: MLPEnsemble(Codes(space, features)),
}
"""Predictors by name; those that need more than a space (:class:`ParZC`) are made by hand."""


def predictor(name: str, space: SearchSpace, features: Features | None = None) -> Predictor:
    """A predictor that has learned nothing yet.

    Args:
        name: One of :data:`PREDICTORS`.
        space: Whose subnets.
        features: Rows to ``[n, features]``: costs, proxies; ``cqap`` sees the code alone.

    Raises:
        InputError: The name is unknown.
    """
    if name not in PREDICTORS:
        raise choose_from("predictor", name, PREDICTORS)
    return PREDICTORS[name](space, features)
