"""vote: the majority of three proxies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nasq.ranking import Needs, PoolProxy

from .jacov import Jacov
from .snip import Snip
from .synflow import Synflow

__all__ = ["Vote"]


class Vote(PoolProxy):
    """How many candidates of the pool a network beats in the opinion of most of synflow, jacov and snip.

    The paper compares two networks at a time; over a pool each meets every other (Copeland's method), and a tie counts
    half.
    """

    name = "vote"
    needs = Needs(data=True, labels=True)
    reference = "Abdelfattah et al., ICLR 2021 (arXiv 2101.08134)"

    def __init__(self) -> None:
        self.parts = (Synflow(), Jacov(), Snip())

    def combine(self, values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """Wins ``[pool]``; NaN where a proxy has no value."""
        columns = np.stack([values[part.name] for part in self.parts])
        wins = np.array([_wins(columns, one) for one in columns.T])
        wins[np.isnan(columns).any(0)] = np.nan
        return wins


def _wins(columns: NDArray[np.float64], own: NDArray[np.float64]) -> float:
    difference = own[:, None] - columns
    with np.errstate(invalid="ignore"):
        opinions = np.sign(np.where(own[:, None] == columns, 0.0, difference)).sum(0)
    return float((opinions > 0).sum() + 0.5 * (opinions == 0).sum() - 0.5)
