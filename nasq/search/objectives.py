"""What a search maximises or minimises, and what it must never break: named functions with a unit.

Two kinds of objective: those *on rows* are cheap and vectorised (parameters, MACs, BitOPs, bytes); those *on a subnet*
are expensive and are called once per subnet (accuracy, latency). Constraints are functions on rows, because they are
decided before anything is evaluated: an infeasible subnet is never evaluated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError, NasqError, choose_from

if TYPE_CHECKING:
    from nasq.space import Subnet

__all__ = [
    "COST_UNITS",
    "Bound",
    "Constraint",
    "Direction",
    "Goal",
    "Measure",
    "Objective",
    "Rows",
    "Values",
    "feasible",
    "format_number",
    "measures",
    "parse_bound",
    "parse_constraints",
    "parse_number",
    "violations",
]

Rows = NDArray[np.int16]
Values = NDArray[np.float64]
Direction = Literal["maximize", "minimize"]

COST_UNITS = {
    "params": "",
    "macs": "",
    "bitops": "",
    "bytes": "B",
    "compression": "x",
    "average_weight_bits": "bits",
    "average_activation_bits": "bits",
}
"""The costs of :mod:`nasq.cost` with units short enough for axes, messages and tables."""

_SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)")
_BOUND = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(<=|>=)\s*(.*?)\s*")


@dataclass(frozen=True)
class Measure:
    """A named number of every row, such as the bytes of its weights.

    Attributes:
        name: What users call it: ``"bytes"``.
        unit: For people: ``"B"``; empty for a plain number.
        function: Canonical rows ``[n, choices]`` to values ``[n]``.
    """

    name: str
    unit: str
    function: Callable[[Rows], Values]

    def __call__(self, rows: Rows) -> Values:
        """The values ``[n]`` of ``rows``.

        Raises:
            NasqError: The function gave another shape, or a value that is not finite.
        """
        values = np.asarray(self.function(rows), dtype=np.float64)
        if values.shape != (len(rows),):
            raise NasqError(f"{self.name!r} gave values of shape {values.shape} for {len(rows)} rows: one value each.")
        if not np.isfinite(values).all():
            index = int(np.flatnonzero(~np.isfinite(values))[0])
            raise NasqError(f"{self.name!r} is {values[index]} for the row {rows[index].tolist()}; it must be finite.")
        return values


@dataclass(frozen=True)
class Goal:
    """What is better: enough to compare what was evaluated already.

    Attributes:
        name: Unique in a study; also its column in ``subnets.csv``.
        unit: For people: ``"%"``, ``"B"``.
        direction: ``"maximize"`` or ``"minimize"``.
    """

    name: str
    unit: str
    direction: Direction

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise choose_from("direction", self.direction, ("maximize", "minimize"), f"It belongs to {self.name!r}.")

    @property
    def sign(self) -> float:
        """What turns a value into one that is better when it is larger: 1 or -1."""
        return 1.0 if self.direction == "maximize" else -1.0


@dataclass(frozen=True)
class Objective(Goal):
    """One thing to maximise or minimise: a :class:`Goal` and the function that gives its values.

    Attributes:
        function: With ``on="subnet"`` one subnet to a number; with ``on="rows"`` canonical rows ``[n, choices]`` to
            values ``[n]``.
        on: What ``function`` takes.
    """

    function: Callable[[Any], Any]
    on: Literal["subnet", "rows"] = "subnet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in ("subnet", "rows"):
            raise choose_from("kind of objective", self.on, ("subnet", "rows"), f"It belongs to {self.name!r}.")

    @property
    def measure(self) -> Measure:
        """The function of an objective on rows, checked."""
        assert self.on == "rows", self.name
        return Measure(self.name, self.unit, self.function)

    def evaluate(self, subnet: Subnet) -> float:
        """The value of one subnet (objectives on a subnet only).

        Raises:
            NasqError: The value is not a finite number.
        """
        assert self.on == "subnet", self.name
        value = float(self.function(subnet))
        if not math.isfinite(value):
            raise NasqError(f"the objective {self.name!r} is {value} for subnet {subnet.id}; it must be finite.")
        return value


@dataclass(frozen=True)
class Bound:
    """Limits of a named number, both inclusive: what ``"bytes<=20k"`` says."""

    name: str
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.lower, self.upper) if value is not None]
        if not given or not all(math.isfinite(value) for value in given):
            raise InputError(f"the bound of {self.name!r} needs a finite lower or upper limit, not {given}.")
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise InputError(f"the bound {self} leaves nothing: its lower limit is above its upper one.")

    def __str__(self) -> str:
        return self.text()

    def text(self, unit: str = "") -> str:
        """The bound for people: ``"bytes <= 20 kB"``."""
        low = "" if self.lower is None else format_number(self.lower, unit)
        high = "" if self.upper is None else f" <= {format_number(self.upper, unit)}"
        if not high:
            return f"{self.name} >= {low}"
        return f"{low} <= {self.name}{high}" if low else f"{self.name}{high}"

    def violation(self, values: Values) -> Values:
        """By how much of the limit each value ``[n]`` breaks it: 0 where it holds, 0.1 for ten per cent too much."""
        excess = np.zeros(len(values))
        for limit, sign in ((self.upper, 1.0), (self.lower, -1.0)):
            if limit is not None:
                excess = np.maximum(excess, sign * (values - limit) / max(abs(limit), 1e-12))
        return excess


@dataclass(frozen=True)
class Constraint:
    """A hard bound on a measure: what breaks it is never evaluated.

    Attributes:
        name: Of what is bounded.
        unit: Of the bound.
        function: Canonical rows ``[n, choices]`` to values ``[n]``.
        lower, upper: Inclusive limits; at least one is given.
    """

    name: str
    unit: str
    function: Callable[[Rows], Values]
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        Bound(self.name, self.lower, self.upper)  # refuses impossible limits here, where they are written

    @property
    def bound(self) -> Bound:
        """The limits alone."""
        return Bound(self.name, self.lower, self.upper)

    @property
    def measure(self) -> Measure:
        """The bounded number, checked."""
        return Measure(self.name, self.unit, self.function)

    def __str__(self) -> str:
        return self.bound.text(self.unit)

    def violation(self, rows: Rows) -> Values:
        """Relative violation ``[n]`` of each row; see :meth:`Bound.violation`."""
        return self.bound.violation(self.measure(rows))


def violations(constraints: Sequence[Constraint], rows: Rows) -> Values:
    """The sum ``[n]`` of all relative violations; 0 exactly where every constraint holds."""
    return sum((constraint.violation(rows) for constraint in constraints), np.zeros(len(rows)))


def feasible(constraints: Sequence[Constraint], rows: Rows) -> NDArray[np.bool_]:
    """Which rows ``[n]`` keep every constraint."""
    kept: NDArray[np.bool_] = violations(constraints, rows) == 0.0
    return kept


def parse_number(text: str) -> float:
    """A number with an optional decimal suffix: ``"20k"`` is 20,000, ``"1.5M"`` 1,500,000, ``"2G"`` 2,000,000,000.

    Raises:
        InputError: Anything else. A lower-case ``m`` is refused, because elsewhere it means a thousandth.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in _SUFFIXES:
        raise InputError(
            f"cannot read the number {text!r}. Allowed: digits with one of the suffixes k (1,000), M (1,000,000), "
            "G or T, such as 20k or 1.5M."
        )
    value = float(match[1]) * _SUFFIXES[match[2]]
    if not math.isfinite(value):
        raise InputError(f"the number {text!r} is too large.")
    return value


