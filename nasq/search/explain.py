"""Says what hard constraints leave of a space, and what comes nearest where they leave nothing.

Everything is a fixed amount of work on rows: it answers in seconds, also where no feasible subnet exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.errors import InfeasibleError, InputError
from nasq.search.feasible import descend, extremes
from nasq.search.objectives import Constraint, Rows, Values, format_number, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["Example", "Explanation", "Survival", "explain", "infeasible", "wilson"]

# Two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


def wilson(successes: int, trials: int, z: float = _Z) -> tuple[float, float]:
    """The score interval of a share (Wilson, "Probable inference", JASA 22, 1927), within 0..1.

    Unlike the normal approximation it is sound where nothing, or everything, succeeded.

    Args:
        successes: Of the trials.
        trials: At least one.
        z: Standard deviations to either side; the default is that of 95 %.

    Raises:
        InputError: There are no trials, or more successes than trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise InputError(f"a share needs 0 <= successes <= trials and a trial; got {successes} of {trials}.")
    share = successes / trials
    denominator = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / denominator
    half = z / denominator * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # At the ends the exact bound is 0 or 1; rounding would leave 1e-19 or so.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == trials else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Survival:
    """How much of the space keeps a constraint.

    Attributes:
        constraint: Its text, or ``"all together"``.
        unit: Of ``smallest``, ``largest`` and ``reached``.
        survivors: Samples that keep it.
        share, low, high: Their share and its 95 % interval.
        smallest, largest: Values seen among the samples; ``None`` for all together.
        reached: The value nearest to the limit, or beyond it, found by descending from the samples: what the space
            can do at all, as far as a bounded search sees. ``None`` where samples survive, or for all together.
    """

    constraint: str
    unit: str
    survivors: int
    share: float
    low: float
    high: float
    smallest: float | None = None
    largest: float | None = None
    reached: float | None = None


@dataclass(frozen=True)
class Example:
    """A subnet that is feasible (``violation`` 0) or comes near.

    Attributes:
        id: Of the subnet.
        subnet: Its canonical JSON.
        values: Text of each constraint to the value it bounds.
        violation: Sum of the relative violations; 0.1 is ten per cent too much.
    """

    id: str
    subnet: str
    values: Mapping[str, float]
    violation: float


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found.

    Attributes:
        samples: Subnets sampled, every choice uniform over its options.
        constraints: One line for each constraint alone, in the order given.
        together: All of them.
        closest: Feasible subnets first, else those of least violation; found by descending where no sample survived.
    """

    samples: int
    constraints: tuple[Survival, ...]
    together: Survival
    closest: tuple[Example, ...]

    @property
    def feasible(self) -> bool:
        """Whether any feasible subnet was seen, by sampling or by descending."""
        return self.together.survivors > 0 or any(example.violation == 0 for example in self.closest)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``json.dumps``."""
        return asdict(self)

    def text(self) -> str:
        """The explanation for people, a line for each constraint and each example."""
        lines = [f"of {self.samples:,} sampled subnets (every choice uniform over its options):"]
        lines += [f"  {_survival_text(survival)}" for survival in (*self.constraints, self.together)]
        if self.closest:
            lines.append("feasible subnets:" if self.closest[0].violation == 0 else "the closest subnets:")
        for example in self.closest:
            values = ", ".join(f"{name}: {format_number(value)}" for name, value in example.values.items())
            lines.append(f"  {example.id}  violation {_percent(example.violation)}  ({values})")
        return "\n".join(lines)


def _percent(share: float) -> str:
    percent = 100 * share
    return f"{percent:.3g} %" if percent < 999.5 else f"{percent:,.0f} %"


def _survival_text(survival: Survival) -> str:
    text = (
        f"{survival.constraint}: {_percent(survival.share)} survive "
        f"(95 % interval {_percent(survival.low)} to {_percent(survival.high)})"
    )
    if survival.smallest is not None and survival.largest is not None:
        smallest, largest = (format_number(value, survival.unit) for value in (survival.smallest, survival.largest))
        text += f"; seen {smallest} to {largest}"
    if survival.reached is not None:
        text += f"; nearest found by descending: {format_number(survival.reached, survival.unit)}"
    return text


