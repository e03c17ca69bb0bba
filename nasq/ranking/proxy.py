"""What a zero-cost proxy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Batch", "Needs", "Proxy"]

Batch = tuple[Tensor, Tensor]
"""Normalised inputs ``[N, ...]`` and int64 labels ``[N]``."""


@dataclass(frozen=True)
class Needs:
    """What a proxy looks at.

    Attributes:
        data: Real inputs; otherwise only their shape matters.
        labels: The labels as well.
        batches: How many batches.
    """

    data: bool = False
    labels: bool = False
    batches: int = 1


class Proxy(ABC):
    """Scores an untrained network; larger is better.

    A proxy never changes the model it is given, and reports NaN and overflow as they are.

    Attributes:
        name: As on the command line.
        needs: What it looks at.
        reference: Where it was published.
    """

    name: str
    needs: Needs
    reference: str

    @abstractmethod
    def score(self, model: nn.Module, batch: Batch) -> float:
        """The score of ``model``."""