def format_number(value: float, unit: str = "") -> str:
    """A number for people: ``20000`` is ``"20k"``, ``20000`` of unit ``"B"`` is ``"20 kB"``."""
    suffix = ""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            value, suffix = value / factor, letter
            break
    return f"{value:.4g} {suffix}{unit}" if unit else f"{value:.4g}{suffix}"


def parse_bound(text: str, allowed: Iterable[str]) -> Bound:
    """Reads ``"bytes<=20k"`` or ``"accuracy>=0.97"``.

    Args:
        text: A name, ``<=`` or ``>=``, and a number; see :func:`parse_number`.
        allowed: The names that may be bounded.

    Raises:
        InputError: The text has another form, or the name is unknown (the nearest one is suggested).
    """
    match = _BOUND.fullmatch(text)
    names = sorted(allowed)
    if match is None:
        raise InputError(
            f"cannot read the bound {text!r}. Allowed: a name, <= or >=, and a number, such as bytes<=20k. "
            f"Names: {', '.join(names)}."
        )
    name, sign, number = match.groups()
    if name not in names:
        raise choose_from("quantity", name, names, f"It was in the bound {text!r}.")
    try:
        value = parse_number(number)
    except InputError as error:
        raise InputError(f"in the bound {text!r}: {error}") from None
    return Bound(name, upper=value) if sign == "<=" else Bound(name, lower=value)


def parse_constraints(texts: Iterable[str], known: Mapping[str, Measure]) -> list[Constraint]:
    """Constraints of what users write; see :func:`parse_bound`. The order of ``texts`` is kept."""
    constraints = []
    for text in texts:
        bound = parse_bound(text, known)
        measure = known[bound.name]
        constraints.append(Constraint(measure.name, measure.unit, measure.function, bound.lower, bound.upper))
    return constraints


class _Shared:
    """One call of ``evaluate`` serves every name: the last rows and their values are kept."""

    def __init__(self, evaluate: Callable[[Rows], Mapping[str, NDArray[Any]]]) -> None:
        self._evaluate = evaluate
        self._rows: Rows | None = None
        self._values: Mapping[str, NDArray[Any]] = {}

    def __call__(self, rows: Rows, name: str) -> Values:
        # Compared by content: a caller may change its array in place between two calls.
        if self._rows is None or not np.array_equal(self._rows, rows):
            self._values = self._evaluate(rows)
            self._rows = rows.copy()
        if name not in self._values:
            raise InputError(f"{name!r} is not a cost of this network. Its costs: {', '.join(sorted(self._values))}.")
        return np.asarray(self._values[name], dtype=np.float64)


def measures(
    evaluate: Callable[[Rows], Mapping[str, NDArray[Any]]], units: Mapping[str, str] = COST_UNITS
) -> dict[str, Measure]:
    """Splits a function that computes many costs at once into named measures that share its work.

    Args:
        evaluate: Rows ``[n, choices]`` to name -> values ``[n]``.
        units: The names to offer, with their units.
    """
    shared = _Shared(evaluate)

    def bind(name: str) -> Callable[[Rows], Values]:
        return lambda rows: shared(rows, name)

    return {name: Measure(name, unit, bind(name)) for name, unit in units.items()}
