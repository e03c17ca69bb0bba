"""What a way of scoring is worth over several seeds, and whether one way is better than another.

The interval of one audit says how far the sample of subnets decides a number; another training seed may change it more.
Here both are resampled: the subnets, which all seeds share, and the seeds themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.ranking.audits import Audit
from nasq.ranking.statistics import Estimate, estimate, kendall

__all__ = ["SeedsAudit", "compare_seeds", "kendall_over_seeds", "over_seeds"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SeedsAudit:
    """Audits of the same scores from several seeds.

    Attributes:
        audits: One per seed.
        mean: By score and coefficient: the mean over the seeds.
        deviation: By score and coefficient: the standard deviation over the seeds (``n - 1``); NaN with one seed.
    """

    audits: tuple[Audit, ...]
    mean: Mapping[str, Mapping[str, float]]
    deviation: Mapping[str, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; undefined numbers are ``None``."""
        plain = {
            part: {
                name: {key: value if np.isfinite(value) else None for key, value in row.items()}
                for name, row in getattr(self, part).items()
            }
            for part in ("mean", "deviation")
        }
        return {"seeds": len(self.audits), **plain, "audits": [one.to_json() for one in self.audits]}


def over_seeds(audits: Sequence[Audit]) -> SeedsAudit:
    """Summarises audits of the same scores.

    Raises:
        InputError: There is none, or they are of different scores or metrics.
    """
    if not audits:
        raise InputError("no audit was given. Give one per seed.")
    names = [score.name for score in audits[0].scores]
    for number, one in enumerate(audits[1:], 2):
        other = [score.name for score in one.scores]
        if other != names or one.metric != audits[0].metric:
            raise InputError(
                f"the score files of seeds have to hold the same scores: file 1 has {', '.join(names)}, and file {number} "
                f"has {', '.join(other)}. Audit them one by one, or write the same columns."
            )
    values = {
        score.name: {
            key: np.array([one.scores[index].coefficients[key].value for one in audits]) for key in score.coefficients
        }
        for index, score in enumerate(audits[0].scores)
    }
    mean = {name: {key: float(found.mean()) for key, found in row.items()} for name, row in values.items()}
    spread = {name: {key: _deviation(found) for key, found in row.items()} for name, row in values.items()}
    return SeedsAudit(tuple(audits), mean, spread)


def _deviation(values: Floats) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _checked(scores: Floats, truth: Floats) -> Floats:
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 2 or found.shape[1] != len(truth) or not len(found):
        raise InputError(f"scores over seeds are [seeds, {len(truth)}], one per subnet; got {list(found.shape)}.")
    if not np.isfinite(found).all() or not np.isfinite(truth).all():
        raise InputError("scores over seeds hold a number that is not finite. Leave those subnets out everywhere.")
    return found


def _resampled(ways: Sequence[Floats], truth: Floats, resamples: int, seed: int) -> Floats:
    """Mean Kendall over resampled seeds on resampled subnets, which all ways share: ``[ways, resamples]``."""
    rng = np.random.default_rng(seed)
    found = np.empty((len(ways), resamples))
    for number in range(resamples):
        rows = rng.integers(len(truth), size=len(truth))
        for index, way in enumerate(ways):
            drawn = np.unique(rng.integers(len(way), size=len(way)), return_counts=True)
            taus = [kendall(way[seed_index][rows], truth[rows]) for seed_index in drawn[0]]
            found[index, number] = np.average(taus, weights=drawn[1])
    return found


def kendall_over_seeds(scores: Floats, truth: Floats, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean Kendall over seeds, with a 95 % interval over subnets and seeds.

    Args:
        scores: ``[seeds, n]``.
        truth: ``[n]``.
        resamples: Of the bootstrap.
        seed: Of its random numbers.

    Raises:
        InputError: The shapes do not fit, or a number is not finite.
    """
    way = _checked(scores, truth)
    value = float(np.mean([kendall(one, truth) for one in way]))
    return estimate(value, _resampled([way], truth, resamples, seed)[0])


def compare_seeds(first: Floats, second: Floats, truth: Floats, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Mean Kendall of the first way minus that of the second; they are told apart where the interval excludes 0.

    Both are computed on the same resampled subnets (paired); their seeds, which have nothing to do with each other, are
    resampled apart.

    Args:
        first, second: ``[seeds, n]``; the numbers of seeds may differ.
        truth: ``[n]``.
        resamples: Of the bootstrap.
        seed: Of its random numbers.

    Raises:
        InputError: The shapes do not fit, or a number is not finite.
    """
    ways = [_checked(first, truth), _checked(second, truth)]
    values = [float(np.mean([kendall(one, truth) for one in way])) for way in ways]
    resampled = _resampled(ways, truth, resamples, seed)
    return estimate(values[0] - values[1], resampled[0] - resampled[1])
