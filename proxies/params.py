"""Number of parameters: the baseline that every proxy has to beat."""

from __future__ import annotations

import torch
from torch import nn

from nasq.ranking import Batch, Needs, Proxy

__all__ = ["Params"]


class Params(Proxy):
    """Trainable parameters of the model."""

    name = "params"
    needs = Needs()
    reference = "baseline: sum of the elements of all trainable parameters"

    def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
        """The count, as a float."""
        return float(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
