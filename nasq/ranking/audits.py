"""How well scores rank subnets whose worth is known, with the trivial baselines beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nasq.errors import InputError
from nasq.ranking.statistics import (
    COEFFICIENTS,
    Estimate,
    bootstrap,
    estimate,
    kendall,
    precision_at_top,
    top_k_regret,
)
from nasq.ranking.table import Table
from nasq.space import SearchSpace

__all__ = ["BASELINES", "Audit", "ScoreAudit", "audit", "consistency", "match"]

Floats = NDArray[np.float64]

BASELINES = ("params", "flops")
"""Metrics that every score has to beat: what a network costs."""

_FEWEST = 5
_TOP = (1, 10)


@dataclass(frozen=True)
class ScoreAudit:
    """One score against the truth.

    Attributes:
        name: Of the score.
        count: Subnets that have it.
        missing: Subnets whose score is NaN; they are left out.
        coefficients: Kendall, Spearman and Pearson with intervals.
        regret: By ``k``: truth of the best subnet minus that of the best among the ``k`` best scores.
        precision: By fraction: share of the top by score that is in the top by truth.
        beyond: By baseline: Kendall minus the baseline's, with a paired interval.
    """

    name: str
    count: int
    missing: int
    coefficients: Mapping[str, Estimate]
    regret: Mapping[int, float]
    precision: Mapping[float, float]
    beyond: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; undefined numbers are ``None``."""
        return {
            "score": self.name, "count": self.count, "missing": self.missing,
            **{name: found.to_json() for name, found in self.coefficients.items()},
            "regret": {str(k): value if isfinite(value) else None for k, value in self.regret.items()},
            "precision": {str(share): value for share, value in self.precision.items()},
            "beyond": {name: found.to_json() for name, found in self.beyond.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """Scores against one metric of a table.

    Attributes:
        metric: The metric.
        subnets: How many subnets both files hold.
        unmatched: How many scored subnets the table does not hold.
        scores: One entry per score, the baselines last.
        missing_baselines: Baselines that neither file holds.
        resamples: Of the bootstrap behind the intervals.
    """

    metric: str
    subnets: int
    unmatched: int
    scores: tuple[ScoreAudit, ...]
    missing_baselines: tuple[str, ...]
    resamples: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "scores": [score.to_json() for score in self.scores]}


def match(
    scores: Table, table: Table, network: nn.Module | None = None, space: SearchSpace | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of both that are about the same subnet: indices into ``scores`` and into ``table``.

    Subnets are compared by official name, else as JSON, else (with a network) after names were translated.

    Raises:
        InputError: They share no subnet; says how each of them names its own.
    """
    ways: list[Callable[[Table], Sequence[Any]]] = [lambda file: file.names, lambda file: file.subnets]
    if network is not None and space is not None:
        ways.append(lambda file: file.members(network, space))
    best: list[tuple[int, int]] = []
    for way in ways:
        known = {key: row for row, key in enumerate(way(table))}
        found = [(row, known[key]) for row, key in enumerate(way(scores)) if key in known]
        best = found if len(found) > len(best) else best
        if len(best) == len(scores):
            break
    if not best:
        hint = "" if network is not None else " Name the search space (--space), so that names can be translated."
        raise InputError(
            f"{scores.source} and {table.source} have no subnet in common. The first one is {_example(scores)} there and "
            f"{_example(table)} here.{hint}"
        )
    pairs = np.array(best, dtype=np.int64)
    return pairs[:, 0], pairs[:, 1]


def _example(table: Table) -> str:
    return repr(table.names[0]) if table.names else table.subnets[0].to_json()[:120]


def audit(
    scores: Table,
    table: Table,
    metric: str | None = None,
    *,
    network: nn.Module | None = None,
    space: SearchSpace | None = None,
    costs: Mapping[str, Floats] | None = None,
    minimize: bool = False,
    top: Sequence[int] | None = None,
    fractions: Sequence[float] = (0.01, 0.05, 0.1),
    resamples: int = 1000,
    seed: int = 0,
) -> Audit:
    """Compares every score with a metric of a table, and the baselines with it as well.

    Intervals are 95 % percentile intervals of a bootstrap over subnets: they say how far the sample of subnets decides
    the number, not how far another training seed would.

    Args:
        scores: One column per score; larger is better.
        table: The truth.
        metric: Its column; without a name, the first.
        network, space: Of the search space, where names have to be translated.
        costs: Baselines ``[len(scores)]`` by name; those that are missing are taken from ``scores`` or ``table``.
        minimize: The metric is better where it is smaller (a latency, a loss).
        top: Numbers of best scores for the regret; ``None`` takes 1, and 10 where there are so many.
        fractions: Shares of the top for the precision.
        resamples: Of the bootstrap.
        seed: Of its random numbers.

    Raises:
        InputError: The files share fewer than 5 subnets whose metric is known, fewer than ``top`` asks for, or a number
            is outside its range.
    """
    name, truth = table.column(metric)
    mine, other = match(scores, table, network, space)
    known = ~np.isnan(truth[other])
    mine, other = mine[known], other[known]
    if len(mine) < _FEWEST:
        raise InputError(
            f"{scores.source} and {table.source} share {len(mine)} subnets whose {name!r} is known. At least {_FEWEST} are "
            "needed to compare rankings."
        )
    if resamples < 1:
        raise InputError(f"{resamples} resamples were asked for. Give at least 1, such as 1000.")
    if wrong := [k for k in top or () if k > len(mine)]:
        raise InputError(
            f"the regret of the best {wrong[0]} scores was asked for (top), and {len(mine)} subnets are compared. Give 1 to "
            f"{len(mine)}."
        )
    values = {key: column[mine] for key, column in scores.metrics.items()}
    for key in BASELINES:
        found = _baseline(key, costs or {}, scores, table, mine, other)
        if found is not None:
            values[key] = values.pop(key, found)
    target = -truth[other] if minimize else truth[other]
    judge = _Judge(target, values, tuple(top or _TOP), tuple(fractions), resamples, np.random.default_rng(seed))
    audits = tuple(judge.one(key) for key in values)
    lacking = tuple(key for key in BASELINES if key not in values)
    return Audit(name, len(mine), len(scores) - int(known.sum()), audits, lacking, resamples)


def _baseline(
    key: str,
    costs: Mapping[str, Floats],
    scores: Table,
    table: Table,
    mine: NDArray[np.int64],
    other: NDArray[np.int64],
) -> Floats | None:
    if key in scores.metrics:
        return scores.metrics[key][mine]
    if key in costs:
        return np.asarray(costs[key], dtype=np.float64)[mine]
    return table.metrics[key][other] if key in table.metrics else None


class _Judge:
    """Compares scores with one truth on shared resamples."""

    def __init__(
        self,
        truth: Floats,
        values: Mapping[str, Floats],
        top: tuple[int, ...],
        fractions: tuple[float, ...],
        resamples: int,
        rng: np.random.Generator,
    ) -> None:
        self.truth, self.values, self.top, self.fractions = truth, values, top, fractions
        # A score that is NaN somewhere is compared with the baselines on the subnets that it has.
        self.paired = {
            (name, key): np.where(np.isnan(column), np.nan, values[key])
            for name, column in values.items()
            for key in BASELINES
            if key in values and name not in BASELINES and np.isnan(column).any()
        }
        self.resampled = bootstrap(values, truth, rng, resamples, extra=self.paired)

    def coefficient(self, which: str, values: Floats) -> float:
        there = ~np.isnan(values)
        return COEFFICIENTS[which](values[there], self.truth[there])

    def one(self, name: str) -> ScoreAudit:
        values = self.values[name]
        there = ~np.isnan(values)
        own, truth = values[there], self.truth[there]
        resampled = self.resampled[name]
        found = {key: estimate(self.coefficient(key, values), resampled[key]) for key in COEFFICIENTS}
        # Against the best of all, not the best of those that the score could judge: a score that fails loses by it.
        lost = float(self.truth.max() - truth.max()) if len(truth) else float("nan")
        regret = {k: lost + top_k_regret(own, truth, k) for k in self.top if k <= len(own)}
        precision = {share: precision_at_top(own, truth, share) for share in self.fractions} if len(own) else {}
        beyond = {key: self._beyond(name, key) for key in BASELINES if key in self.values and name not in BASELINES}
        return ScoreAudit(name, len(own), int((~there).sum()), found, regret, precision, beyond)

    def _beyond(self, name: str, baseline: str) -> Estimate:
        values = self.paired.get((name, baseline), self.values[baseline])
        resampled = self.resampled[(name, baseline) if (name, baseline) in self.paired else baseline]["kendall"]
        value = self.coefficient("kendall", self.values[name]) - self.coefficient("kendall", values)
        return estimate(value, self.resampled[name]["kendall"] - resampled)


def consistency(first: Floats, second: Floats, seed: int = 0, resamples: int = 1000) -> Estimate:
    """Kendall between two measurements of the same truth: the ceiling of what a score can reach against one of them.

    Args:
        first, second: ``[n]``, such as means over disjoint training seeds.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
    """
    found = bootstrap({"first": first}, second, np.random.default_rng(seed), resamples, ("kendall",))
    return estimate(kendall(first, second), found["first"]["kendall"])
