"""How well scores rank: coefficients with bootstrap intervals, regret and precision at the top.

Everywhere, ``scores`` and ``truth`` are float arrays ``[n]`` without NaN, and larger is better. Where a score ties subnets,
what depends on their order is the exact average over all orders: a score that says nothing is worth what chance is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, isfinite, nan

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = [
    "COEFFICIENTS",
    "Estimate",
    "bootstrap",
    "estimate",
    "kendall",
    "pearson",
    "precision_at_top",
    "spearman",
    "top_k_regret",
]

Floats = NDArray[np.float64]


def kendall(x: Floats, y: Floats) -> float:
    """Kendall's tau-b, which accounts for ties on both sides; NaN where one side is constant."""
    from scipy import stats

    if not _varies(x, y):
        return nan
    if len(x) == 2:  # where scipy's variance divides by zero
        return 1.0 if (x[0] < x[1]) == (y[0] < y[1]) else -1.0
    return float(stats.kendalltau(x, y, variant="b", method="asymptotic").statistic)


def pearson(x: Floats, y: Floats) -> float:
    """Pearson's correlation of the values; NaN where one side is constant or holds an infinity."""
    if not _varies(x, y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return nan
    # Divided by its largest value first: the squares of scores such as 1e200 would overflow.
    a, b = ((v / max(np.abs(v).max(), 1e-300)) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt(a @ a) * np.sqrt(b @ b))
    return float(np.clip(a @ b / scale, -1, 1)) if scale > 0 else nan


def spearman(x: Floats, y: Floats) -> float:
    """Spearman's correlation: Pearson's of the average ranks; NaN where one side is constant."""
    from scipy import stats

    return pearson(stats.rankdata(x), stats.rankdata(y)) if _varies(x, y) else nan


COEFFICIENTS = {"kendall": kendall, "spearman": spearman, "pearson": pearson}
"""The coefficients by name."""


def _varies(x: Floats, y: Floats) -> bool:
    if len(x) != len(y):
        raise InputError(f"{len(x)} scores were given for {len(y)} true values. Give one score for each.")
    return len(x) > 1 and bool((x != x[0]).any()) and bool((y != y[0]).any())


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; all NaN where it is not defined.

    Attributes:
        value: On all the data.
        low, high: The bounds.
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float | None]:
        """With ``None`` for NaN, which is not JSON."""
        return {key: value if isfinite(value) else None for key, value in vars(self).items()}

    @property
    def separated(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def bootstrap(
    scores: Mapping[str, Floats],
    truth: Floats,
    rng: np.random.Generator,
    resamples: int = 1000,
    coefficients: Sequence[str] = tuple(COEFFICIENTS),
    extra: Mapping[tuple[str, str], Floats] | None = None,
) -> dict[Hashable, dict[str, Floats]]:
    """Coefficients on resamples of the subnets with replacement; one resample is shared by all scores.

    Because it is shared, the difference between two scores on the same resample is a paired one, and its quantiles are
    an interval of the difference.

    Args:
        scores: Arrays ``[n]`` by name. Subnets whose score is NaN are left out of that score's resamples.
        truth: ``[n]``.
        rng: Where the resamples come from.
        resamples: How many.
        coefficients: Names in :data:`COEFFICIENTS`.
        extra: Further arrays ``[n]``, of which only Kendall is taken.

    Returns:
        By score and coefficient, ``[resamples]``; NaN where a resample has no coefficient.
    """
    work: list[tuple[Hashable, Floats, Sequence[str]]] = [
        (name, column, coefficients) for name, column in scores.items()
    ]
    work += [(key, column, ("kendall",)) for key, column in (extra or {}).items()]
    found = {name: {key: np.full(resamples, nan) for key in wanted} for name, _, wanted in work}
    for number in range(resamples):
        rows = rng.integers(len(truth), size=len(truth))
        for name, values, wanted in work:
            kept = rows[~np.isnan(values[rows])]
            for key in wanted:
                found[name][key][number] = COEFFICIENTS[key](values[kept], truth[kept])
    return found


def estimate(value: float, resampled: Floats, confidence: float = 0.95) -> Estimate:
    """The percentile interval of bootstrap values; undefined where more than one resample in twenty is.

    Raises:
        InputError: The confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"the confidence is {confidence}. Give a number between 0 and 1, such as 0.95.")
    defined = resampled[~np.isnan(resampled)]
    if not isfinite(value) or len(defined) < 0.95 * len(resampled) or not len(defined):
        return Estimate(value, nan, nan)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high))


def _ties(scores: Floats, k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], int]:
    """The ``k`` best: which are certainly among them, which tie for the last places, and how many of these are taken."""
    if not 1 <= k <= len(scores):
        raise InputError(f"the best {k} of {len(scores)} subnets are asked for. Allowed: 1 to {len(scores)}.")
    last = np.sort(scores)[len(scores) - k]
    certain = scores > last
    return certain, scores == last, k - int(certain.sum())


def top_k_regret(scores: Floats, truth: Floats, k: int) -> float:
    """What is lost by training only the ``k`` subnets with the best scores: best truth of all minus best among these.

    Raises:
        InputError: ``k`` is not between 1 and ``n``.
    """
    certain, tied, places = _ties(scores, k)
    best = float(truth.max())
    floor = float(truth[certain].max()) if certain.any() else -np.inf
    values = np.sort(truth[tied])[::-1]
    # The best of the places drawn from the tied ones is the j-th largest where the j larger ones are not drawn.
    total = comb(len(values), places)
    chances = [comb(len(values) - 1 - j, places - 1) / total for j in range(len(values) - places + 1)]
    return sum(chance * (best - max(floor, float(value))) for chance, value in zip(chances, values, strict=False))


def precision_at_top(scores: Floats, truth: Floats, fraction: float) -> float:
    """Which share of the best ``fraction`` by score is among the best ``fraction`` by truth (at least one subnet each).

    Raises:
        InputError: ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise InputError(f"the top fraction is {fraction}. Give a number above 0 and at most 1.")
    k = max(1, round(fraction * len(scores)))
    chances = []
    for values in (scores, truth):
        certain, tied, places = _ties(values, k)
        chances.append(certain + tied * (places / max(int(tied.sum()), 1)))
    return float(chances[0] @ chances[1]) / k
