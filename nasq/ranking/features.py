"""From node-wise statistics to a vector of fixed length per subnet.

*Packed*, the form of ParZC: the layers of a subnet in order, padded with zeros on the right. Subnets have different numbers
of layers, so one position means different places in different subnets.
*Slots*, ours: one position per place in the network (the path of a layer), zeros where a subnet has no layer there.

Every statistic is scaled to 0..1 over the layers of its own subnet, which removes its magnitude; ``magnitudes`` adds the
logarithms of the sums. A subnet's own choices, one-hot, may stand beside them: what has no layer (a skip, a pooling, nothing
at all) leaves no statistic, and the options tell them apart. So may the scores of proxies, each as its rank among the subnets
that were seen. Shapes: ``D`` features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.ranking.nodes import STATISTICS, NodeStatistics
from nasq.space import Option

__all__ = ["Features", "dagger", "scaled"]

Floats = NDArray[np.float64]
Scores = Mapping[str, float]
"""The scores of one subnet, by name."""

LEVELS = 257
"""Values of a score that are kept to find a rank by; fewer where fewer subnets were seen."""


def scaled(values: Floats) -> Floats:
    """``(v - min) / (max - min)`` of finite ``values``; zeros where they are all the same.

    Raises:
        InputError: One of them is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise InputError("node-wise statistics hold NaN or infinite values. Leave that subnet out, or use more images.")
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


@dataclass(frozen=True)
class Features:
    """Which vector a subnet becomes.

    Attributes:
        kind: ``"packed"`` or ``"slots"``.
        slots: Paths in order (slots), or as many of them as the longest subnet has layers (packed).
        statistics: Which ones, in order.
        magnitudes: Whether the logarithm of every statistic's sum, and the number of layers, are features too.
        centre: Mean of those over the subnets that were seen, with their deviations in ``spread``.
        spread: See ``centre``.
        choices: Names of choices with their options, as JSON, in order; one-hot at the end of the vector. An option that is
            not among them, or a choice that a subnet does not have, is all zeros.
        scores: Names of scores with evenly spaced quantiles of their values over the subnets that were seen. A score enters
            as its rank among them, scaled to deviation 1, so that no monotone change of a proxy matters.
    """

    kind: Literal["packed", "slots"]
    slots: tuple[str, ...]
    statistics: tuple[str, ...] = STATISTICS
    magnitudes: bool = False
    centre: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    choices: tuple[tuple[str, tuple[str, ...]], ...] = ()
    scores: tuple[tuple[str, tuple[float, ...]], ...] = ()

    @classmethod
    def of(
        cls,
        subnets: Sequence[NodeStatistics],
        kind: Literal["packed", "slots"] = "slots",
        magnitudes: bool = True,
        cells: Sequence[Mapping[str, Option]] = (),
        scores: Sequence[Scores] = (),
    ) -> Features:
        """The features that hold all of ``subnets``, the options of ``cells`` and the ``scores`` where there are some.

        Raises:
            InputError: There is none, ``kind`` is unknown, or a score is NaN.
        """
        if not subnets or kind not in {"packed", "slots"}:
            raise InputError(
                f"features {kind!r} of {len(subnets)} subnets. Allowed: 'packed' or 'slots', of at least one."
            )
        if kind == "slots":
            slots = tuple(sorted({path for one in subnets for path in one}, key=_natural))
        else:
            slots = tuple(str(index) for index in range(max(len(one) for one in subnets)))
        choices, levels = _options(cells), _levels(scores)
        if not magnitudes:
            return cls(kind, slots, choices=choices, scores=levels)
        sizes = np.array([_magnitudes(one) for one in subnets])
        spread = sizes.std(0)
        return cls(kind, slots, magnitudes=True, centre=tuple(sizes.mean(0).tolist()),
                   spread=tuple(np.where(spread > 1e-9, spread, 1.0).tolist()), choices=choices,
                   scores=levels)  # fmt: skip

    @property
    def length(self) -> int:
        """``D``."""
        onehot = sum(len(options) for _, options in self.choices)
        return len(self.slots) * len(self.statistics) + len(self.centre) + onehot + len(self.scores)

    def vector(
        self, nodes: NodeStatistics, cell: Mapping[str, Option] | None = None, scores: Scores | None = None
    ) -> Floats:
        """One subnet's features ``[D]``: the statistics one after another, then magnitudes, its choices, its scores.

        Raises:
            InputError: The subnet has more layers, or a layer at a place that is not among the slots: it is of another space;
                or its choices or scores are features and were not given.
        """
        if self.choices and cell is None:
            raise InputError(
                "the ranker also looks at the subnets' choices and none were given. Give the subnets: cells=[...]."
            )
        if self.kind == "slots":
            places = {path: index for index, path in enumerate(self.slots)}
            strange = [path for path in nodes if path not in places]
            if strange:
                raise InputError(
                    f"a subnet has a layer at {strange[0]!r}, where no subnet that the ranker learned from had one. The "
                    "ranker is for another space, or was fitted on too few subnets."
                )
            at = [places[path] for path in nodes]
        else:
            at = list(range(len(nodes)))
            if len(at) > len(self.slots):
                raise InputError(
                    f"a subnet has {len(at)} layers and the ranker knows {len(self.slots)} at most. It is for another space."
                )
        made = np.zeros((len(self.statistics), len(self.slots)))
        table = np.array(list(nodes.values()), dtype=np.float64).reshape(len(nodes), len(STATISTICS))
        for row, name in enumerate(self.statistics):
            made[row, at] = scaled(table[:, STATISTICS.index(name)])
        parts = [made.reshape(-1)]
        if self.magnitudes:
            parts.append((np.array(_magnitudes(nodes)) - np.array(self.centre)) / np.array(self.spread))
        for choice, options in self.choices:
            own = json.dumps(cell[choice]) if cell is not None and choice in cell else None
            parts.append(np.array([float(option == own) for option in options]))
        parts += [np.array([_rank(name, levels, scores)]) for name, levels in self.scores]
        return np.concatenate(parts)

    def to_json(self) -> dict[str, Any]:
        """For :meth:`from_json`."""
        return {"kind": self.kind, "slots": list(self.slots), "statistics": list(self.statistics),
                "magnitudes": self.magnitudes, "centre": list(self.centre), "spread": list(self.spread),
                "choices": [[name, list(options)] for name, options in self.choices],
                "scores": [[name, [_number(one) for one in levels]] for name, levels in self.scores]}  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Features:
        """Reads :meth:`to_json`."""
        return cls(value["kind"], tuple(value["slots"]), tuple(value["statistics"]), bool(value["magnitudes"]),
                   tuple(value["centre"]), tuple(value["spread"]),
                   tuple((name, tuple(options)) for name, options in value.get("choices", [])),
                   tuple((name, tuple(map(float, levels))) for name, levels in value.get("scores", [])))  # fmt: skip