def explain(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    rng: np.random.Generator,
    samples: int = 4000,
    examples: int = 3,
    starts: int = 16,
    rounds: int = 40,
) -> Explanation:
    """How much of ``space`` survives each constraint alone and all together, and what comes nearest.

    Args:
        space: What is searched.
        constraints: At least one.
        rng: The only source of randomness.
        samples: Subnets to sample, every choice uniform over its options.
        examples: How many of the closest subnets to list.
        starts: Rows to descend from where no sample survives.
        rounds: Most rounds of descending.

    Raises:
        InputError: There is nothing to explain.
    """
    if not constraints or samples < 1:
        raise InputError(f"explaining needs a constraint and a sample; got {len(constraints)} and {samples}.")
    rows = space.sample_batch(samples, rng)
    kept = [constraint.violation(rows) == 0.0 for constraint in constraints]
    lines = tuple(_survival(space, constraint, rows, rng, starts, rounds) for constraint in constraints)
    together = int(np.logical_and.reduce(kept).sum())
    return Explanation(
        samples,
        lines,
        Survival("all together", "", together, together / samples, *wilson(together, samples)),
        _closest(space, constraints, rows, rng, examples, starts, rounds),
    )


def _survival(
    space: SearchSpace, constraint: Constraint, rows: Rows, rng: np.random.Generator, starts: int, rounds: int
) -> Survival:
    values = constraint.measure(rows)
    survivors = int((constraint.bound.violation(values) == 0.0).sum())
    reached = None if survivors else _reached(space, constraint, rows, rng, starts, rounds)
    return Survival(
        str(constraint), constraint.unit, survivors, survivors / len(rows), *wilson(survivors, len(rows)),
        float(values.min()), float(values.max()), reached,
    )  # fmt: skip


def _reached(
    space: SearchSpace, constraint: Constraint, rows: Rows, rng: np.random.Generator, starts: int, rounds: int
) -> float:
    """The value of least violation that descending finds for one constraint alone."""
    start = rows[np.argsort(constraint.violation(rows), kind="stable")[:starts]]
    best = descend(space, [constraint], np.concatenate([extremes(space), start]), rng, rounds)
    values = constraint.measure(best)
    return float(values[np.argmin(constraint.bound.violation(values))])


def _closest(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    rows: Rows,
    rng: np.random.Generator,
    examples: int,
    starts: int,
    rounds: int,
) -> tuple[Example, ...]:
    excess = violations(constraints, rows)
    order = np.argsort(excess, kind="stable")
    if excess[order[0]] == 0.0:
        return _examples(space, constraints, rows[order], excess[order], examples)
    improved = descend(space, constraints, np.concatenate([extremes(space), rows[order[:starts]]]), rng, rounds)
    excess = violations(constraints, improved)
    order = np.argsort(excess, kind="stable")
    return _examples(space, constraints, improved[order], excess[order], examples)


def _examples(
    space: SearchSpace, constraints: Sequence[Constraint], rows: Rows, excess: Values, count: int
) -> tuple[Example, ...]:
    """The first ``count`` different subnets; once one is feasible, only feasible ones."""
    if excess[0] == 0.0:
        rows, excess = rows[excess == 0.0], excess[excess == 0.0]
    _, first = np.unique(rows, axis=0, return_index=True)
    chosen = np.sort(first)[:count]
    values = [constraint.measure(rows[chosen]) for constraint in constraints]
    return tuple(
        Example(
            subnet.id,
            subnet.to_json(),
            {str(constraint): float(column[index]) for constraint, column in zip(constraints, values, strict=True)},
            float(excess[chosen[index]]),
        )
        for index, subnet in enumerate(space.to_subnets(rows[chosen]))
    )


def infeasible(explanation: Explanation) -> InfeasibleError:
    """The error for constraints that leave nothing that was found, with the whole explanation in it."""
    return InfeasibleError(
        "no feasible subnet was found; loosen the constraint that survives least, or search a larger space.\n"
        + explanation.text()
    )
