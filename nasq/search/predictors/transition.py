"""Sampling subnets whose average bits (or any other measure) are near a target, from a table of conditional frequencies.

Source: EQ-Net's released code, after AttentiveNAS (Wang et al., CVPR 2021). For each choice and each bucket of the
measure the table holds how often each option occurred among random subnets of that bucket; sampling draws every choice
from its own row of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.search.objectives import Measure, Rows
from nasq.space.rejection import redraw

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["TransitionSampler", "TransitionTable"]

_AT_ONCE = 1 << 14
_STEEPEST = 3.0
"""Of the tilt of a draw: the last option of an ordered choice is at most ``e^3`` times as likely as the first."""


def _tilted(space: SearchSpace, count: int, rng: np.random.Generator) -> Rows:
    """Half the rows uniform, half leaning to the first or last options of ordered choices, each by an amount of its own.

    Where rules refuse 100 leaning draws of a row, it stays uniform.
    """
    rows = space.sample_batch(count, rng)
    tilt = rng.uniform(-_STEEPEST, _STEEPEST, count)
    tilt[: count // 2] = 0.0

    def leaning(at: NDArray[np.intp]) -> Rows:
        found, steep = rows[at], tilt[at]
        for column, choice in enumerate(space.choices):
            size = len(choice.options)
            if not choice.ordered or size == 1:
                continue
            weights = np.exp(steep[:, None] * np.linspace(-1, 1, size))
            cumulative = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
            drawn = (rng.random(len(at))[:, None] > cumulative).sum(1).clip(0, size - 1)
            found[:, column] = np.where(steep == 0, found[:, column], drawn)
        return found

    return redraw(space.settle, leaning, rows, differ=False)


class TransitionTable:
    """``P(option of a choice | measure in a bucket)`` for some choices of a space.

    The released code draws subnets uniformly, among which averages far from the middle practically never occur, and
    falls back on the nearest bucket. Here half the draws lean to small or to large options, so that the buckets reach
    further out; a target beyond them takes the nearest one.

    Args:
        space: What to draw from.
        measure: Of rows, such as average weight bits.
        rng: The only source of randomness.
        choices: Names of the choices that the table is for; ``None``: all that the measure depends on, found by changing
            one choice of random subnets at a time.
        draws: How many subnets to draw (released code: 500,000).
        width: Of a bucket (released code: 0.2).

    Raises:
        InputError: A name is unknown, ``draws`` or ``width`` is not above 0, or the measure depends on no choice.
    """

    def __init__(
        self,
        space: SearchSpace,
        measure: Measure,
        rng: np.random.Generator,
        choices: Sequence[str] | None = None,
        draws: int = 100_000,
        width: float = 0.2,
    ) -> None:
        if draws < 1 or not width > 0:
            raise InputError(f"a transition table got {draws} draws and width {width}; both must be above 0.")
        self.space, self.measure, self.width = space, measure, width
        names = self._influential(rng) if choices is None else list(choices)
        if not names:
            raise InputError(f"{measure.name!r} depends on no choice of the space, so it cannot be aimed at.")
        self.columns = np.array([space.positions[space[name].name] for name in names], dtype=np.int64)
        self.buckets, self.counts = self._count(draws, rng)

    def _influential(self, rng: np.random.Generator) -> list[str]:
        rows = self.space.sample_batch(64, rng)
        before, found = self.measure(rows), list[str]()
        for column, choice in enumerate(self.space.choices):
            for option in range(len(choice.options)):
                other = rows.copy()
                other[:, column] = option
                settled, member = self.space.settle(other)  # rules may refuse a change
                if bool((self.measure(settled[member]) != before[member]).any()):
                    found.append(choice.name)
                    break
        return found

    def _count(self, draws: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        most = int(self.space.sizes.max())
        counted: dict[int, NDArray[np.float64]] = {}
        for start in range(0, draws, _AT_ONCE):
            rows = _tilted(self.space, min(_AT_ONCE, draws - start), rng)
            active = self.space.active(rows)[:, self.columns]
            places = np.rint(self.measure(rows) / self.width).astype(np.int64)
            for place in np.unique(places):
                here = places == place
                table = counted.setdefault(int(place), np.zeros((len(self.columns), most)))
                for index, column in enumerate(self.columns):
                    seen = rows[here & active[:, index], column]
                    table[index] += np.bincount(seen, minlength=most)
        order = sorted(counted)
        return np.array(order), np.stack([counted[place] for place in order])

    def probabilities(self, target: float) -> Mapping[str, NDArray[np.float64]]:
        """Choice name to the probabilities of its options at the bucket nearest to ``target``."""
        table = self.counts[int(np.abs(self.buckets - target / self.width).argmin())]
        found: dict[str, NDArray[np.float64]] = {}
        for index, column in enumerate(self.columns):
            choice = self.space.choices[column]
            counts = table[index, : len(choice.options)]
            total = counts.sum()
            found[choice.name] = counts / total if total else np.full(len(counts), 1 / len(counts))
        return found


class TransitionSampler:
    """Draws rows near one target per table; choices of no table are drawn uniformly.

    Args:
        tables: Of one space, over different choices.
        rng: The only source of randomness.

    Raises:
        InputError: There is no table, or a choice is in two of them.
    """

    def __init__(self, tables: Sequence[TransitionTable], rng: np.random.Generator) -> None:
        if not tables:
            raise InputError("a transition sampler needs at least one table.")
        columns = [int(column) for table in tables for column in table.columns]
        twice = {column for column in columns if columns.count(column) > 1}
        self.space = tables[0].space
        if twice:
            raise InputError(
                f"the choice {self.space.names[min(twice)]!r} is in two transition tables. Give each table its own choices."
            )
        self.tables, self.rng = list(tables), rng

    def draw(self, targets: Sequence[float], count: int = 1) -> Rows:
        """``count`` canonical rows near ``targets``, one number per table in its measure's unit.

        In a space with rules, a row whose draws they refuse is drawn again, at most 100 times; then it is a uniform one.

        Raises:
            InputError: The number of targets is not that of the tables.
        """
        if len(targets) != len(self.tables):
            raise InputError(f"got {len(targets)} targets for {len(self.tables)} transition tables; give one for each.")
        rows = self.space.sample_batch(count, self.rng)
        found = [table.probabilities(target) for table, target in zip(self.tables, targets, strict=True)]

        def near(at: NDArray[np.intp]) -> Rows:
            drawn = rows[at]
            for name, chances in (pair for table in found for pair in table.items()):
                drawn[:, self.space.positions[name]] = self.rng.choice(len(chances), size=len(at), p=chances)
            return drawn

        return redraw(self.space.settle, near, rows, differ=False)

    def spread(self, low: float, high: float, count: int) -> Rows:
        """``count`` rows, each at targets drawn uniformly from ``low`` to ``high`` for every table (EQ-Net: 2.4 to 7.6)."""
        targets = self.rng.uniform(low, high, (count, len(self.tables)))
        return np.concatenate([self.draw(target.tolist()) for target in targets])