def _options(cells: Sequence[Mapping[str, Option]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, set[str]] = {}
    for cell in cells:
        for name, option in cell.items():
            found.setdefault(name, set()).add(json.dumps(option))
    return tuple((name, tuple(sorted(found[name]))) for name in sorted(found))


def _levels(scores: Sequence[Scores]) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """Of every score, the quantiles that ranks are found by."""
    found = []
    for name in scores[0] if scores else ():
        values = np.sort([_known(name, one) for one in scores])
        at = np.linspace(0, len(values) - 1, min(LEVELS, len(values))).round().astype(int)
        found.append((name, tuple(values[at].tolist())))
    return tuple(found)


def _known(name: str, scores: Scores | None) -> float:
    value = math.nan if scores is None else scores.get(name, math.nan)
    if math.isnan(value):
        raise InputError(
            f"the score {name!r} is a feature, and of a subnet it is NaN or not there. Give "
            "it for every subnet, leave such subnets out, or learn without that score."
        )
    return float(value)


def _rank(name: str, levels: Sequence[float], scores: Scores | None) -> float:
    """The middle of the ranks that a value has among ``levels``, from -sqrt(3) to sqrt(3)."""
    value = _known(name, scores)
    below, up_to = np.searchsorted(levels, value, "left"), np.searchsorted(levels, value, "right")
    return float(((below + up_to) / (2 * len(levels)) - 0.5) * math.sqrt(12))


def _number(value: float) -> float | str:
    """JSON has no infinities."""
    return value if math.isfinite(value) else str(value)


def _natural(path: str) -> tuple[tuple[int, int | str], ...]:
    """Sorts ``cells.10`` behind ``cells.9``."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in path.split("."))


def _magnitudes(nodes: NodeStatistics) -> list[float]:
    sums = np.array(list(nodes.values()), dtype=np.float64).reshape(len(nodes), -1).sum(0)
    return [*(math.log(max(float(one), 1e-30)) for one in sums), float(len(nodes))]


def dagger(nodes: NodeStatistics, statistic: str = "snip", alpha: float = 0.1) -> float:
    """ParZC-dagger: ``sum over layers j of (sin(alpha j) + 1) / 2 x statistic of layer j``; no training.

    The released code has ``alpha = 0.1`` where a comment says 0.5. ``alpha = inf`` gives every layer the weight 1: the plain
    sum.
    """
    values = np.array([one[STATISTICS.index(statistic)] for one in nodes.values()])
    weights = np.ones(len(values)) if math.isinf(alpha) else (np.sin(alpha * np.arange(len(values))) + 1) / 2
    return float((weights * values).sum())
