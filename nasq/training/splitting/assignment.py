"""Which set of weights a configuration uses: what the configurations are, and how the sets are kept equally used.

Source: Balanced Mixture of SuperNets (Javan Roshtkhari et al., AutoML 2023, arXiv 2306.11982), as its released code computes
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

if TYPE_CHECKING:
    from nasq.space import SearchSpace
    from nasq.training.region import Rows

__all__ = ["Configurations", "Floats", "balance", "linear_temperature", "replayed", "row_softmax"]

Floats = NDArray[np.float64]

_MOST = 65_536
_TOLERANCE = 1e-4
_ITERATIONS = 1000


class Configurations:
    """What is assigned: the different values of some choices, of all choices where none is named.

    Args:
        space: The whole space.
        choices: Names of the choices that decide; ``None`` for all of them.

    Attributes:
        columns: Their columns in a canonical row.
        rows: Every configuration once, ``[configurations, columns]``.

    Raises:
        InputError: A name is unknown, or there are too many configurations to keep an accuracy of each.
    """

    def __init__(self, space: SearchSpace, choices: Sequence[str] | None = None) -> None:
        self.space = space
        self.choices = tuple(space.names if choices is None else choices)
        self.columns = [space.positions[space[name].name] for name in self.choices]
        sizes = [int(space.sizes[column]) for column in self.columns]
        if not self.columns or prod(sizes) > _MOST:
            raise InputError(
                f"a mixture keeps an accuracy of every configuration, and {len(self.columns)} choices have "
                f"{prod(sizes):,} combinations; allowed are {_MOST:,}. Name fewer choices, those that decide which weights "
                "are used, or split the supernet (SplitPlan)."
            )
        drawn = np.array(list(itertools.product(*map(range, sizes))), dtype=np.int16)
        rows = np.repeat(space.to_rows([space.default()]), len(drawn), axis=0)
        rows[:, self.columns] = drawn
        settled, member = space.settle(rows)
        self.rows: Rows = np.unique(settled[member][:, self.columns], axis=0)
        self._known = {row.tobytes(): index for index, row in enumerate(self.rows)}

    def __len__(self) -> int:
        return len(self.rows)

    def indices(self, rows: Rows) -> NDArray[np.int64]:
        """The configuration of each canonical row ``[n, choices of the space]``.

        Raises:
            InputError: A row is of none: its choices cannot be had beside the default of the others.
        """
        own = np.ascontiguousarray(rows[:, self.columns], dtype=np.int16)
        found = [self._known.get(row.tobytes(), -1) for row in own]
        if -1 in found:
            wrong = self.space.to_subnet(rows[found.index(-1)])
            raise InputError(
                f"the subnet {wrong.to_json()[:200]} is of no configuration of {', '.join(self.choices)[:100]}: they depend "
                "on choices that were not named. Name these as well, or none."
            )
        return np.array(found, dtype=np.int64)


def row_softmax(values: Floats) -> Floats:
    """``softmax`` of each row of ``[n, sets]``."""
    raised = np.exp(values - values.max(1, keepdims=True))
    shares: Floats = raised / raised.sum(1, keepdims=True)
    return shares


def replayed(shares: Floats, marginals: Sequence[Floats]) -> Floats:
    """``shares`` ``[n, sets]`` with columns divided by each marginal and rows by their sums, in turn."""
    for marginal in marginals:
        shares = shares / marginal
        shares = shares / shares.sum(1, keepdims=True)
    return shares


def balance(accuracies: Floats, temperature: float) -> list[Floats]:
    """The marginals whose division makes all sets of weights equally likely on average (Sinkhorn's iteration).

    ``P = softmax(temperature W)`` by rows; while the mean over rows is not uniform, columns are divided by it and rows
    by their sums. The released code loops until ``|KL| <= 1e-4``, without a limit; here after 1,000 rounds it is given up.

    Args:
        accuracies: ``W``, ``[configurations, sets]``, 0 to 1.
        temperature: Above 0.

    Returns:
        The divisors in order, each ``[sets]``.

    Raises:
        InputError: No balance was found: the temperature is so high that a set has no share left.
    """
    shares = row_softmax(temperature * accuracies)
    sets = shares.shape[1]
    marginals: list[Floats] = []
    for _ in range(_ITERATIONS):
        mean = shares.mean(0)
        if abs(float((mean * np.log(np.maximum(mean, 1e-300) * sets)).sum())) <= _TOLERANCE:
            return marginals
        if not (mean > 0).all():
            break  # a column has underflowed: nothing divides it back
        marginals.append(mean / mean.sum())
        shares = replayed(shares, marginals[-1:])
    raise InputError(
        f"no balance of {sets} sets of weights was found in {_ITERATIONS} rounds at the temperature {temperature:g}. Lower "
        "the highest temperature, or use fewer sets."
    )


def linear_temperature(epoch: int, epochs: int, low: float = 1.0, high: float = 100.0) -> float:
    """From ``low`` in the first to ``high`` in the last epoch, as published."""
    return low + (high - low) * (epoch / max(epochs - 1, 1))
