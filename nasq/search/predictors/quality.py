"""How good a predictor is: error and rank correlation on pairs that it has not seen, also inside a window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = ["Quality", "quality"]


@dataclass(frozen=True)
class Quality:
    """Of predictions.

    Attributes:
        count: Number of pairs.
        rmse: Root mean squared error, in the unit of the values.
        kendall: Kendall's tau-b.
    """

    count: int
    rmse: float
    kendall: float


def quality(
    predicted: NDArray[np.float64], actual: NDArray[np.float64], where: NDArray[np.bool_] | None = None
) -> Quality:
    """Compares predictions with what was measured.

    Args:
        predicted, actual: ``[n]``, in one unit (for a mere ranking the error means nothing).
        where: Which pairs count, ``[n]``; ``None``: all.

    Raises:
        InputError: Fewer than three pairs count, or all predictions or all values are equal, so that no rank exists.
    """
    from scipy.stats import kendalltau

    kept = np.ones(len(actual), dtype=np.bool_) if where is None else where
    a, b = np.asarray(predicted, np.float64)[kept], np.asarray(actual, np.float64)[kept]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        raise InputError(
            f"no rank correlation exists for {len(a)} pairs with values from {a.min(initial=np.inf)} to "
            f"{a.max(initial=-np.inf)} and {b.min(initial=np.inf)} to {b.max(initial=-np.inf)}; give three or more that "
            "differ."
        )
    return Quality(len(a), float(np.sqrt(np.mean((a - b) ** 2))), float(kendalltau(a, b).statistic))
