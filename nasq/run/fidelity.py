"""Evaluation at a fidelity below 1: accuracy on part of the validation images, for Hyperband and its kin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nasq.data import Split
from nasq.run.evaluation import Evaluation
from nasq.run.kept import KeptValues
from nasq.search import Objective
from nasq.space import Subnet

__all__ = ["PartialValues"]


class PartialValues:
    """Values of a subnet at a fidelity: accuracy on evenly spaced validation images, that share of them; costs as always.

    What was computed is kept on disk, so that a search that is killed between two full evaluations loses none of it.

    Args:
        evaluation: Of the run's weights.
        objectives: Whose values are wanted.
        kept: Where they are kept.
        on_event: Told ``search.partial`` with the subnet, its fidelity and its values.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        objectives: Sequence[Objective],
        kept: KeptValues,
        on_event: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._evaluation, self._objectives, self._kept = evaluation, tuple(objectives), kept
        self._on_event = on_event or (lambda event: None)

    def __call__(self, subnet: Subnet, fidelity: float) -> dict[str, float]:
        """Every objective's value."""
        key = f"{subnet.id} at {fidelity:.6g}"
        known = key in self._kept
        values = self._kept.get(key, lambda: self._computed(subnet, fidelity))
        if not known:
            self._on_event({"event": "search.partial", "subnet": subnet.id, "fidelity": fidelity, "values": values})
        return values

    def _computed(self, subnet: Subnet, fidelity: float) -> dict[str, float]:
        rows = self._evaluation.workshop.supernet.space.to_rows([subnet])
        return {one.name: self._value(one, subnet, rows, fidelity) for one in self._objectives}

    def _value(self, objective: Objective, subnet: Subnet, rows: Any, fidelity: float) -> float:
        if objective.on == "rows":
            return float(objective.measure(rows)[0])
        if objective.name != "accuracy":
            return objective.evaluate(subnet)
        validation = self._evaluation.workshop.data.validation
        count = max(1, round(fidelity * len(validation)))
        chosen = torch.linspace(0, len(validation) - 1, count).long()
        return self._evaluation.accuracy(subnet, Split(validation.images[chosen], validation.labels[chosen]))
