"""The page of an audit: what every score is worth, over seeds, with a scatter picture of each; one file, no scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.ranking.audits import BASELINES, Audit, ScoreAudit, match
from nasq.report.render import environment

if TYPE_CHECKING:
    from torch import nn

    from nasq.ranking.audit_seeds import SeedsAudit
    from nasq.ranking.statistics import Estimate
    from nasq.ranking.table import Table
    from nasq.space import SearchSpace

__all__ = ["Scatter", "audit_page", "scatters"]

Floats = NDArray[np.float64]

_WIDTH, _HEIGHT = 460, 340
_LEFT, _BOTTOM, _EDGE = 58, 44, 12
_MOST = 2000
"""Points of a picture; of more subnets, so many are drawn at random."""


@dataclass(frozen=True)
class Scatter:
    """One score against the truth.

    Attributes:
        name: Of the score.
        score: ``[n]``, the mean over the seeds.
        truth: ``[n]``.
    """

    name: str
    score: Floats
    truth: Floats


def scatters(
    scores: Sequence[Table],
    table: Table,
    metric: str | None = None,
    network: nn.Module | None = None,
    space: SearchSpace | None = None,
) -> list[Scatter]:
    """What the pictures show: subnets that every seed scored and whose truth is known.

    Args:
        scores: One file per seed.
        table: The truth.
        metric: Its column; without a name, the first.
        network, space: Where names have to be translated.

    Raises:
        InputError: The files share no subnet with the table.
    """
    _, truth = table.column(metric)
    found: dict[str, list[Floats]] = {}
    for one in scores:
        mine, other = match(one, table, network, space)
        for name, column in one.metrics.items():
            if name not in BASELINES:
                placed = np.full(len(table), np.nan)
                placed[other] = column[mine]
                found.setdefault(name, []).append(placed)
    pictures = []
    for name, columns in found.items():
        mean = np.mean(columns, axis=0)
        known = np.isfinite(mean) & np.isfinite(truth)
        pictures.append(Scatter(name, mean[known], truth[known]))
    return pictures


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within the bounds."""
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Axis:
    """From values to a picture's coordinates."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def of(cls, values: Floats, start: float, end: float) -> _Axis:
        low, high = float(values.min()), float(values.max())
        margin = (high - low) * 0.04 or abs(high) * 0.04 or 1.0
        return cls(low - margin, high + margin, start, end)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        return [(self.at(value), f"{value:.4g}") for value in _ticks(self.low, self.high)]


def _picture(one: Scatter, metric: str) -> Mapping[str, object]:
    """Coordinates for the template."""
    kept = np.arange(len(one.score))
    if len(kept) > _MOST:
        kept = np.sort(np.random.default_rng(0).choice(len(kept), _MOST, replace=False))
    x, y = one.score[kept], one.truth[kept]
    across = _Axis.of(x, _LEFT, _WIDTH - _EDGE)
    up = _Axis.of(y, _HEIGHT - _BOTTOM, _EDGE)
    return {
        "name": one.name, "metric": metric, "subnets": len(one.score), "shown": len(kept),
        "points": [(across.at(a), up.at(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)],
        "x_ticks": across.ticks, "y_ticks": up.ticks,
    }  # fmt: skip


def _interval(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.2f}, {one.high:.2f}]" if math.isfinite(one.value) else "undefined"


def _cells(score: ScoreAudit, found: SeedsAudit) -> list[str]:
    if len(found.audits) == 1:
        return [_interval(score.coefficients[key]) for key in ("kendall", "spearman", "pearson")]
    mean, spread = found.mean[score.name], found.deviation[score.name]
    return [
        f"{mean[key]:.3f} ± {spread[key]:.3f}" if math.isfinite(mean[key]) else "undefined"
        for key in ("kendall", "spearman", "pearson")
    ]


def _verdicts(audits: Sequence[Audit], name: str) -> list[str]:
    """Against each baseline, for how many seeds the score is told apart from it."""
    rows = [score for one in audits for score in one.scores if score.name == name]
    lines = []
    for baseline in rows[0].beyond:
        gains = [row.beyond[baseline] for row in rows]
        above, below = (sum(g.separated and (g.value > 0) == up for g in gains) for up in (True, False))
        if len(gains) == 1:
            word = "above" if above else "below" if below else "not separated from"
            lines.append(f"{word} {baseline} by {_interval(gains[0])}")
        else:
            lines.append(f"{baseline}: above in {above}, below in {below} of {len(gains)} seeds")
    return lines


def audit_page(found: SeedsAudit, pictures: Sequence[Scatter], title: str) -> str:
    """The page as one self-contained HTML document.

    Args:
        found: Audits of one or more seeds.
        pictures: Of :func:`scatters`.
        title: Its heading.

    Raises:
        InputError: A picture has no point.
    """
    for one in pictures:
        if not len(one.score):
            raise InputError(f"no subnet has both a score {one.name!r} and a truth; there is nothing to draw.")
    first = found.audits[0]
    rows = [
        {
            "name": score.name,
            "cells": _cells(score, found),
            "regret": [f"{k}: {value:.4g}" for k, value in score.regret.items()],
            "precision": [f"{share:.0%}: {value:.2f}" for share, value in score.precision.items()],
            "verdicts": _verdicts(found.audits, score.name),
        }
        for score in first.scores
    ]
    return (
        environment()
        .get_template("audit.html.j2")
        .render(
            title=title, audit=first, seeds=len(found.audits), rows=rows,
            pictures=[_picture(one, first.metric) for one in pictures],
            width=_WIDTH, height=_HEIGHT, left=_LEFT, bottom=_BOTTOM, edge=_EDGE,
        )
    )  # fmt: skip
